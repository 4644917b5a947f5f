"""Models that judge pictures, on all local devices: Inception v3, OpenAI's CLIP, Chinese-CLIP."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from PIL import Image

from ofa_jax import hub, numerics
from ofa_jax.data import images, judged
from ofa_jax.engine import sharding
from ofa_jax.inference import batches
from ofa_jax.inference.cnclip import preprocess
from ofa_jax.models.abstract import abstract
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.inception import InceptionConfig
from ofa_jax.models.openai_clip import OpenAICLIPConfig
from ofa_jax.scoring.fid import Moments
from ofa_jax.tasks.base import normalized

MAX_BATCH = 64  # rows that one device computes at once


class Judge:
  """A stored model, of which functions are called on rows of arrays.

  Attributes:
    config: its sizes.
  """

  def __init__(
    self,
    source: hub.Source,
    *,
    precision: str = "fp32",
    devices: Sequence[jax.Device] | None = None,
  ):
    """Reads the weights onto the devices.

    Args:
      source: from `hub.open_model`.
      precision: what it computes in; fp32 for numbers that others are to be compared with.
      devices: of this machine; None: all.
    """
    self.config = source.config
    self._source = source
    devices = list(devices or jax.local_devices())
    self._mesh = sharding.make_mesh((len(devices), 1, 1), devices=devices)
    self._matmul = numerics.matmul_precision(precision)
    params, rest = source.load(sharding.replicated(self._mesh))
    self._weights = numerics.cast(params, precision), rest
    self._graph, _, _ = abstract(source.config)
    self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

  def __call__(self, function: Callable[[nnx.Module, Any], Any], rows: Any) -> Any:
    """`function(model, rows)` for a tree of arrays [N, ...], batch by batch; NumPy."""
    if function not in self._compiled:
      self._compiled[function] = jax.jit(
        lambda weights, x: function(nnx.merge(self._graph, *weights), x)
      )
    call = functools.partial(self._compiled[function], self._weights)
    with jax.default_matmul_precision(self._matmul):
      return batches.run(call, rows, mesh=self._mesh, most=MAX_BATCH)

  def texts(self, captions: Sequence[str]) -> np.ndarray:
    """Features float32[N, E] of captions, by a CLIP; those that are too long are cut."""
    tokenizer = self._source.tokenizer
    if isinstance(self.config, OpenAICLIPConfig):
      length = self.config.text.max_positions
      tokens = tokenizer(captions, context_length=length, truncate=True)
    else:
      tokens = tokenizer(captions, context_length=self._source.settings["context_length"])
    return self(encode_text, tokens)


def preparation(config: Any) -> tuple[Callable[[Image.Image], np.ndarray], np.ndarray]:
  """How pictures are made ready on the host for a judge, and an array as it will be.

  Args:
    config: of an Inception v3, an OpenAI CLIP or a Chinese-CLIP.

  Raises:
    ValueError: another model.
  """
  if isinstance(config, InceptionConfig):
    return judged.FOR_FID[config.variant], judged.no_picture(config.variant)
  if isinstance(config, OpenAICLIPConfig):
    size = config.vision.image_size
    return functools.partial(images.cropped, size=size), np.zeros((size, size, 3), np.uint8)
  if isinstance(config, CNCLIPConfig):
    size = config.vision.image_size
    return functools.partial(preprocess, size=size), np.zeros((size, size, 3), np.float32)
  raise ValueError(
    f"Expected an Inception v3 or a CLIP to judge pictures, found {type(config).__name__}"
  )


def encode_image(model: nnx.Module, pictures: jax.Array) -> jax.Array:
  """Features of a CLIP for pictures as `preparation` makes them ready."""
  return model.encode_image(normalized(pictures, mean=images.CLIP_MEAN, std=images.CLIP_STD))


def encode_text(model: nnx.Module, tokens: jax.Array) -> jax.Array:
  """Features of a CLIP for tokens."""
  return model.encode_text(tokens)


def probabilities(model: nnx.Module, pictures: jax.Array) -> jax.Array:
  """What Inception v3 takes pictures for, float32[N, C]."""
  return jax.nn.softmax(model.logits(pictures))


def sum_over_hosts(moments: Moments) -> Moments:
  """The sums over the pictures of all processes, each of which has its own; the same on each."""
  if jax.process_count() == 1:
    return moments
  # As bits: JAX's arrays would be rounded to float32.
  numbers = np.concatenate([[moments.count], moments.total, moments.products.ravel()])
  parts = multihost_utils.process_allgather(np.asarray(numbers, np.float64).view(np.uint32))
  numbers = np.ascontiguousarray(parts).view(np.float64).sum(0)
  width = len(moments.total)
  total, products = numbers[1 : width + 1], numbers[width + 1 :].reshape(width, width)
  return Moments(int(numbers[0]), total, products)


def rows_of_hosts(index: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """The rows of all processes, [N, ...], in the order of their numbers; the same on each.

  Args:
    index: int[n], the numbers of this process's rows, which no other has.
    rows: float32[n, ...].
  """
  if jax.process_count() > 1:
    most = int(multihost_utils.process_allgather(np.int32(len(index))).max())
    missing = most - len(index)
    index = np.pad(np.asarray(index, np.int32), (0, missing), constant_values=-1)
    rows = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
    index, rows = (
      np.asarray(x).reshape(-1, *x.shape[2:])
      for x in multihost_utils.process_allgather((index, np.asarray(rows, np.float32)))
    )
    index, rows = index[index >= 0], rows[index >= 0]
  return rows[np.argsort(index)]
