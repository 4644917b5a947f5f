"""The original's text to image on micro models: `golden/ofa/image_gen`."""

import functools
import gzip
import json
import pathlib

import numpy as np
from flax import nnx

from ofa_jax.convert.ofa import table
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa import OFA, OFAConfig
from tests.ofa_golden import rule_state_dict

FOLDER = pathlib.Path(__file__).parent / "golden" / "ofa" / "image_gen"
CONFIG = json.loads(gzip.decompress((FOLDER / "config.json.gz").read_bytes()))
FIRST_CODE = CONFIG["code_start"]


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
  """Those of a file."""
  with np.load(FOLDER / f"{name}.npz") as stored:
    return dict(stored)


@functools.cache
def told(name: str):
  """The contents of a JSON file."""
  return json.loads((FOLDER / f"{name}.json").read_text())


def config(**options) -> OFAConfig:
  """Sizes of the micro OFA, whose vocabulary is the released one."""
  sizes = CONFIG["ofa"]
  return OFAConfig(
    **{
      "width": sizes["encoder_embed_dim"],
      "mlp": sizes["encoder_ffn_embed_dim"],
      "encoder_layers": sizes["encoder_layers"],
      "decoder_layers": sizes["decoder_layers"],
      "heads": sizes["encoder_attention_heads"],
      "stages": (2, 2, 2),
      "vocab_size": CONFIG["vocab"],
      "token_bucket_size": sizes["token_bucket_size"],
      "image_bucket_size": sizes["image_bucket_size"],
      "code_image_size": sizes["code_image_size"],
      "orig_patch_image_size": 64,
      **options,
    }
  )


@functools.cache
def weights(*, long: bool = False):
  """Graph, parameters and rest of the micro OFA, or of the one for 1,024 codes."""
  shapes = {name: tuple(shape) for name, shape in CONFIG["ofa_state_dict"].items()}
  sizes = config()
  if long:
    shapes |= {k: tuple(v) for k, v in CONFIG["long_code_forward"]["changed_shapes"].items()}
    sizes = config(**CONFIG["long_code_forward"]["overrides"])
  return abstract(sizes)[0], *table.from_torch(rule_state_dict(shapes), sizes)


def model(*, long: bool = False) -> OFA:
  """The micro OFA."""
  return nnx.merge(*weights(long=long))
