"""What `precision` means: the dtype of a computation, and where it must not be below float32.

Parameters are kept in float32 whatever the precision and are cast once on their way into a model.
Norms, softmax and losses are islands that are never narrower than float32. Float64 ("fp64") is for
comparing with another program or machine: what comes out is then not decided by rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp


def cast(params: Any, precision: str) -> Any:
  """Float32 parameters in the compute dtype; narrow ones leave scalars (temperatures) in float32.

  Besides the precisions of runs there is "fp16", which exports are made in.
  """
  if precision == "fp32":
    return params
  narrow = precision != "fp64"
  dtype = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp64": jnp.float64}[precision]
  return jax.tree.map(
    lambda p: p.astype(dtype) if p.dtype == jnp.float32 and (p.ndim or not narrow) else p, params
  )


def widened(x: jax.Array) -> jax.Array:
  """`x` in float32, or in float64 if that is what it is in."""
  return x.astype(wide(x.dtype))


def wide(dtype: Any) -> jnp.dtype:
  """Returns the dtype of sums and exponentials of a `dtype`: float32, or float64 of float64."""
  return jnp.promote_types(dtype, jnp.float32)


def matmul_precision(precision: str) -> str | None:
  """Returns JAX's name for how accelerators multiply: in full, or None for their default."""
  return None if precision == "bf16" else "highest"


def enable(precision: str | None) -> None:
  """Turns on JAX's 64-bit types in this process if the precision needs them; for commands."""
  if precision == "fp64":
    jax.config.update("jax_enable_x64", True)


def check(precision: str, *, platform: str) -> None:
  """Raises ValueError where a computation in this precision is not possible.

  Args:
    precision: "bf16", "fp32" or "fp64".
    platform: of the devices, as JAX names it.
  """
  if precision != "fp64":
    return
  if platform == "tpu":
    raise ValueError("Expected precision fp32 or bf16 on a TPU, which has no float64; found fp64")
  if not jax.config.jax_enable_x64:
    raise ValueError(
      'Expected jax.config.update("jax_enable_x64", True) before anything is loaded, which '
      "precision fp64 needs; found it off"
    )
