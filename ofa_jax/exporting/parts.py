"""What is exported of a model: named functions of arrays, each of which becomes a file."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from ofa_jax import trees

DTYPES = ("fp32", "fp16")
BATCHES = (1, 3, 8)  # rows at which an export is compared with the model
# The largest difference that is allowed, as a share of the output's largest number. In fp16 it is
# from the model in fp32: eleven bits of every number, rounded in every layer.
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """An input of a part.

  Attributes:
    name: it is given by.
    shape: a letter stands for any number; equal letters for equal numbers.
    dtype: of NumPy.
  """

  name: str
  shape: tuple[int | str, ...]
  dtype: type[np.generic]

  def to_json(self) -> dict[str, Any]:
    """As `config.json` has it."""
    return {"name": self.name, "shape": list(self.shape), "dtype": np.dtype(self.dtype).name}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A function that becomes a file.

  Attributes:
    name: of the part and of its file.
    function: `(weights, inputs by name) -> outputs by name`, traceable, for any number of rows.
    weights: nested dicts of arrays, in the dtype that is computed in; what the function does not
      read is left out of the files.
    inputs: by which it is called.
    outputs: their names.
    examples: `(rows, seed) -> inputs by name, NumPy`, drawn at random, for comparisons.
    reference: what the outputs are compared with, a function of the inputs by name.
  """

  name: str
  function: Callable[[trees.Tree, Mapping[str, jax.Array]], Mapping[str, jax.Array]]
  weights: trees.Tree
  inputs: tuple[Tensor, ...]
  outputs: tuple[str, ...]
  examples: Callable[[int, int], dict[str, np.ndarray]]
  reference: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def symbolic(part: Part) -> list[jax.ShapeDtypeStruct]:
  """The inputs of a part, letters as symbolic sizes."""
  scope = export.SymbolicScope()
  made = []
  for tensor in part.inputs:
    text = ",".join(map(str, tensor.shape))
    shape = export.symbolic_shape(text, scope=scope) if text else ()
    made.append(jax.ShapeDtypeStruct(shape, tensor.dtype))
  return made


def check(
  part: Part, call: Callable[..., Mapping[str, Any]], *, tolerance: float, batches=BATCHES
) -> float:
  """Compares an export with the model at several numbers of rows; returns the largest difference.

  Args:
    part: what was exported.
    call: the export, as `runtime.load` gives it.
    tolerance: the largest difference that is allowed, as a share of an output's largest number.
    batches: numbers of rows.

  Raises:
    ValueError: an output is further off, or not finite, or of another shape or type.
  """
  worst = 0.0
  for seed, rows in enumerate(batches):
    given = part.examples(rows, seed)
    found, expected = call(**given), part.reference(given)
    for name in part.outputs:
      ours, theirs = np.asarray(expected[name]), np.asarray(found[name])
      if ours.shape != theirs.shape or (ours.dtype == bool) != (theirs.dtype == bool):
        raise ValueError(
          f"Expected {name} of part {part.name} to be {ours.dtype} {ours.shape}, found "
          f"{theirs.dtype} {theirs.shape} in the export, which was not kept"
        )
      off = difference(theirs, ours)
      if not off <= tolerance:
        raise ValueError(
          f"Expected {name} of part {part.name} to be the model's within {tolerance:g} of its "
          f"largest number, found {off:.2g} at {rows} rows; the export was not kept. Larger models "
          "round more: --tolerance allows another difference"
        )
      worst = max(worst, off)
  return worst


def difference(found: np.ndarray, expected: np.ndarray) -> float:
  """The largest difference, as a share of the largest expected number; NaN: one is not finite."""
  found, expected = np.float64(found), np.float64(expected)
  if not np.isfinite(found).all():
    return float("nan")
  return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def chosen(parts: Sequence[str] | None, known: Sequence[str], *, default: Sequence[str]) -> list:
  """The names of the parts to export, in their own order.

  Raises:
    ValueError: one is unknown, or there is none.
  """
  if parts is None:
    return list(default)
  unknown = [name for name in parts if name not in known]
  if unknown or not parts:
    raise ValueError(
      f"Expected --parts out of {', '.join(known)}, found {', '.join(unknown) or 'none'}"
    )
  return [name for name in known if name in parts]
