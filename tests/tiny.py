"""Small configs for the tests of the engine, on the quickstart's data."""

import dataclasses

from ofa_jax.config import Config, Eval, Optim
from ofa_jax.data import quickstart
from ofa_jax.data.pairs import PairData
from ofa_jax.models.bert import BertConfig
from ofa_jax.models.clip_resnet import ResNetConfig
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.vit import ViTConfig
from ofa_jax.tasks.contrastive import Contrastive, ZeroShot

BERT = BertConfig(
  width=32, layers=2, heads=4, mlp=64, max_positions=16, dropout=0.0, attention_dropout=0.0
)
MODEL = CNCLIPConfig(
  vision=ViTConfig(image_size=16, patch_size=8, width=32, layers=2, head_width=8),
  text=BERT,
  embed_dim=16,
)
RESNET = CNCLIPConfig(
  vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, head_width=8),
  text=BERT,
  embed_dim=16,
)


def config(data, *, model=MODEL, task=None, evals=False, **changes) -> Config:
  """A run of a few seconds; `data` is the folder that `quickstart.digits` made."""
  size = {"image_size": model.vision.image_size, "context_length": 12}
  contrastive = Contrastive(
    train=(PairData.of(data, "train"),), valid=(PairData.of(data, "valid"),), **size, **(task or {})
  )
  prompts = ZeroShot(directory=str(data / "zeroshot"), templates=quickstart.TEMPLATES, **size)
  base = Config(
    name="tiny",
    model=model,
    task=contrastive,
    batch_size=32,
    steps=6,
    log_every=2,
    save_every=3,
    optim=Optim(lr=1e-3, eps=1e-4, weight_decay=0.1, no_decay=(r"(scale|bias)$",), clip_norm=1.0),
    precision="fp32",
    evals=(
      Eval(name="valid", task=contrastive), Eval(name="valid", task=prompts, split="test")
    ) if evals else (),
  )  # fmt: skip
  return dataclasses.replace(base, **changes)
