"""OFA and Chinese-CLIP in JAX.

import ofa_jax

model, preprocess = ofa_jax.load_from_name("ViT-B-16")
features = model.encode_text(ofa_jax.tokenize(["杰尼龟", "妙蛙种子"]))
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from ofa_jax.api import available_models, image_transform, load_from_name, tokenize

__version__ = "0.1.0"
__all__ = ["available_models", "image_transform", "load_from_name", "tokenize"]


def __getattr__(name: str):
  """Imports JAX and the models only when one of the names above is used."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from ofa_jax import api

  return getattr(api, name)


def __dir__() -> list[str]:
  """The names that are imported when they are used, beside those that are there."""
  return sorted({*__all__, *globals()} - {"TYPE_CHECKING"})
