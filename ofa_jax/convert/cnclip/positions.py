"""Position embeddings for images of another size, as the original interpolates them."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from ofa_jax import trees
from ofa_jax.convert.params import placement
from ofa_jax.models.abstract import abstract
from ofa_jax.models.cnclip import CNCLIPConfig

_TEXT = "bert/position/embedding"
_A = -0.75  # PyTorch's bicubic kernel; Pillow's, OpenCV's default and `jax.image` differ


def resize_positions(embedding: np.ndarray, grid: int) -> np.ndarray:
  """Interpolates the positions of a square grid of patches.

  Bicubic without antialiasing, corners aligned to corners, the border repeated: what
  `torch.nn.functional.interpolate(mode="bicubic", align_corners=True)` does in the original's
  `resize_pos_embed`.

  Args:
    embedding: float[1 + G * G, D], the class token's position first.
    grid: patches on a side of the new images.

  Returns:
    float32[1 + grid * grid, D].

  Raises:
    ValueError: the embedding is not of a square grid and a class token.
  """
  old = math.isqrt(max(len(embedding) - 1, 0))
  if old**2 + 1 != len(embedding) or not old:
    raise ValueError(
      f"Expected positions of a class token and a square grid, found {embedding.shape}"
    )
  embedding = np.asarray(embedding, np.float32)
  matrix = _interpolation(old, grid)
  patches = embedding[1:].reshape(old, old, -1)
  patches = np.einsum("yi,xj,ijd->yxd", matrix, matrix, patches, optimize=True)
  return np.concatenate([embedding[:1], patches.reshape(grid * grid, -1)])


def fitted(source: Any, config: Any) -> tuple[Any, list[str]]:
  """The same model with positions for another config's image size and text length.

  Positions of images are interpolated as in the original, of those of texts the first are kept.

  Args:
    source: a `hub.Source`.
    config: sizes with the image size and text positions wanted; whatever else differs stays as it
      is stored.

  Returns:
    The model, and a line on each table of positions that changes.
  """
  target = fit(source.config, config)
  stored, wanted = (trees.flatten(abstract(sizes)[1]) for sizes in (source.config, target))
  changed = {p: len(wanted[p]) for p, x in stored.items() if x.shape != wanted[p].shape}

  def load(shardings=None):
    _, *expected = abstract(target)
    params_places, rest_places = placement(expected, shardings)
    places = trees.flatten(params_places)
    whole = {p: _unsplit(places[p]) for p in changed}
    params, rest = source.load((trees.unflatten(places | whole), rest_places))
    params = trees.flatten(params)
    for path, rows in changed.items():
      resized = resize(path, params[path], rows=rows)
      params[path] = jax.device_put(resized, places[path])
    return trees.unflatten(params), rest

  lines = [f"{p} resized from {len(stored[p])} to {rows} positions" for p, rows in changed.items()]
  return dataclasses.replace(source, config=target, load=load) if changed else source, lines


def fit(stored: CNCLIPConfig, wanted: CNCLIPConfig) -> CNCLIPConfig:
  """The sizes of a stored model after `resize`: another's image size, and at most its text length.

  The image towers must be alike but for that. A text tower gets no new positions, which nothing
  would have taught it.
  """
  vision = dataclasses.replace(wanted.vision, image_size=stored.vision.image_size)
  shortest = min(stored.text.max_positions, wanted.text.max_positions)
  return dataclasses.replace(
    stored,
    vision=wanted.vision if vision == stored.vision else stored.vision,
    text=dataclasses.replace(stored.text, max_positions=shortest),
  )


def resize(path: str, embedding: Any, *, rows: int) -> np.ndarray:
  """Positions of one of our parameters for another number of rows.

  Args:
    path: of the parameter; a text tower's first positions are kept, others are interpolated.
    embedding: float[N, D].
    rows: 1 + grid * grid, or the text positions.
  """
  embedding = np.asarray(embedding)
  return embedding[:rows] if path == _TEXT else resize_positions(embedding, math.isqrt(rows - 1))


def _interpolation(old: int, new: int) -> np.ndarray:
  """float32[new, old]: each new point as a sum of old ones along one axis."""
  at = np.arange(new) * (old - 1) / max(new - 1, 1)
  first = np.floor(at)
  matrix = np.zeros((new, old))
  for tap in range(-1, 3):
    index = np.clip(first + tap, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new), index), _kernel(at - first - tap))
  return matrix.astype(np.float32)


def _kernel(x: np.ndarray) -> np.ndarray:
  """The cubic convolution kernel (Keys, 1981)."""
  x = np.abs(x)
  near = ((_A + 2) * x - (_A + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * _A
  return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _unsplit(place: jax.sharding.Sharding) -> jax.sharding.Sharding:
  """The same devices, each with the whole array."""
  if isinstance(place, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
  return place
