"""Fine-tunes a released Chinese-CLIP on MUGE by the original's run scripts.

  python -m ofa_jax.train --config=configs/cnclip_muge.py[:MODEL,VARIANT] --workdir=D

MODEL (default: ViT-B-16) and VARIANT (`flip`, `distill`) are those of configs/cnclip_finetune.py.

Data: `MUGE/{train,valid}_{imgs.tsv,texts.jsonl}` under OFA_JAX_DATA.
Hardware: the original's 8 GPUs with 128 pairs each.

Published for the fine-tuned models, valid, text to image: R@1, R@5, R@10, mean
(the original's script is that of ViT-B-16; those of the others are not public):

  RN50          48.6 75.1 84.0 69.2
  ViT-B-16      58.4 83.6 90.0 77.4
  ViT-L-14      63.3 85.6 91.3 80.1
  ViT-L-14-336  65.3 86.7 92.1 81.3
  ViT-H-14      68.9 88.7 93.1 83.6
"""

from ofa_jax.config import Config
from ofa_jax.configs.cnclip_finetune import finetune


def get_config(argument: str = "") -> Config:
  return finetune(
    argument,
    name="MUGE",
    folder="MUGE",
    batch_size=1024,
    epochs=3,
    lr=5e-5,
    warmup=100,
    evals={"valid": 150},
  )
