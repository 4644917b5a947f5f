"""Weights, inputs and outputs of the PyTorch original for the OFA tests.

All weights follow a rule of their PyTorch name. `golden/ofa/micro` holds outputs of a small model,
`golden/ofa/realsize` parts of the outputs of released sizes.
"""

import dataclasses
import functools
import gzip
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ofa_jax.convert.ofa import table as convert
from ofa_jax.models import ofa
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa import OFA, OFAConfig
from ofa_jax.models.vit import ViTConfig

_DIR = pathlib.Path(__file__).parent / "golden" / "ofa"
WORDS = "encoder.embed_tokens.weight"


def golden(folder: str, name: str) -> dict[str, np.ndarray]:
  """Arrays of `golden/ofa/<folder>/<name>.npz`."""
  with np.load(_DIR / folder / f"{name}.npz") as arrays:
    return dict(arrays)


def golden_json(name: str):
  """Contents of `golden/ofa/<name>.json.gz`."""
  return json.loads(gzip.decompress((_DIR / f"{name}.json.gz").read_bytes()))


def micro_config(**options) -> OFAConfig:
  """Sizes of the micro model."""
  sizes = OFAConfig(
    width=32,
    mlp=64,
    encoder_layers=2,
    decoder_layers=2,
    heads=2,
    stages=(2, 2, 1),
    vocab_size=112,
    num_codes=32,
    num_bins=16,
    token_bucket_size=16,
    image_bucket_size=8,
    code_image_size=32,
    orig_patch_image_size=64,
  )
  return dataclasses.replace(sizes, **options)


def rule_state_dict(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """The state dict of these shapes whose weights follow the rule; buffers are zeros."""
  return {name: rule_weight(name, tuple(shape)) for name, shape in shapes.items()}


def rule_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A weight by its PyTorch name and shape."""
  name = WORDS if name in convert.TIED else name
  last = name.rsplit(".", 1)[-1]
  if last == "num_batches_tracked":
    return np.array(100, np.int64)
  if last.endswith("rp_bucket") or last == "image_position_idx":
    return np.broadcast_to(np.int64(0), shape)
  if last == "version":
    return np.full(shape, 3, np.float32)
  z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  x = (_offset(name, last, shape) + _scale(name, last, shape) * _noise(last, z)).astype(np.float32)
  if name == WORDS:
    x[1], x[2] = 0, np.float32(0.3) * (x[5] + x[25] + x[98])
  return x


def _noise(last: str, z: np.ndarray) -> np.ndarray:
  return np.abs(z) if last == "running_var" else z


def _offset(name: str, last: str, shape: tuple[int, ...]) -> float:
  """Of norms and factors, whose noise is a tenth of it."""
  if len(shape) > 1 or last == "running_mean" or last.endswith("bias"):
    return 0.0
  return 1.0 if last == "running_var" else 10 * _scale(name, last, shape)


def _scale(name: str, last: str, shape: tuple[int, ...]) -> float:
  if last == "running_var":
    return 0.2
  if "rel_pos_table_list" in name:
    return 0.5
  if last == "positional_embedding":
    return 0.5
  if len(shape) == 4:
    # Only the convolutions of a ResNet have the gain of ReLU: not a ViT's patches, nor a VQGAN's.
    gain = 2 if "embed_images." in name and shape[-1] != 16 else 1
    return (gain / np.prod(shape[1:])) ** 0.5
  if len(shape) == 2:
    return (1 / shape[1]) ** 0.5
  if name == "decoder.layer_norm.weight":
    return 0.3
  small = ("decoder.layernorm_embedding.weight", "decoder.code_layernorm_embedding.weight")
  return 0.02 if name in small or (".bn3." in name and last == "weight") else 0.1


@functools.cache
def micro_state_dict(variant: str | None = None) -> dict[str, np.ndarray]:
  """The state dict of the micro model, with the additional weights of a variant."""
  shapes = {name: shape for name, (shape, _) in golden_json("micro/state_dict").items()}
  if variant:
    shapes |= golden_json("micro/variants")[variant]["extra_keys"]
  return rule_state_dict(shapes)


VARIANTS = {
  "adapter": {"adapter": 8},
  "prefix_plain": {"encoder_prompt": 5, "decoder_prompt": 5},
  "prefix_proj": {"encoder_prompt": 5, "decoder_prompt": 4, "prompt_hidden": 16},
  "scale_resids": {"scale_resids": True},
}


def micro_split(variant: str | None = None, **options):
  """Graph definition, parameters and rest of the micro model, or of a variant of it."""
  config = micro_config(**VARIANTS.get(variant, {}), **options)
  return abstract(config)[0], *convert.from_torch(micro_state_dict(variant), config)


def micro_model(variant: str | None = None, **options) -> OFA:
  """The micro model, or a variant of it, with the weights of the rule."""
  return nnx.merge(*micro_split(variant, **options))


def vit_shapes(vit: ViTConfig, prefix: str = "encoder.embed_images.") -> dict[str, tuple[int, ...]]:
  """The tensors of a ViT trunk by their PyTorch names."""
  D, P = vit.width, vit.patch_size
  shapes = {
    "positional_embedding": ((vit.image_size // P) ** 2 + 1, D),
    "conv1.weight": (D, 3, P, P),
    "ln_pre.weight": (D,),
    "ln_pre.bias": (D,),
  }
  for i in range(vit.layers):
    block = {
      "attn.in_proj_weight": (3 * D, D),
      "attn.out_proj.weight": (D, D),
      "mlp.c_fc.weight": (4 * D, D),
      "mlp.c_proj.weight": (D, 4 * D),
      "ln_1.weight": (D,),
      "ln_2.weight": (D,),
    }
    for name, shape in block.items():
      bias = name.removesuffix("weight") + "bias"
      shapes[f"transformer.resblocks.{i}.{name}"] = shape
      shapes[f"transformer.resblocks.{i}.{bias}"] = shape[:1]
  return {prefix + name: shape for name, shape in shapes.items()}


def realsize_model(size: str) -> OFA:
  """A released size whose weights follow the rule."""
  lists = golden_json("realsize/state_dicts")[size]["state_dict"]
  config = ofa.config(size)
  weights = rule_state_dict({name: shape for name, (shape, _) in lists.items()})
  return nnx.merge(abstract(config)[0], *convert.from_torch(weights, config))


def images(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  """Random images in [-1, 1], float32[B, h, w, 3], drawn in PyTorch's order [B, 3, h, w]."""
  x = np.random.default_rng(int(seed)).standard_normal(tuple(shape))
  return np.tanh(x).astype(np.float32).transpose(0, 2, 3, 1)


def inputs(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """The arguments of a stored call, by our names."""
  found = {
    "tokens": arrays["src_tokens"].astype(np.int32),
    "decoder_tokens": arrays["prev_output_tokens"].astype(np.int32),
  }
  if "image_seed" in arrays:
    found["image"] = images(arrays["image_seed"], arrays["image_shape"])
    found["image_mask"] = arrays["patch_masks"]
  if "second_image_seed" in arrays:
    found["second_image"] = images(arrays["second_image_seed"], arrays["second_image_shape"])
  if "code_masks" in arrays:
    found["code_mask"] = arrays["code_masks"]
  return {name: jnp.asarray(x) for name, x in found.items()}


def error(found, expected) -> float:
  """Largest difference, relative to the expected tensor's largest absolute value."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape, (found.shape, expected.shape)
  return float(np.abs(found - expected).max() / np.abs(expected).max())
