"""Fine-tunes a released Chinese-CLIP on MUGE by the original's run scripts.

  python -m ofa_jax.train --config=configs/cnclip_muge.py[:MODEL,VARIANT] --workdir=D

MODEL is ViT-B-16 (the default), ViT-L-14, ViT-L-14-336, ViT-H-14 or RN50; VARIANT is `flip`, half
of the image patches left out in training, or `distill`, image features that also follow those of a
teacher. The original's teachers come from ModelScope; here it is the released ViT-H-14, or yours
with --config.task.teacher=M (of the same image size: for ViT-L-14-336 it must be yours).

Data: `MUGE/{train,valid}_{imgs.tsv,texts.jsonl}` under OFA_JAX_DATA, which is
datasets/ where it is not set.
Hardware: the original's 8 GPUs with 128 pairs each.
Here any number of devices gives the same updates, and `accum` makes them fit.

Published for the fine-tuned models, valid, text to image: R@1, R@5, R@10, mean
(the original's script is that of ViT-B-16; those of the others are not public):

  RN50          48.6 75.1 84.0 69.2
  ViT-B-16      58.4 83.6 90.0 77.4
  ViT-L-14      63.3 85.6 91.3 80.1
  ViT-L-14-336  65.3 86.7 92.1 81.3
  ViT-H-14      68.9 88.7 93.1 83.6
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
  data = Path(os.environ.get("OFA_JAX_DATA", "datasets")) / "MUGE"
  files = {
    split: (PairData((f"{data}/{split}_imgs.tsv",), (f"{data}/{split}_texts.jsonl",)),)
    for split in ("train", "valid")
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
    name=f"Chinese-CLIP {name} on MUGE",
    init=name,
    model=model,
    task=task,
    batch_size=1024,
    epochs=3,
    seed=123,
    log_every=1,
    save_every=150,
    optim=Optim(
      lr=5e-5,
      b2=0.999 if resnet else 0.98,
      eps=1e-8 if resnet else 1e-6,
      weight_decay=0.001,
      no_decay=cnclip.NO_DECAY_ORIGINAL,
      warmup=100,
      clamp=cnclip.LOGIT_SCALE_BOUNDS,
    ),
    mesh=MeshShape(data=1, fsdp=-1) if name == "ViT-H-14" else MeshShape(),
    remat="none",
    evals=(Eval(name="valid", task=task, every=150),),
  )
