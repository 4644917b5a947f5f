"""Runs the files of this folder by JAX, on whatever devices it finds; needs jax and NumPy.

What is given and comes back may stay on the device: arrays of JAX do as well as NumPy's. (JAX reads
such files by the package `flatbuffers`.)
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import export


def load(folder: pathlib.Path, described: Mapping[str, Any]) -> Callable[..., dict[str, jax.Array]]:
  """Makes a part of the model a function of arrays by name; it compiles once for each batch size.

  Args:
    folder: that of the files.
    described: the part in `config.json`.
  """
  program = export.deserialize(bytearray((folder / described["file"]).read_bytes()))
  stored = _weights(folder / "weights.npz") if described["weights"] else {}
  weights = [stored[name] for name in described["weights"]]
  run = jax.jit(program.call)
  names = [x["name"] for x in described["inputs"]]
  results = [x["name"] for x in described["outputs"]]

  def call(**inputs: Any) -> dict[str, jax.Array]:
    return dict(zip(results, run(weights, [inputs[name] for name in names]), strict=True))

  return call


@functools.lru_cache(maxsize=2)  # for all parts of a model
def _weights(path: pathlib.Path) -> dict[str, jax.Array]:
  with np.load(path, allow_pickle=False) as arrays:
    return {name: jax.device_put(arrays[name]) for name in arrays.files}
