"""Parts as StableHLO by `jax.export`: one program for CPUs, GPUs, TPUs and any number of rows."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from ofa_jax import trees
from ofa_jax.exporting.parts import Part, symbolic

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = "weights.npz"
NEEDED = ("flatbuffers",)
_MOST = 2_000_000_000  # bytes of a file: its format counts them in 32 bits


def write(
  parts: Sequence[Part], folder: pathlib.Path, *, dtype: str, inside: bool | None
) -> dict[str, dict[str, Any]]:
  """Writes a file for each part, and the weights that they share; returns what they are.

  Args:
    parts: what to write.
    folder: where to.
    dtype: that of the parts, which say it themselves.
    inside: whether the weights are in the files; None or False: beside, in `WEIGHTS`.

  Raises:
    ValueError: the weights of a part are too large to be inside.
  """
  del dtype
  described, beside = {}, {}
  for part in parts:
    weights = trees.flatten(part.weights)
    weights = {name: weights[name] for name in _read(part)}
    if inside:
      size = sum(x.size * x.dtype.itemsize for x in weights.values())
      if size > _MOST:
        raise ValueError(
          f"Expected at most {_MOST:,} bytes of weights inside a file, found {size:,} of part "
          f"{part.name}; give --weights=beside"
        )
    else:
      beside |= weights
    program = _exported(part, [] if inside else list(weights))
    path = folder / f"{part.name}.stablehlo"
    path.write_bytes(program.serialize())
    described[part.name] = {
      "file": path.name,
      "files": [path.name] if inside else [path.name, WEIGHTS],
      "inputs": [tensor.to_json() for tensor in part.inputs],
      "outputs": [
        {"name": name, "shape": [_dim(n) for n in x.shape], "dtype": x.dtype.name}
        for name, x in zip(part.outputs, program.out_avals, strict=True)
      ],
      "weights": [] if inside else list(weights),
      "platforms": list(PLATFORMS),
    }
  if beside:
    np.savez(folder / WEIGHTS, **{name: np.asarray(x) for name, x in beside.items()})
  return described


def _read(part: Part) -> list[str]:
  """The names of the weights that the part reads."""
  names = list(trees.flatten(part.weights))
  read = _exported(part, names).module_kept_var_idx
  return [name for i, name in enumerate(names) if i in read]


def _exported(part: Part, names: Sequence[str]) -> export.Exported:
  """The program of (the weights of these names, the inputs); other weights are constants in it."""
  weights, tree = trees.flatten(part.weights), jax.tree.structure(part.weights)

  def run(given, inputs):
    filled = weights | dict(zip(names, given, strict=True))
    tensors = {tensor.name: x for tensor, x in zip(part.inputs, inputs, strict=True)}
    found = part.function(tree.unflatten(list(filled.values())), tensors)
    return [found[name] for name in part.outputs]

  given = [jax.ShapeDtypeStruct(weights[name].shape, weights[name].dtype) for name in names]
  return export.export(jax.jit(run), platforms=PLATFORMS)(given, symbolic(part))


def _dim(size: Any) -> int | str:
  return size if isinstance(size, int) else str(size)
