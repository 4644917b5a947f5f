"""What the fine-tuning recipes of Chinese-CLIP share: the original's run scripts, at every size.

The argument of these configs is [MODEL][,VARIANT]. MODEL is ViT-B-16 (the default), ViT-L-14,
ViT-L-14-336, ViT-H-14 or RN50. VARIANT is `flip`, half of the image patches left out in training,
or `distill`, image features that also follow those of a teacher. The original's teachers come from
ModelScope; here it is the released ViT-H-14, or yours with --config.task.teacher=M (of the same
image size: for ViT-L-14-336 it must be yours).

Data lies under OFA_JAX_DATA, which is datasets/ where it is not set. Any number of devices gives
the updates of the original's eight, and `accum` makes them fit.
"""

import os
from collections.abc import Iterable, Mapping

from ofa_jax.config import Config, Eval, MeshShape, Optim
from ofa_jax.data.pairs import PairData
from ofa_jax.models import cnclip
from ofa_jax.tasks.contrastive import Contrastive

VARIANTS = ("flip", "distill")


def finetune(
  argument: str,
  *,
  name: str,
  folder: str,
  batch_size: int,
  epochs: int,
  lr: float,
  warmup: int,
  evals: Mapping[str, int | None],
  remat: str = "none",
) -> Config:
  """The recipe on one data set.

  Args:
    argument: "[MODEL][,VARIANT]" as above.
    name: of the data set.
    folder: of its files, under OFA_JAX_DATA.
    batch_size, epochs, lr, warmup, remat: as the script of the data set has them.
    evals: splits to evaluate after every epoch and every so many steps; 0 is none of the latter,
      None only the end. As in the scripts, every epoch leaves a checkpoint.

  Raises:
    ValueError: an unknown model or variant.
  """
  words = [word for word in argument.split(",") if word]
  unknown = [word for word in words if word not in (*cnclip.MODELS, *VARIANTS)]
  if unknown:
    raise ValueError(
      f"Expected a model out of {', '.join(cnclip.MODELS)} and a variant out of "
      f"{', '.join(VARIANTS)}, found {', '.join(unknown)}"
    )
  size = next((word for word in words if word in cnclip.MODELS), "ViT-B-16")
  model = cnclip.config(*cnclip.MODELS[size])
  task = Contrastive(
    image_size=model.vision.image_size,
    augment="auto",
    mask_ratio=0.5 if "flip" in words else 0.0,
    teacher="ViT-H-14" if "distill" in words else None,
    valid_batch_size=128,
    valid_gpus=8,
    **pairs(folder, splits=("train", *evals)),
  )
  resnet = size == "RN50"
  return Config(
    name=f"Chinese-CLIP {size} on {name}",
    init=size,
    model=model,
    task=task,
    batch_size=batch_size,
    epochs=epochs,
    seed=123,
    log_every=1,
    save_every=0,
    save_every_epochs=1.0,
    optim=Optim(
      lr=lr,
      b2=0.999 if resnet else 0.98,
      eps=1e-8 if resnet else 1e-6,
      weight_decay=0.001,
      no_decay=cnclip.NO_DECAY_ORIGINAL,
      warmup=warmup,
      clamp=cnclip.LOGIT_SCALE_BOUNDS,
    ),
    mesh=MeshShape(data=1, fsdp=-1) if size == "ViT-H-14" else MeshShape(),
    remat=remat,
    evals=tuple(
      Eval(name=s, task=task, split=s)
      if every is None
      else Eval(name=s, task=task, split=s, every=every, every_epochs=1.0)
      for s, every in evals.items()
    ),
  )


def pairs(folder: str, *, splits: Iterable[str]) -> dict[str, tuple[PairData, ...]]:
  """The files of each split, `SPLIT_imgs.tsv` and `SPLIT_texts.jsonl`, as `Contrastive` takes them.

  Args:
    folder: of the data set, under OFA_JAX_DATA.
    splits: their names.
  """
  data = f"{os.environ.get('OFA_JAX_DATA', 'datasets')}/{folder}"
  return {s: (PairData((f"{data}/{s}_imgs.tsv",), (f"{data}/{s}_texts.jsonl",)),) for s in splits}
