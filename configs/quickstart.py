"""The embedded default: a small Chinese-CLIP learns handwritten digits from nothing.

  python -m ofa_jax.train --config=configs/quickstart.py --workdir=runs/digits

Real images (scikit-learn's 1,797 scanned digits), Chinese captions, Chinese-CLIP's own file
formats. The data is made once under OFA_JAX_DATA, or the user's cache folder.
"""

import os
from pathlib import Path

from ofa_jax.config import Config, Eval, Optim
from ofa_jax.data import quickstart
from ofa_jax.data.pairs import PairData
from ofa_jax.models.bert import BertConfig
from ofa_jax.models.cnclip import LOGIT_SCALE_BOUNDS, NO_DECAY, CNCLIPConfig
from ofa_jax.models.vit import ViTConfig
from ofa_jax.tasks.contrastive import Contrastive, ZeroShot


def get_config() -> Config:
  data = quickstart.digits(os.environ.get("OFA_JAX_DATA") or Path.home() / ".cache" / "ofa_jax")
  size = {"image_size": 32, "context_length": 16}
  task = Contrastive(
    train=(PairData.of(data, "train"),),
    valid=(PairData.of(data, "valid"),),
    multi_positive=True,
    **size,
  )
  return Config(
    name="quickstart: handwritten digits",
    model=CNCLIPConfig(
      vision=ViTConfig(image_size=32, patch_size=8, width=128, layers=4, head_width=32),
      text=BertConfig(
        width=128, layers=2, heads=4, mlp=512, max_positions=64, dropout=0.0, attention_dropout=0.0
      ),
      embed_dim=64,
    ),
    task=task,
    batch_size=128,
    steps=600,
    log_every=20,
    save_every=50,
    optim=Optim(
      lr=1e-3,
      b2=0.98,
      eps=1e-6,
      weight_decay=0.05,
      no_decay=NO_DECAY,
      warmup=50,
      clip_norm=1.0,
      clamp=LOGIT_SCALE_BOUNDS,
    ),
    precision="fp32",  # what a CPU computes fastest
    evals=(
      Eval(name="valid", task=task, every=50),
      Eval(
        name="valid",
        task=ZeroShot(directory=str(data / "zeroshot"), templates=quickstart.TEMPLATES, **size),
        split="test",
        every=50,
      ),
    ),
  )
