"""Weights, inputs and outputs of the models beside OFA: VQGAN, OpenAI's CLIP, Inception v3.

`golden/ofa/{vqgan,openai_clip,fid_is}` hold what PyTorch's models give with weights that follow a
rule of their names, and the names and shapes of the released ones.
"""

import json
import pathlib
import zlib

import numpy as np
from flax import nnx

from ofa_jax.convert import families
from ofa_jax.models.abstract import abstract
from tests.ofa_golden import golden

__all__ = ["golden"]

DIR = pathlib.Path(__file__).parent / "golden" / "ofa"
LISTS = {
  "vqgan": ("vqgan", "state_dict_vqgan_micro"),
  "vqgan_f8": ("vqgan", "state_dict_vqgan_gumbel_f8_8192"),
  "clip": ("openai_clip", "state_dict_micro"),
  "clip_b16": ("openai_clip", "state_dict_vit_b_16"),
  "torchvision": ("fid_is", "state_dict_torchvision_inception_v3"),
  "pytorch_fid": ("fid_is", "state_dict_pt_inception_2015_12_05"),
}


def golden_json(folder: str, name: str):
  """Contents of `golden/ofa/<folder>/<name>.json`."""
  return json.loads((DIR / folder / f"{name}.json").read_text(encoding="utf-8"))


def state_dict(name: str) -> dict[str, np.ndarray]:
  """The tensors of one of `LISTS`, by the rule of their names."""
  rule = {"vqgan": vqgan_weight, "openai_clip": clip_weight, "fid_is": inception_weight}[
    LISTS[name][0]
  ]
  listed = golden_json(*LISTS[name])["state_dict"]
  return {key: rule(key, tuple(shape)) for key, (shape, _) in listed.items()}


def shapes_of(name: str) -> dict[str, np.ndarray]:
  """Tensors of one of `LISTS` that have a shape and no memory."""
  listed = golden_json(*LISTS[name])["state_dict"]
  dtypes = {"int64": np.int64}
  return {
    key: np.broadcast_to(dtypes.get(dtype, np.float32)(0), shape)
    for key, (shape, dtype) in listed.items()
  }


def model(name: str) -> nnx.Module:
  """The model of one of `LISTS`."""
  return of_tensors(state_dict(name))


def of_tensors(tensors: dict[str, np.ndarray]) -> nnx.Module:
  """The model that these tensors are of."""
  (family,) = [family for family in families.FAMILIES if family.wrote(tensors)]
  config, _ = family.infer(tensors, {})
  return nnx.merge(abstract(config)[0], *family.from_torch(tensors, config))


def vqgan_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A weight of the VQGAN."""
  z = _noise(name, shape)
  if len(shape) == 1:
    return np.float32(0.1 * z if name.endswith("bias") else 1 + 0.1 * z)
  return np.float32(z * np.prod(shape[1:]) ** -0.5)


def clip_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A weight of OpenAI's CLIP."""
  z, last = _noise(name, shape), name.rsplit(".", 1)[-1]
  if last == "logit_scale":
    x = np.log(1 / 0.07) + 0.1 * z
  elif last in ("class_embedding", "positional_embedding") or name == "token_embedding.weight":
    x = 0.5 * z
  elif last in ("proj", "text_projection"):
    x = z * shape[0] ** -0.5
  elif len(shape) == 1:
    x = 0.1 * z if last.endswith("bias") else 1 + 0.1 * z
  else:
    x = z * np.prod(shape[1:]) ** -0.5
  return np.float32(x)


def inception_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A weight of Inception v3."""
  last = name.rsplit(".", 1)[-1]
  if last == "num_batches_tracked":
    return np.array(100, np.int64)
  z = _noise(name, shape)
  if last == "running_mean":
    x = 0.1 * z
  elif last == "running_var":
    x = 1 + 0.2 * np.abs(z)
  elif len(shape) == 1:
    x = 0.1 * z if last == "bias" else 1 + 0.1 * z
  else:
    x = z * ((2 if len(shape) == 4 else 1) / np.prod(shape[1:])) ** 0.5
  return np.float32(x)


def images(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  """The goldens' pictures of a seed, as PyTorch has them, [B, 3, H, W], here with colours last."""
  x = np.tanh(np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)
  return last(x)


def last(x: np.ndarray) -> np.ndarray:
  """[B, C, H, W] with the channels last."""
  return np.moveaxis(x, 1, -1)


def error(found, expected: np.ndarray) -> float:
  """The largest difference, relative to the largest number."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape
  return np.abs(found - expected).max() / np.abs(expected).max()


def _noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
  return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
