"""Pillow's resizing of 8-bit pictures, to the byte, on the device that has drawn them.

Pillow computes in whole numbers: weights of 22 bits, one pass along the rows and one along the
columns, each rounded to a byte. So do these functions, and what is drawn need not visit the host to
be judged as the originals' scripts judge it.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax.data.images import CLIP_MEAN, CLIP_STD

_BITS = 32 - 8 - 2  # of the weights (Pillow's Resample.c: PRECISION_BITS)

Kind = Literal["bilinear", "bicubic", "lanczos"]


def resize(image: jax.Array, size: tuple[int, int], *, kind: Kind) -> jax.Array:
  """Resizes RGB pictures as `PIL.Image.resize` does.

  Args:
    image: uint8[B, H, W, 3].
    size: height and width.
    kind: Pillow's filter, which is widened where the picture becomes smaller.

  Returns:
    uint8[B, *size, 3].
  """
  x = image.astype(jnp.int32)
  if size[1] != x.shape[2]:
    x = _along(x, size[1], axis=2, kind=kind)
  if size[0] != x.shape[1]:
    x = _along(x, size[0], axis=1, kind=kind)
  return x.astype(jnp.uint8)


def clip_input(image: jax.Array, *, size: int) -> jax.Array:
  """Prepares RGB pictures for OpenAI's CLIP as `data.images.cropped` does.

  The shorter side is resized, bicubic; the middle is cut out; colours are normalised.

  Args:
    image: uint8[B, H, W, 3].
    size: side in pixels that the model takes.

  Returns:
    float32[B, size, size, 3].
  """
  height, width = image.shape[1:3]
  longer = int(size * max(height, width) / min(height, width))
  height, width = (size, longer) if height < width else (longer, size)
  x = resize(image, (height, width), kind="bicubic")
  top, left = round((height - size) / 2), round((width - size) / 2)
  x = x[:, top : top + size, left : left + size].astype(jnp.float32) / 255.0
  return (x - jnp.asarray(CLIP_MEAN, jnp.float32)) / jnp.asarray(CLIP_STD, jnp.float32)


def _along(x: jax.Array, new: int, *, axis: int, kind: Kind) -> jax.Array:
  """One pass: int32 of bytes with `new` pixels along an axis."""
  places, weights = _taps(x.shape[axis], new, kind)
  shape = [1] * x.ndim
  shape[axis] = new
  total = jnp.int32(1 << (_BITS - 1))
  for place, weight in zip(places.T, weights.T, strict=True):
    total += jnp.take(x, place, axis=axis) * weight.reshape(shape)
  return jnp.clip(total >> _BITS, 0, 255)


@functools.lru_cache(maxsize=32)
def _taps(old: int, new: int, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
  """Which pixels each new pixel is a sum of, int32[new, taps], and their weights."""
  function, support = _FILTERS[kind]
  scale = old / new
  wide = max(scale, 1.0)
  support *= wide
  taps = math.ceil(support) * 2 + 1
  places, weights = np.zeros((new, taps), np.int32), np.zeros((new, taps), np.int32)
  for i in range(new):
    center = (i + 0.5) * scale
    first = max(int(center - support + 0.5), 0)
    last = min(int(center + support + 0.5), old)
    exact = [function((x - center + 0.5) * (1.0 / wide)) for x in range(first, last)]
    total = 0.0
    for weight in exact:  # not `sum`, whose rounding depends on Python's version
      total += weight
    for tap, weight in enumerate(exact):
      weight = weight / total * (1 << _BITS)
      weights[i, tap] = int(weight - 0.5 if weight < 0 else weight + 0.5)
    places[i] = np.minimum(first + np.arange(taps), old - 1)
  return places, weights


def _triangle(x: float) -> float:
  return max(1.0 - abs(x), 0.0)


def _cubic(x: float) -> float:
  """Keys' kernel with a = -0.5."""
  x = abs(x)
  if x < 1:
    return (1.5 * x - 2.5) * x * x + 1
  return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def _lanczos(x: float) -> float:
  return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


def _sinc(x: float) -> float:
  return 1.0 if x == 0 else math.sin(x * math.pi) / (x * math.pi)


_FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
  "bilinear": (_triangle, 1.0),
  "bicubic": (_cubic, 2.0),
  "lanczos": (_lanczos, 3.0),
}
