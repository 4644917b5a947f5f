"""A traced program evaluated operation by operation, as converters to other formats need it.

Functions within functions are put in their place, loops over layers are written out, and what does
not depend on the inputs, such as the biases of positions, is computed now and becomes a constant.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# Operations that are programs themselves, by the parameter that holds them.
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_CALLS = (
  "jit",
  "pjit",
  "closed_call",
  "remat2",
  "checkpoint",
  "custom_jvp_call",
  "custom_vjp_call",
)


def written_out(program: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
  """Evaluates a program whose inputs may be traced.

  Args:
    program: from `jax.make_jaxpr`.
    consts: the values of its constants.
    inputs: of its inputs.

  Returns:
    The values of its outputs.
  """
  values: dict[core.Var, Any] = dict(zip(program.constvars, consts, strict=True))
  values |= zip(program.invars, inputs, strict=True)

  def read(var):
    literal = isinstance(var, core.Literal)
    return np.asarray(var.val, var.aval.dtype) if literal else values[var]

  for eqn in _needed(program):
    given = [read(var) for var in eqn.invars]
    name = eqn.primitive.name
    if name == "scan":
      found = _scan(eqn.params, given)
    elif name == "reduce_window_max":
      found = [_pooled(*given, eqn.params)]
    elif name in _CALLS:
      inner, constants = _inner(eqn.params)
      found = written_out(inner, constants, given)
    else:
      with jax.ensure_compile_time_eval() if _is_known(eqn, given) else contextlib.nullcontext():
        found = eqn.primitive.bind(*given, **eqn.params)
      found = found if eqn.primitive.multiple_results else [found]
    values |= zip(eqn.outvars, found, strict=True)
  return [read(var) for var in program.outvars]


def _needed(program: core.Jaxpr) -> list[core.JaxprEqn]:
  """The operations that an output depends on."""
  needed = {var for var in program.outvars if not isinstance(var, core.Literal)}
  kept = []
  for eqn in reversed(program.eqns):
    if needed.intersection(eqn.outvars):
      kept.append(eqn)
      needed.update(var for var in eqn.invars if not isinstance(var, core.Literal))
  return kept[::-1]


def _is_known(eqn: core.JaxprEqn, given: Sequence[Any]) -> bool:
  """Whether an operation depends on no input and on no symbolic number of rows."""
  if eqn.primitive.name == "dim_as_value" or any(isinstance(x, jax.core.Tracer) for x in given):
    return False
  return all(isinstance(n, int) for var in eqn.outvars for n in var.aval.shape)


def _scan(params: dict[str, Any], given: Sequence[Any]) -> list[Any]:
  """A loop without a loop."""
  inner, constants = _inner(params)
  fixed, carried = params["num_consts"], params["num_carry"]
  consts, carry, rows = given[:fixed], given[fixed : fixed + carried], given[fixed + carried :]
  order = range(params["length"])
  outputs: dict[int, list[Any]] = {}
  for i in reversed(order) if params["reverse"] else order:
    found = written_out(inner, constants, [*consts, *carry, *(_row(x, i) for x in rows)])
    carry, outputs[i] = found[:carried], found[carried:]
  stacked = [jnp.stack(column) for column in zip(*(outputs[i] for i in order), strict=True)]
  return [*carry, *stacked]


def _pooled(x: jax.Array, params: dict[str, Any]) -> jax.Array:
  """The maximum over windows, axis by axis: pooling that counts rows and channels among the axes of
  a window is more than ONNX Runtime has.

  Raises:
    ValueError: windows have holes, or may lie in the padding alone.
  """
  if any(n != 1 for kind in ("base_dilation", "window_dilation") for n in params[kind]):
    raise ValueError("Expected pooling without dilation to export, found windows with holes")
  sides = zip(params["window_dimensions"], params["window_strides"], params["padding"], strict=True)
  for axis, (size, stride, (low, high)) in enumerate(sides):
    if not (0 <= low < size and 0 <= high < size):
      raise ValueError(
        f"Expected pooling whose padding is narrower than its windows to export, found {size} rows "
        f"with a padding of {low} and {high}"
      )
    if size == stride == 1 and low == high == 0:
      continue
    # Windows over the border hold its row, so that it may stand there twice.
    first, end = (jax.lax.slice_in_dim(x, i, i + 1, 1, axis) for i in (0, x.shape[axis] - 1))
    x = jnp.concatenate([first] * low + [x] + [end] * high, axis)
    last = x.shape[axis] - size  # where the last window may begin
    parts = [jax.lax.slice_in_dim(x, i, last + i + 1, stride, axis) for i in range(size)]
    x = functools.reduce(jnp.maximum, parts)
  return x


def _row(x: Any, i: int) -> Any:
  return x[i] if isinstance(x, jax.core.Tracer) else np.asarray(x)[i]


def _inner(params: dict[str, Any]) -> tuple[core.Jaxpr, Sequence[Any]]:
  inner = next(params[name] for name in _INNER if name in params)
  return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())
