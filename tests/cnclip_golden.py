"""Weights, inputs and outputs of the PyTorch original for the Chinese-CLIP tests.

`golden/cnclip/micro_*` are two small models with random weights; of their word embeddings only the
rows that the goldens' tokens use are kept (the others are zeros here). `golden/cnclip/realsize`
holds outputs of real-size models whose weights follow a rule.

What is called `float64` is of cn_clip 1.6.0 on a model after `.double()` (PyTorch 2.13), its
LayerNorm's cast to float32 taken out: AdamW's five updates and that of two parts as in the float32
files, and in `golden/cnclip/zeroshot_float64` what `zeroshot_evaluation`'s functions make of images
that were normalised in float32, as always.
"""

import functools
import gzip
import json
import pathlib
import zlib

import jax
import numpy as np
from flax import nnx, traverse_util

from ofa_jax.convert.cnclip import table as convert
from ofa_jax.models.bert import BertConfig
from ofa_jax.models.clip_resnet import ResNetConfig
from ofa_jax.models.cnclip import CNCLIP, CNCLIPConfig
from ofa_jax.models.layers import Scan
from ofa_jax.models.vit import ViTConfig

MICRO = ("micro_vit", "micro_rn50")
_DIR = pathlib.Path(__file__).parent / "golden" / "cnclip"


def golden(model: str, name: str) -> dict[str, np.ndarray]:
  """Arrays of `golden/cnclip/<model>/<name>.npz`."""
  with np.load(_DIR / model / f"{name}.npz") as arrays:
    return dict(arrays)


def golden_json(model: str, name: str):
  """Contents of `golden/cnclip/<model>/<name>.json`, or `.json.gz`."""
  path = _DIR / model / f"{name}.json"
  if path.exists():
    return json.loads(path.read_text())
  return json.loads(gzip.decompress(path.with_suffix(".json.gz").read_bytes()))


def golden_lines(folder: str, name: str) -> list[str]:
  """Lines of the text file `golden/cnclip/<folder>/<name>`."""
  return (_DIR / folder / name).read_text().splitlines()


def images(arrays: dict[str, np.ndarray]) -> np.ndarray:
  """The stored images, NHWC."""
  return arrays["images"].transpose(0, 2, 3, 1)


def micro_config(model: str, *, dropout: float = 0.0) -> CNCLIPConfig:
  """Sizes of a micro model; heads cannot be inferred from its tensors."""
  vit = model == "micro_vit"
  text = BertConfig(
    width=32,
    layers=4 if vit else 3,
    heads=4,
    mlp=128,
    max_positions=64,
    dropout=dropout,
    attention_dropout=dropout,
  )
  if vit:
    vision = ViTConfig(image_size=32, patch_size=8, width=48, layers=3, head_width=16)
  else:
    vision = ResNetConfig(image_size=64, layers=(2, 1, 2, 1), width=8)
  return CNCLIPConfig(vision=vision, text=text, embed_dim=24 if vit else 40)


@functools.cache
def micro_state_dict(model: str) -> dict[str, np.ndarray]:
  """The released file's state dict: `module.` before every name, a stale pooler."""
  weights = golden(model, "weights")
  rows, kept = weights.pop("word_rows"), weights.pop("word_embeddings")
  words = np.zeros((21128, kept.shape[1]), np.float32)
  words[rows] = kept
  return {**weights, "module.bert.embeddings.word_embeddings.weight": words}


def abstract(config: CNCLIPConfig, *, scan: Scan = Scan()):  # noqa: B008
  """Graph definition, parameters and rest of a model that is not computed."""
  model = jax.eval_shape(
    lambda: config.build(rngs=nnx.Rngs(0), remat=scan.remat, unroll=scan.unroll)
  )
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def micro_split(model: str, *, dropout: float = 0.0, scan: Scan = Scan()):  # noqa: B008
  """Graph definition, parameters and rest of a micro model with the golden weights."""
  config = micro_config(model, dropout=dropout)
  return abstract(config, scan=scan)[0], *convert.from_torch(micro_state_dict(model), config)


def micro_model(model: str, *, scan: Scan = Scan()) -> CNCLIP:  # noqa: B008
  """A micro model with the golden weights."""
  return nnx.merge(*micro_split(model, scan=scan))


def realsize_model(name: str) -> CNCLIP:
  """A real-size model whose weights follow the goldens' rule."""
  shapes = golden_json("realsize", "state_dicts")[name]["shapes"]
  weights = {key: _rule_weight(key, tuple(shape)) for key, shape in shapes.items()}
  config = convert.infer_config(weights)
  return nnx.merge(abstract(config)[0], *convert.from_torch(weights, config))


def realsize_images() -> np.ndarray:
  """Block-constant noise with a little pixel noise, float32[2, 224, 224, 3]."""
  rng = np.random.default_rng(123)
  x = rng.standard_normal((2, 3, 14, 14)).repeat(16, axis=2).repeat(16, axis=3)
  x = (x + 0.1 * rng.standard_normal((2, 3, 224, 224))).astype(np.float32)
  return x.transpose(0, 2, 3, 1)


def _rule_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
  rng = np.random.default_rng(zlib.crc32(key.encode()))
  if key == "logit_scale":
    return np.asarray(4.0, np.float32)
  if key.endswith("num_batches_tracked"):
    return np.asarray(0, np.int64)
  if key.endswith("running_var"):
    return (0.5 + rng.random(shape)).astype(np.float32)
  x = rng.standard_normal(shape)
  if key.endswith("running_mean"):
    x *= 0.02
  elif len(shape) == 1 and key.endswith("weight"):
    x = 1 + 0.02 * x
  elif len(shape) == 4:
    x *= np.sqrt(2 / np.prod(shape[1:]))
  elif len(shape) == 2 and "embedding" not in key:
    x *= 0.04
  else:
    x *= 0.02
  return x.astype(np.float32)


def error(found, expected) -> float:
  """Largest difference, relative to the expected tensor's largest absolute value."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape, (found.shape, expected.shape)
  return float(np.abs(found - expected).max() / np.abs(expected).max())


def flatten(tree) -> dict[str, np.ndarray]:
  """Leaves of nested dicts by path."""
  return traverse_util.flatten_dict(tree, sep="/")
