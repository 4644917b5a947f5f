"""Building blocks of every model: projections, norms, dropout, and the one way to run a stack.

Modules hold float32 parameters and compute in the dtype their parameters have when they are called
(the train step casts them once); softmax and norm statistics are islands of at least float32 that
return the input's dtype. Randomness is the `rngs` argument: an `nnx.Rngs` at initialisation, a JAX
PRNG key or None at the call, and None means evaluation.

The scopes that operations are named by ("linear", "attention", ...) are for profiles and `cost.py`.

Glossary of axes: B batch, T text, I image tokens, D width, H heads, K head size, V vocabulary,
L layers, E embedding shared by image and text. `mask` is True where something is kept.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.sharding import PartitionSpec as P

from ofa_jax.models.batch_norm import batch_norm
from ofa_jax.numerics import widened
from ofa_jax.trees import BATCH_AXES, join_batch, split_batch

REMAT_POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


# A function whose backward pass computes it again instead of keeping what it has inside: for cheap
# functions of large arrays. In a loop over layers nothing can merge the second computation with the
# first; elsewhere XLA may, which gives up the memory and is as right.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


# Initialisers


def uniform(bound: float) -> Initializer:
  """Returns an initialiser of U(-bound, bound)."""
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_default(fan_in: int) -> Initializer:
  """Returns PyTorch's default for weights and biases of linear and convolution layers.

  `kaiming_uniform_(a=sqrt(5))` of a weight and the uniform of its bias are the same distribution,
  U(-1/sqrt(fan_in), 1/sqrt(fan_in)) (torch.nn.Linear.reset_parameters).
  """
  return uniform(fan_in**-0.5)


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
  """Returns Glorot's uniform initialiser for stated fans (torch.nn.init.xavier_uniform_)."""
  return uniform(math.sqrt(6 / (fan_in + fan_out)))


# Layers


class Linear(nnx.Module):
  """A linear map from the last input axes to new output axes: kernel [*inputs, *outputs]."""

  def __init__(
    self,
    inputs: int | tuple[int, ...],
    outputs: int | tuple[int, ...],
    *,
    bias: bool = True,
    kernel_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    """Makes the parameters; both initialisers default to PyTorch's."""
    inputs = (inputs,) if isinstance(inputs, int) else inputs
    outputs = (outputs,) if isinstance(outputs, int) else outputs
    default = torch_default(math.prod(inputs))
    self.num_inputs = len(inputs)
    self.kernel = nnx.Param((kernel_init or default)(rngs.params(), inputs + outputs, jnp.float32))
    bias_init = bias_init or default
    self.bias = nnx.Param(bias_init(rngs.params(), outputs, jnp.float32)) if bias else None

  @jax.named_scope("linear")
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [..., *inputs] to [..., *outputs]."""
    y = jnp.tensordot(x, self.kernel[...], axes=self.num_inputs)
    return y if self.bias is None else y + self.bias[...]


class Embed(nnx.Module):
  """A table of vectors looked up by integer; unlike nnx.Embed it obeys a cast of its parameters."""

  def __init__(
    self, num: int, dim: int, *, init: Initializer, pad: int | None = None, rngs: nnx.Rngs
  ):
    """Makes embedding [num, dim]; row `pad`, if given, never gets a gradient.

    That is PyTorch's `padding_idx`: the row is initialised, used and decayed like any other.
    """
    self.pad = pad
    self.embedding = nnx.Param(init(rngs.params(), (num, dim), jnp.float32))

  @jax.named_scope("embed")
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens int32[...] to vectors [..., dim], NaN for a token beyond the table."""
    # Lookups in a table that is split over devices would move activations; moving it is less.
    x = jnp.take(replicate(self.embedding[...]), tokens, axis=0, mode="fill")
    if self.pad is None:
      return x
    return jnp.where((tokens == self.pad)[..., None], jax.lax.stop_gradient(x), x)


class LayerNorm(nnx.Module):
  """Layer normalisation over the last axis, statistics in at least float32 (arXiv:1607.06450)."""

  def __init__(self, dim: int, *, eps: float):
    """Makes scale [dim] = 1 and bias [dim] = 0."""
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(dim, jnp.float32))
    self.bias = nnx.Param(jnp.zeros(dim, jnp.float32))

  @jax.named_scope("norm")
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x [..., dim] and returns its dtype."""
    return _layer_norm(x, self.scale[...], self.bias[...], self.eps)


class BatchNorm(nnx.Module):
  """Batch normalisation of NHWC images with PyTorch's running statistics (arXiv:1502.03167).

  In training the batch is the whole global batch: under jit over a mesh the mean is a mean over
  all devices, what PyTorch calls SyncBatchNorm.
  """

  def __init__(
    self,
    dim: int,
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
    zero_scale: bool = False,
    frozen: bool = False,
  ):
    """Makes scale, bias, mean and var [dim]; eps and momentum default to torch.nn.BatchNorm2d's.

    A frozen one (torchvision's FrozenBatchNorm2d) always uses its statistics, and neither these
    nor scale and bias are learnt.
    """
    self.eps, self.momentum, self.frozen = eps, momentum, frozen
    self.scale = nnx.Param(jnp.full(dim, 0.0 if zero_scale else 1.0, jnp.float32))
    self.bias = nnx.Param(jnp.zeros(dim, jnp.float32))
    self.mean = nnx.BatchStat(jnp.zeros(dim, jnp.float32))
    self.var = nnx.BatchStat(jnp.ones(dim, jnp.float32))

  @jax.named_scope("norm")
  def __call__(self, x: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Normalises x [B, S, S, dim]; with `rngs` (training) by the batch, updating mean and var.

    The running variance is updated with the unbiased estimate while the batch is normalised with
    the biased one, as torch.nn.BatchNorm2d does.
    """
    scale, bias = self.scale[...], self.bias[...]
    if self.frozen:
      scale, bias = jax.lax.stop_gradient((scale, bias))
    elif rngs is not None:
      y, mean, var = batch_norm(x, scale, bias, self.eps)
      count = x.size // x.shape[-1]
      self._update(self.mean, mean)
      self._update(self.var, var * (count / max(count - 1, 1)))
      return y
    mean, var = self.mean[...], self.var[...]
    y = widened(x) - mean
    factor = jax.lax.rsqrt(var.astype(y.dtype) + self.eps) * scale
    return (y * factor + bias).astype(x.dtype)

  def _update(self, running: nnx.BatchStat, batch: jax.Array):
    new = (1 - self.momentum) * running[...] + self.momentum * jax.lax.stop_gradient(batch)
    running.set_value(new.astype(running.dtype))


class Mlp(nnx.Module):
  """Two linear layers with an activation between: parameters up [D, M] and down [M, D]."""

  def __init__(
    self,
    width: int,
    hidden: int,
    *,
    activation: Callable[[jax.Array], jax.Array],
    kernel_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    """Makes the parameters; both initialisers default to PyTorch's."""
    init = {"kernel_init": kernel_init, "bias_init": bias_init}
    self.activation = activation
    self.up = Linear(width, hidden, **init, rngs=rngs)
    self.down = Linear(hidden, width, **init, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [..., D] to [..., D]."""
    return self.down(self.activation(self.up(x)))


# Functions


@functools.partial(recomputed, static_argnums=3)
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
  y = widened(x)
  y = y - y.mean(-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
  return (y * scale + bias).astype(x.dtype)


@jax.named_scope("dropout")
def dropout(x: jax.Array, rate: float, *, rngs: jax.Array | None) -> jax.Array:
  """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate); identity without `rngs`."""
  if rngs is None or rate == 0:
    return x
  keep = jax.random.bernoulli(rngs, 1 - rate, x.shape)
  if device_kind().startswith("TPU"):
    # Fused into attention's products, the making of the bits takes longer, by the estimate of TPUs'
    # compiler, and overflows its stack where it has only its own (`engine.tpu_compiler`).
    keep = jax.lax.optimization_barrier(keep)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def device_kind() -> str:
  """Returns the kind of device that is traced for: the current mesh's, or the default one."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def drop_path(x: jax.Array, rate: float | jax.Array | None, *, rngs: jax.Array | None) -> jax.Array:
  """Zeroes x [B, ...] for a share `rate` of the rows and scales the others by 1 / (1 - rate).

  Stochastic depth (arXiv:1603.09382) on the branch of a residual layer; the identity without
  `rngs` or a rate. The rate may be traced, as one of a stack of layers is.
  """
  if rngs is None or rate is None or (isinstance(rate, float) and rate == 0):
    return x
  keep = jax.random.bernoulli(rngs, 1 - rate, (x.shape[0], *[1] * (x.ndim - 1)))
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def drop_path_rates(last: float, num: int) -> tuple[float, ...]:
  """Rates of a stack of layers that grow evenly from 0 to `last`; a single layer has 0."""
  return tuple(last * i / max(num - 1, 1) for i in range(num))


def split_rngs(rngs: jax.Array | None, num: int) -> list[jax.Array | None]:
  """Splits a PRNG key into `num`; without one, returns as many times None."""
  return [None] * num if rngs is None else list(jax.random.split(rngs, num))


@jax.named_scope("activation")
@recomputed
def quick_gelu(x: jax.Array) -> jax.Array:
  """x * sigmoid(1.702 x), the activation of every CLIP ViT."""
  return x * jax.nn.sigmoid(1.702 * x)


@jax.named_scope("activation")
@recomputed
def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, x * Phi(x) by erf (arXiv:1606.08415), not the tanh approximation."""
  return jax.nn.gelu(x, approximate=False)


# Stacks of equal layers

_PART_ROWS = 64  # on a device, of a part of a batch
_MOST_PARTS = 8  # each is written out, and compiled


@dataclasses.dataclass(frozen=True)
class Scan:
  """How a stack of layers is run; never what it computes or how its parameters are laid out.

  Attributes:
    remat: what the backward pass computes again. "none": only what is `recomputed`; "dots":
      everything but the outputs of weight matrices; "full": the whole layer.
    unroll: layers per step of the loop; the depth or more means no loop at all. More is slower to
      compile, and on CPUs to run: XLA then sums the gradient of the residual stream anew in every
      layer of a step.
  """

  remat: Literal["none", "full", "dots"] = "none"
  unroll: int = 1


def stack(make: Callable[[nnx.Rngs], nnx.Module], num: int, *, rngs: nnx.Rngs) -> nnx.Module:
  """Returns one module whose parameters are those of `num` modules along a new first axis.

  Every layer is drawn with its own key, as if made alone.
  """
  return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), num))


def scan_blocks(
  fn: Callable[[Any, jax.Array, jax.Array | None], jax.Array],
  blocks: Any,
  x: jax.Array,
  *,
  scan: Scan,
  rngs: jax.Array | None = None,
  separable: bool = False,
) -> jax.Array:
  """Runs `x = fn(block, x, key)` over a stack of layers.

  Args:
    fn: one layer; `key` is its own PRNG key, None in evaluation.
    blocks: the module made by `stack`, or any tree of it and further per-layer arrays [L, ...];
      `fn` gets the tree with the first axis taken away.
    x: [B, T, D].
    scan: rematerialisation and unrolling.
    rngs: PRNG key, or None in evaluation.
    separable: `fn` makes each row of its result from that row of x and from nothing else that
      differs between rows, such as dropout; then a large batch may run in parts (`num_parts`).
  """
  num = len(jax.tree.leaves(blocks)[0])
  unroll = min(scan.unroll, num)
  parts = num_parts(x) if separable and rngs is None else 1

  def body(xs, layer):
    block, key = layer
    return [shard_batch(fn(block, x, key)) for x in xs], None

  if scan.remat != "none":
    # Inside a loop nothing can merge the second computation with the first; without one, XLA would.
    body = jax.checkpoint(body, policy=REMAT_POLICIES[scan.remat], prevent_cse=unroll == num)
  keys = None if rngs is None else jax.random.split(rngs, num)
  xs = [x] if parts == 1 else list(split_batch(x, parts))
  xs = jax.lax.scan(body, [shard_batch(x) for x in xs], (blocks, keys), unroll=unroll)[0]
  return xs[0] if parts == 1 else shard_batch(join_batch(jnp.stack(xs)))


def num_parts(x: jax.Array) -> int:
  """Parts in which a separable stack of layers runs x [B, T, D], each with rows of all devices.

  With more than some 64 rows a device, the TPU's compiler (libtpu 0.0.42.1) lays rows side by side
  in memory, and then turns queries, keys and values around in every layer. In parts of 64 it does
  not, and a layer reads its weights once for all of them; their gradients are sums over parts, as
  they are over devices. Everywhere else there is one part.
  """
  if not device_kind().startswith("TPU") or not isinstance(x.shape[0], int):
    return 1
  mesh = jax.sharding.get_abstract_mesh()
  rows = x.shape[0] / math.prod(mesh.shape[name] for name in BATCH_AXES if name in mesh.auto_axes)
  parts = rows / _PART_ROWS
  return int(parts) if parts.is_integer() and parts <= _MOST_PARTS else 1


def read_once(module: Any) -> Any:
  """Returns the module with its parameters as they are when read.

  For a loop that would read them at every step: what is split over devices is gathered before it.
  """

  def read(param):
    return param if type(param) is nnx.Param else nnx.Param(param[...])

  return jax.tree.map(read, module, is_leaf=lambda x: isinstance(x, nnx.Param))


def shard_batch(x: jax.Array) -> jax.Array:
  """Splits axis 0 of x over the batch axes of the current mesh; the other axes stay whole.

  The identity without a mesh (`jax.set_mesh`), under shard_map, or if the batch does not divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in BATCH_AXES if name in mesh.auto_axes)
  if not axes or x.shape[0] % math.prod(mesh.shape[name] for name in axes):
    return x
  return jax.lax.with_sharding_constraint(x, P(axes))


def replicate(x: jax.Array) -> jax.Array:
  """Makes x whole on every device of the current mesh; the identity where `shard_batch` is."""
  if not jax.sharding.get_abstract_mesh().auto_axes:
    return x
  return jax.lax.with_sharding_constraint(x, P())
