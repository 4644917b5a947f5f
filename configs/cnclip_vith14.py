"""Fine-tunes Chinese-CLIP ViT-H-14 (958M parameters) on MUGE.

  python -m ofa_jax.train --config=configs/cnclip_vith14.py --workdir=D

Weights: the released ones, which are downloaded and converted where they are not yet; on a cluster
give a model directory that all hosts see, --config.init=gs://BUCKET/models/ViT-H-14.
Data: `MUGE/{train,valid}_{imgs.tsv,texts.jsonl}` under OFA_JAX_DATA (default: datasets/).
Recipe: the original's MUGE script for ViT-B-16, at this size; those of the published ViT-H-14 are
not public. Published text-to-image recall on MUGE's validation pool, fine-tuned: R@1 68.9,
R@5 88.7, R@10 93.1, mean 83.6 (zero-shot: 63.0, 84.1, 89.2, 78.8).

  :pod   a batch of 32,768 split over all chips, parameters over 16 of them
"""

from ofa_jax.config import Config, Eval, MeshShape, Optim
from ofa_jax.configs.cnclip_finetune import pairs
from ofa_jax.models import cnclip
from ofa_jax.tasks.contrastive import Contrastive

VARIANTS = ("", "pod")


def get_config(variant: str = "") -> Config:
  if variant not in VARIANTS:
    raise ValueError(f"Expected one of the variants {VARIANTS}, found {variant!r}")
  pod = variant == "pod"
  task = Contrastive(
    image_size=224,
    augment="auto",
    valid_batch_size=128,
    valid_gpus=8,
    **pairs("MUGE", splits=("train", "valid")),
  )
  return Config(
    name="Chinese-CLIP ViT-H-14 on MUGE",
    init="ViT-H-14",
    model=cnclip.config(*cnclip.MODELS["ViT-H-14"]),
    task=task,
    batch_size=32_768 if pod else 1024,
    epochs=3,
    log_every=10,
    save_every=0,
    save_every_epochs=1.0,
    optim=Optim(
      lr=5e-5,
      b2=0.98,
      eps=1e-6,
      weight_decay=0.001,
      no_decay=cnclip.NO_DECAY,
      warmup=100,
      clamp=cnclip.LOGIT_SCALE_BOUNDS,
    ),
    mesh=MeshShape(data=-1, fsdp=16) if pod else MeshShape(data=1, fsdp=-1),
    remat="full" if pod else "dots",
    evals=(Eval(name="valid", task=task, every=150, every_epochs=1.0),),
  )
