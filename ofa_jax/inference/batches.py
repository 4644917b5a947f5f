"""Rows through a model on all local devices, batch by batch: the loop of both families."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ofa_jax.engine import sharding

_AHEAD = 2  # batches on their way to the device before the first result is awaited


def run(
  function: Callable[[Any], Any],
  rows: Any,
  *,
  mesh: jax.sharding.Mesh,
  most: int,
  filled: Callable[[Any, int], Any] | None = None,
) -> Any:
  """Calls a compiled function with batches of rows; the next is on its way while one is copied.

  Batches have 1, 2, 4, ... rows for each device, so that little is compiled.

  Args:
    function: (batch on the devices) -> a tree of arrays with as many rows.
    rows: an array or a tree of arrays [N, ...], NumPy, at least one row.
    mesh: of the local devices, which share a batch.
    most: rows that one device computes at once.
    filled: (batch, number) -> the batch with rows added up to a number; None: rows of zeros.

  Returns:
    The function's results [N, ...] for all rows, NumPy.
  """
  number, devices = len(jax.tree.leaves(rows)[0]), mesh.size
  largest = devices * (1 << (max(most, 1).bit_length() - 1))
  place = sharding.batch_sharding(mesh)
  waiting, results = collections.deque(), []
  with jax.set_mesh(mesh):
    for start in range(0, number, largest):
      batch = jax.tree.map(lambda x, start=start: x[start : start + largest], rows)
      size = len(jax.tree.leaves(batch)[0])
      batch = (filled or with_zeros)(batch, padded(size, devices))
      waiting.append(function(jax.device_put(batch, place)))
      if len(waiting) > _AHEAD:
        results.append(jax.device_get(waiting.popleft()))
  results += jax.device_get(list(waiting))
  return jax.tree.map(lambda *x: np.concatenate(x)[:number], *results)


def padded(rows: int, devices: int) -> int:
  """Rows of a batch after padding: a power of two for each device."""
  return devices * bucket(-(-rows // devices), 1)


def bucket(number: int, least: int) -> int:
  """The next power of two."""
  return max(least, 1 << (number - 1).bit_length())


def with_zeros(batch: Any, number: int) -> Any:
  """A batch with rows of zeros added up to a number."""

  def fill(x):
    return np.concatenate([x, np.zeros((number - len(x), *x.shape[1:]), x.dtype)])

  return jax.tree.map(fill, batch)
