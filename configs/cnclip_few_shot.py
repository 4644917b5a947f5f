"""Fine-tunes a Chinese-CLIP on a few pictures of each kind, by LoRA.

  python -m ofa_jax.train --config=configs/cnclip_few_shot.py:MODEL --workdir=D \
    --config.task.train=my.csv [--config.task.valid=my_valid.csv]

MODEL and the data are those of configs/cnclip_custom.py; the caption of a picture may be the name
of its class, for pictures with equal captions are positives of each other. This recipe is for four
to a hundred pictures a class: nothing is trained but what is added to the matrices of attention in
both towers, in factors of rank 2 (0.12 % of ViT-B-16's numbers), so that little can be forgotten.
The rate and the rank follow arXiv 2405.18541, which tunes CLIP so; it is not measured here on its
data sets.

D holds whole models at every step: `evaluate`, `zeroshot` and `extract_features` take it as it is,
and `python -m ofa_jax.convert D OUT --to=torch` (or hf) writes one for PyTorch.
"""

import dataclasses

from ofa_jax.config import Config, Lora
from ofa_jax.configs.cnclip_custom import get_config as custom
from ofa_jax.models.clip_resnet import ResNetConfig


def get_config(model: str = "ViT-B-16") -> Config:
  config = custom(model)
  resnet = isinstance(config.model.vision, ResNetConfig)
  task = dataclasses.replace(config.task, freeze_batch_norm=resnet)
  return dataclasses.replace(
    config,
    name=f"Chinese-CLIP {model} on few pictures",
    task=task,
    epochs=50,
    save_every_epochs=5.0,
    optim=dataclasses.replace(
      config.optim,
      lr=2e-4,
      weight_decay=0.01,
      lora=Lora(matrices=(r"/attn/(qkv|out)/kernel$",), rank=2, alpha=2.0),
    ),
    evals=tuple(dataclasses.replace(e, task=task, every_epochs=5.0) for e in config.evals),
  )
