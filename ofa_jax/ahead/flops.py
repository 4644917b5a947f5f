"""Floating-point operations of a traced function: its matrix products, counted from the jaxpr.

XLA's own cost analysis counts the body of a loop once; here a body counts as often as it runs. A
multiply-add is two operations; whatever is no matrix product or convolution is not counted.
"""

import math
from typing import Any


def count(jaxpr: Any) -> int:
  """Operations of one call, over all devices.

  A `while` whose trip count is not in the jaxpr counts as one round, of the branches of a `cond`
  the dearest counts.

  Args:
    jaxpr: what `jax.make_jaxpr(fn)(...)` returns, or `.jaxpr` of a traced jit.
  """
  return sum(_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def jaxprs(value: Any) -> list[Any]:
  """The jaxprs in a parameter of an equation, which may be a tuple of branches."""
  values = value if isinstance(value, (tuple, list)) else (value,)
  return [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]


def _equation(eqn):
  name = eqn.primitive.name
  if name == "dot_general":
    return _dot(eqn)
  if name == "conv_general_dilated":
    return _conv(eqn)
  if name.startswith("dot_product_attention"):  # cuDNN's kernels are one equation
    (B, T, H, K), S = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
    return (5 if "bwd" in name else 2) * 2 * B * T * S * H * K
  inner = [count(sub) for value in eqn.params.values() for sub in jaxprs(value)]
  if name == "cond":
    return max(inner)
  if name == "scan":
    return eqn.params["length"] * sum(inner)
  if name == "shard_map":  # its body is what one device does
    mesh, manual = eqn.params["mesh"], eqn.params["newly_manual_axes"]
    return math.prod(mesh.shape[axis] for axis in manual) * sum(inner)
  return sum(inner)


def _dot(eqn):
  left, right = (v.aval.shape for v in eqn.invars)
  (_, contract), (_, batch) = eqn.params["dimension_numbers"]
  columns = math.prod(n for i, n in enumerate(right) if i not in {*contract, *batch})
  return 2 * math.prod(left) * columns


def _conv(eqn):
  kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
  features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  # Zeros put between the inputs (the gradient of a stride) are not multiplied.
  zeros = math.prod(eqn.params["lhs_dilation"]) * eqn.params["batch_group_count"]
  return 2 * math.prod(out) * math.prod(kernel) // features // zeros
