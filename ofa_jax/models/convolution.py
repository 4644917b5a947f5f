"""Convolutions and pooling of NHWC images, padded as PyTorch's are."""

import functools
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from ofa_jax.models.layers import torch_default


class Conv(nnx.Module):
  """A 2-D convolution of NHWC images, padded by (size - 1) // 2 as PyTorch's are.

  With stride 2 this is not XLA's "SAME", which pads the far side only.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    size: int | tuple[int, int],
    stride: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
    bias: bool = False,
    kernel_init: Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    """Makes kernel [*size, inputs, outputs]; the initialisers are PyTorch's by default.

    `size` is of both sides or (height, width); `padding` is (above, below), (left, right).
    """
    sides = (size, size) if isinstance(size, int) else size
    default = torch_default(math.prod(sides) * inputs)
    self.size, self.stride = size, stride
    self.padding = padding or tuple(((side - 1) // 2,) * 2 for side in sides)
    shape = (*sides, inputs, outputs)
    self.kernel = nnx.Param((kernel_init or default)(rngs.params(), shape, jnp.float32))
    self.bias = nnx.Param(default(rngs.params(), (outputs,), jnp.float32)) if bias else None

  @jax.named_scope("linear")
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, S, S, inputs] to [B, S / stride, S / stride, outputs]."""
    kernel = self.kernel[...]
    height, width = (
      (side + sum(pad) - size) // self.stride + 1
      for side, pad, size in zip(x.shape[1:3], self.padding, kernel.shape[:2], strict=True)
    )
    if self.stride > 1 and max(height, width) < max(kernel.shape[:2]):
      # XLA on a CPU takes thirty times as long for the gradient of so small an image.
      y = self._by_product(x, height, width)
    else:
      y = jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(self.stride, self.stride),
        padding=self.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
    return y if self.bias is None else y + self.bias[...]

  def _by_product(self, x: jax.Array, height: int, width: int) -> jax.Array:
    """The convolution, [B, height, width, outputs], as one matrix product of all windows."""
    kernel = self.kernel[...]
    x = jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
    parts = _parts(x, kernel.shape[:2], self.stride, (height, width))
    return jnp.concatenate(list(parts), axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def max_pool(x: jax.Array, stride: int = 2, pad: int = 1) -> jax.Array:
  """The maximum over windows of 3x3 of x [B, h, w, D], padded by `pad` on every side.

  Of equal values in a window the first has the gradient, as in PyTorch.
  """
  return _reduced(x, stride, pad)


def _reduced(x: jax.Array, stride: int, pad: int) -> jax.Array:
  sides = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  return jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), sides
  )


def _compared(x: jax.Array, stride: int, pad: int) -> jax.Array:
  """The same as comparisons of slices: XLA is ten times as fast with their gradient on a CPU."""
  sides = tuple((side + 2 * pad - 3) // stride + 1 for side in x.shape[1:3])
  x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=-jnp.inf)
  return functools.reduce(
    lambda best, part: jnp.where((part > best) | jnp.isnan(part), part, best),
    _parts(x, (3, 3), stride, sides),
  )


def _parts(
  x: jax.Array, size: tuple[int, int], stride: int, sides: tuple[int, int]
) -> Iterator[jax.Array]:
  """What stands at each place of a window, [B, *sides, D], for windows in all of x."""
  height, width = sides
  for top, left in itertools.product(*map(range, size)):
    yield x[:, top : top + stride * height : stride, left : left + stride * width : stride]


def _pool_forward(x, stride, pad):
  return max_pool(x, stride, pad), x


def _pool_backward(stride, pad, x, gradient):
  def gradient_of(function):
    return lambda x, g: jax.vjp(lambda x: function(x, stride, pad), x)[1](g)

  return jax.lax.platform_dependent(
    x, gradient, cpu=gradient_of(_compared), default=gradient_of(_reduced)
  )


max_pool.defvjp(_pool_forward, _pool_backward)
