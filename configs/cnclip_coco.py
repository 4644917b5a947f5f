"""Fine-tunes a released Chinese-CLIP on COCO-CN by the original's run scripts.

  python -m ofa_jax.train --config=configs/cnclip_coco.py[:MODEL,VARIANT] --workdir=D

MODEL (default: ViT-B-16) and VARIANT (`flip`, `distill`) are those of configs/cnclip_finetune.py.

Data: `COCO-CN/{train,valid,test}_{imgs.tsv,texts.jsonl}` under OFA_JAX_DATA.
Hardware: the original's 8 GPUs with 1,024 pairs each, layers recomputed.

Published for the fine-tuned models, test, text to image | image to text: R@1, R@5, R@10
(the original's script is that of ViT-B-16; those of the others are not public):

  RN50          66.8 91.1 97.0 | 68.4 93.3 97.8
  ViT-B-16      77.0 97.1 99.0 | 77.4 96.2 98.9
  ViT-L-14      78.9 96.3 99.0 | 80.2 96.7 99.2
  ViT-L-14-336  80.1 96.7 99.2 | 81.2 97.2 99.1
  ViT-H-14      81.5 96.9 99.1 | 83.5 97.3 99.2
"""

from ofa_jax.config import Config
from ofa_jax.configs.cnclip_finetune import finetune


def get_config(argument: str = "") -> Config:
  return finetune(
    argument,
    name="COCO-CN",
    folder="COCO-CN",
    batch_size=8192,
    epochs=20,
    lr=3e-5,
    warmup=6,
    evals={"valid": 0, "test": None},
    remat="full",
  )
