"""Fine-tunes a released Chinese-CLIP on Flickr30K-CN by the original's run scripts.

  python -m ofa_jax.train --config=configs/cnclip_flickr30k.py[:MODEL,VARIANT] --workdir=D

MODEL (default: ViT-B-16) and VARIANT (`flip`, `distill`) are those of configs/cnclip_finetune.py.

Data: `Flickr30k-CN/{train,valid,test}_{imgs.tsv,texts.jsonl}` under OFA_JAX_DATA.
Hardware: the original's 8 GPUs with 128 pairs each.

Published for the fine-tuned models, test, text to image | image to text: R@1, R@5, R@10
(the original's script is that of ViT-B-16; those of the others are not public):

  RN50          66.7 89.4 94.1 | 84.2 96.7 98.0
  ViT-B-16      79.1 94.8 97.4 | 93.5 99.0 99.5
  ViT-L-14      82.7 96.7 98.6 | 96.1 99.5 99.9
  ViT-L-14-336  84.4 97.1 98.7 | 96.6 99.8 100.0
  ViT-H-14      83.8 96.9 98.6 | 95.3 99.7 100.0
"""

from ofa_jax.config import Config
from ofa_jax.configs.cnclip_finetune import finetune


def get_config(argument: str = "") -> Config:
  return finetune(
    argument,
    name="Flickr30K-CN",
    folder="Flickr30k-CN",
    batch_size=1024,
    epochs=3,
    lr=5e-5,
    warmup=100,
    evals={"valid": 150, "test": None},
  )
