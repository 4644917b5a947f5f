"""Batch normalisation in training (arXiv:1502.03167): statistics of the batch, and its gradient.

Written out because autodiff's gradient sums terms that cancel, each with its own rounding: of a
ResNet's fifty norms in a row little of it would be left to spare (`tests/test_parity.py`).
"""

import functools

import jax
import jax.numpy as jnp

from ofa_jax.numerics import widened


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises x [B, S, S, D] by its own statistics, in at least float32.

  The gradient is the closed form (arXiv:1502.03167, section 3), with the sums that cancel in it
  left out; PyTorch has the same one.

  Args:
    x: float[B, S, S, D].
    scale, bias: float[D], both of one dtype.
    eps: added to the variance.

  Returns:
    x's normalised values in its dtype, and the mean and the biased variance, float32[D], which are
    for keeping and carry no gradient.
  """
  return _batch_norm_forward(x, scale, bias, eps)[0]


def _batch_norm_forward(x, scale, bias, eps):
  y = widened(x)
  mean = _mean(y)
  # Not E[y^2] - E[y]^2: one pass less, but it loses the digits that gradients need.
  var = _mean(jnp.square(y - mean))
  factor = jax.lax.rsqrt(var + eps)
  y = (y - mean) * factor * scale + bias
  return (y.astype(x.dtype), mean, var), (x, mean, factor, scale)


def _batch_norm_backward(eps, saved, gradients):
  del eps
  x, mean, factor, scale = saved
  g = widened(gradients[0])
  y = (widened(x) - mean) * factor
  slope, bias = _mean(g * y), _mean(g)
  count = x.size // x.shape[-1]
  x_gradient = (g - bias - y * slope) * (factor * scale)
  slope, bias = (jnp.asarray(count * s, scale.dtype) for s in (slope, bias))
  return x_gradient.astype(x.dtype), slope, bias


def _mean(x):
  # Axis by axis: of a sum of thousands of float32 in one run, the last digits are lost.
  return x.mean(2).mean(1).mean(0)


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)
