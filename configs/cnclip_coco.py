"""Fine-tunes a released Chinese-CLIP on COCO-CN by the original's run scripts.

  python -m ofa_jax.train --config=configs/cnclip_coco.py[:MODEL,VARIANT] --workdir=D

MODEL is ViT-B-16 (the default), ViT-L-14, ViT-L-14-336, ViT-H-14 or RN50; VARIANT is `flip`, half
of the image patches left out in training, or `distill`, image features that also follow those of a
teacher. The original's teachers come from ModelScope; here it is the released ViT-H-14, or yours
with --config.task.teacher=M (of the same image size: for ViT-L-14-336 it must be yours).

Data: `COCO-CN/{train,valid,test}_{imgs.tsv,texts.jsonl}` under OFA_JAX_DATA, which is
datasets/ where it is not set.
Hardware: the original's 8 GPUs with 1,024 pairs each, layers recomputed.
Here any number of devices gives the same updates, and `accum` makes them fit.

Published for the fine-tuned models, test, text to image | image to text: R@1, R@5, R@10
(the original's script is that of ViT-B-16; those of the others are not public):

  RN50          66.8 91.1 97.0 | 68.4 93.3 97.8
  ViT-B-16      77.0 97.1 99.0 | 77.4 96.2 98.9
  ViT-L-14      78.9 96.3 99.0 | 80.2 96.7 99.2
  ViT-L-14-336  80.1 96.7 99.2 | 81.2 97.2 99.1
  ViT-H-14      81.5 96.9 99.1 | 83.5 97.3 99.2
"""

import os
from pathlib import Path

from ofa_jax.config import Config, Eval, MeshShape, Optim
from ofa_jax.data.pairs import PairData
from ofa_jax.models import cnclip
from ofa_jax.tasks.contrastive import Contrastive

VARIANTS = ("flip", "distill")


def get_config(argument: str = "") -> Config:
  words = [word for word in argument.split(",") if word]
  unknown = [word for word in words if word not in (*cnclip.MODELS, *VARIANTS)]
  if unknown:
    raise ValueError(
      f"Expected a model out of {', '.join(cnclip.MODELS)} and a variant out of "
      f"{', '.join(VARIANTS)}, found {', '.join(unknown)}"
    )
  name = next((word for word in words if word in cnclip.MODELS), "ViT-B-16")
  model = cnclip.config(*cnclip.MODELS[name])
  data = Path(os.environ.get("OFA_JAX_DATA", "datasets")) / "COCO-CN"
  files = {
    split: (PairData((f"{data}/{split}_imgs.tsv",), (f"{data}/{split}_texts.jsonl",)),)
    for split in ("train", "valid", "test")
  }
  task = Contrastive(
    image_size=model.vision.image_size,
    augment="auto",
    mask_ratio=0.5 if "flip" in words else 0.0,
    teacher="ViT-H-14" if "distill" in words else None,
    **files,
  )
  resnet = name == "RN50"
  return Config(
    name=f"Chinese-CLIP {name} on COCO-CN",
    init=name,
    model=model,
    task=task,
    batch_size=8192,
    epochs=20,
    seed=123,
    log_every=1,
    save_every=20,
    optim=Optim(
      lr=3e-5,
      b2=0.999 if resnet else 0.98,
      eps=1e-8 if resnet else 1e-6,
      weight_decay=0.001,
      no_decay=cnclip.NO_DECAY_ORIGINAL,
      warmup=6,
      clamp=cnclip.LOGIT_SCALE_BOUNDS,
    ),
    mesh=MeshShape(data=1, fsdp=-1) if name == "ViT-H-14" else MeshShape(),
    remat="full",
    evals=(Eval(name="valid", task=task), Eval(name="test", task=task, split="test")),
  )
