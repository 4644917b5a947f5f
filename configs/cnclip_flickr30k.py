"""Fine-tunes a released Chinese-CLIP on Flickr30K-CN by the original's run scripts.

  python -m ofa_jax.train --config=configs/cnclip_flickr30k.py[:MODEL,VARIANT] --workdir=D

MODEL is ViT-B-16 (the default), ViT-L-14, ViT-L-14-336, ViT-H-14 or RN50; VARIANT is `flip`, half
of the image patches left out in training, or `distill`, image features that also follow those of a
teacher. The original's teachers come from ModelScope; here it is the released ViT-H-14, or yours
with --config.task.teacher=M (of the same image size: for ViT-L-14-336 it must be yours).

Data: `Flickr30k-CN/{train,valid,test}_{imgs.tsv,texts.jsonl}` under OFA_JAX_DATA, which is
datasets/ where it is not set.
Hardware: the original's 8 GPUs with 128 pairs each.
Here any number of devices gives the same updates, and `accum` makes them fit.

Published for the fine-tuned models, test, text to image | image to text: R@1, R@5, R@10
(the original's script is that of ViT-B-16; those of the others are not public):

  RN50          66.7 89.4 94.1 | 84.2 96.7 98.0
  ViT-B-16      79.1 94.8 97.4 | 93.5 99.0 99.5
  ViT-L-14      82.7 96.7 98.6 | 96.1 99.5 99.9
  ViT-L-14-336  84.4 97.1 98.7 | 96.6 99.8 100.0
  ViT-H-14      83.8 96.9 98.6 | 95.3 99.7 100.0
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
  data = Path(os.environ.get("OFA_JAX_DATA", "datasets")) / "Flickr30k-CN"
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
    name=f"Chinese-CLIP {name} on Flickr30K-CN",
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
    evals=(Eval(name="valid", task=task, every=150), Eval(name="test", task=task, split="test")),
  )
