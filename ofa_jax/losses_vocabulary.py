"""What the losses of sequences need of each token: from logits, or from what these are products of.

Over 59,457 words the logits of a batch are the largest array of its loss, and its gradient makes
them three times. As `InBlocks` they never exist: states are multiplied by some of the words at a
time, the logarithm of all exponentials' sum goes along, and the gradient multiplies them again.
That is a fourth product beside the three of whole logits, for which it moves far less.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from ofa_jax.numerics import wide, widened

_LEAST = 1e-5  # of 1 - p in the encouraging loss
_TILE = 128  # a TPU's; blocks that are larger are multiples of it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InBlocks:
  """Logits [..., V] that are computed some words at a time.

  Attributes:
    hidden: float[..., D], states.
    table: float[V, D], whole on every device; `hidden @ table.T` are the logits.
    blocks: in so many parts, of equal sizes.
  """

  hidden: jax.Array
  table: jax.Array
  blocks: int = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.hidden.shape[:-1], self.table.shape[0])


class Told(NamedTuple):
  """Of each token, in at least float32.

  Attributes:
    own: float[...], the log-probability of the target.
    total: float[...], the sum of those of all allowed ids.
    likeliest: bool[...], whether no id has a higher one.
  """

  own: jax.Array
  total: jax.Array
  likeliest: jax.Array


class Costs(NamedTuple):
  """Of each token, float[B, T].

  Attributes:
    nll: -lp of the target y.
    loss: the same with label smoothing, (1 - s - s_i) * -lp[y] + s_i * -(sum of lp).
    hit: bool[B, T], whether the likeliest id is the target.
    lprobs: lp, float[B, T, V], 0 where not allowed; None in blocks.
  """

  nll: jax.Array
  loss: jax.Array
  hit: jax.Array
  lprobs: jax.Array | None


def costs(
  logits: jax.Array | InBlocks,
  targets: jax.Array,
  *,
  conf: jax.Array | None = None,
  allowed: jax.Array | None = None,
  smoothing: float = 0.0,
) -> Costs:
  """What each token costs.

  Args:
    logits: float[B, T, V].
    targets: int32[B, T].
    conf: float[B], which multiplies the log-probabilities of a row. None: all ones.
    allowed: bool[V] or bool[B, T, V], the ids that have a probability. None: all.
    smoothing: s; s_i = s / (allowed ids - 1).
  """
  size = logits.shape[-1]
  share = smoothing / (size - 1)
  if allowed is not None:
    share = smoothing / (jnp.sum(allowed, axis=-1) - 1 + 1e-6)  # the original's epsilon
  if isinstance(logits, InBlocks):
    own, total, hit = told(logits, targets, allowed=allowed)
    if conf is not None:
      own, total = (x * widened(conf)[:, None] for x in (own, total))
    nll, lprobs = -own, None
  else:
    hit = jnp.argmax(_masked(logits, allowed), axis=-1) == targets
    lprobs = jax.nn.log_softmax(_masked(widened(logits), allowed))
    if conf is not None:
      lprobs = lprobs * widened(conf)[:, None, None]
    nll = -jnp.take_along_axis(lprobs, targets[..., None], axis=-1).squeeze(-1)
    if allowed is not None:
      lprobs = jnp.where(allowed, lprobs, 0.0)
    total = jnp.sum(lprobs, axis=-1) if smoothing else None
  loss = (1 - smoothing - share) * nll - share * total if smoothing else nll
  return Costs(nll, loss, hit, lprobs)


def told(logits: InBlocks, targets: jax.Array, *, allowed: jax.Array | None = None) -> Told:
  """What whole logits would tell of each target.

  Args:
    logits: of any axes before the words'.
    targets: int32, of the same axes.
    allowed: bool, broadcastable to the logits: the ids that have a probability. None: all.
  """
  return Told(*_told(logits.hidden, logits.table, targets, allowed, logits.blocks))


def bonus(
  lprobs: jax.Array,
  targets: jax.Array,
  allowed: jax.Array | None,
  *,
  smoothing: float,
  log_end: float,
) -> jax.Array:
  """What the encouraging loss adds to each token's, float32[B, T]; `lprobs` as of `costs`."""
  p = jnp.exp(lprobs) if allowed is None else jnp.where(allowed, jnp.exp(lprobs), 0.0)
  of_id = jnp.log(jnp.maximum(1 - p, _LEAST))
  if log_end != 1:
    line = (log_end - p) / (1 - log_end) + math.log(1 - log_end)
    of_id = jnp.where(p > log_end, line, of_id)
  own = jnp.take_along_axis(of_id, targets[..., None], axis=-1).squeeze(-1)
  return (1 - smoothing) * own + smoothing * jnp.mean(of_id, axis=-1)


def cheapest(loss: jax.Array, keep: jax.Array, *, share: float) -> jax.Array:
  """bool[B, T], True for the int(N * share) of the N kept tokens that cost least."""
  flat = jnp.where(keep, jax.lax.stop_gradient(loss), jnp.inf).reshape(-1)
  rank = jnp.argsort(jnp.argsort(flat))
  # By table, because the product in float32 is not always that of Python.
  numbers = jnp.asarray(np.floor(np.arange(flat.size + 1) * share), jnp.int32)
  return (rank < numbers[jnp.sum(keep)]).reshape(keep.shape)


def _masked(logits, allowed):
  return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Kept:
  """What the gradient needs: the inputs, the highest logit, the log of the sum above it."""

  hidden: jax.Array
  table: jax.Array
  targets: jax.Array
  allowed: jax.Array | None
  high: jax.Array
  log_sum: jax.Array
  of_hidden: bool = dataclasses.field(metadata={"static": True})  # whether it has a gradient
  of_table: bool = dataclasses.field(metadata={"static": True})


class _Block(NamedTuple):
  """Some words: their rows of the table, ids, logits, and which of them count here."""

  rows: jax.Array
  ids: jax.Array
  logits: jax.Array
  seen: jax.Array


def _size(words: int, blocks: int) -> int:
  """Words of a block; there may be fewer blocks than were asked for."""
  size = -(-words // blocks)
  return min(words, -(-size // _TILE) * _TILE if size > _TILE else size)


def _block(hidden, table, allowed, number, *, size) -> _Block:
  """The block of this number; the last has words of the one before, which do not count again."""
  words = table.shape[0]
  first = jnp.minimum(number * size, words - size)
  rows = jax.lax.dynamic_slice_in_dim(table, first, size)
  ids = first + jnp.arange(size)
  seen = ids >= number * size
  if allowed is not None:
    seen &= jax.lax.dynamic_slice_in_dim(allowed, first, size, axis=-1)
  with jax.named_scope("linear"):
    logits = jnp.einsum("...d,vd->...v", hidden, rows, preferred_element_type=wide(hidden.dtype))
  return _Block(rows, ids, logits, seen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _told(hidden, table, targets, allowed, blocks):
  return _forward(hidden, table, targets, allowed, blocks)[0]


def _forward(hidden, table, targets, allowed, blocks):
  """(own, total, likeliest), and what the gradient needs: the highest logit, log of the sum."""
  size, shape, dtype = _size(table.shape[0], blocks), hidden.shape[:-1], wide(hidden.dtype)

  def body(carry, number):
    high, above, own, total, best = carry
    block = _block(hidden, table, allowed, number, size=size)
    logits = jnp.where(block.seen, block.logits, -jnp.inf)
    highest = jnp.max(logits, axis=-1)
    best = jnp.where(highest > high, block.ids[jnp.argmax(logits, axis=-1)], best)
    highest = jnp.maximum(high, highest)
    # Sums are of what is above zero there: no digits are lost to where the logits lie.
    zero = jnp.where(jnp.isneginf(highest), 0.0, highest)
    above = above * jnp.exp(high - zero) + jnp.sum(jnp.exp(logits - zero[..., None]), axis=-1)
    mine = (block.ids == targets[..., None]) & (block.ids >= number * size)
    own += jnp.sum(jnp.where(mine, logits, 0.0), axis=-1)
    total += jnp.sum(jnp.where(block.seen, block.logits, 0.0), axis=-1)
    return (highest, above, own, total, best), None

  zeros = jnp.zeros(shape, dtype)
  start = (jnp.full(shape, -jnp.inf, dtype), zeros, zeros, zeros, jnp.zeros(shape, jnp.int32))
  numbers = jnp.arange(-(-table.shape[0] // size))
  (high, above, own, total, best), _ = jax.lax.scan(body, start, numbers)
  log_sum = jnp.log(above)
  number = _number(table, allowed)
  outputs = (own - high) - log_sum, total - number * (high + log_sum), best == targets
  return outputs, (high, log_sum)


def _number(table, allowed):
  """How many ids are allowed, a number or one of each token."""
  return table.shape[0] if allowed is None else jnp.sum(allowed, axis=-1)


def _told_forward(*arguments):
  *arrays, blocks = arguments
  hidden, table, *_ = arrays
  trained = {"of_hidden": hidden.perturbed, "of_table": table.perturbed}
  arrays = custom_vjp_primal_tree_values(tuple(arrays))
  outputs, sums = _forward(*arrays, blocks)
  return outputs, _Kept(*arrays, *sums, **trained)


def _told_backward(blocks, kept, gradients):
  hidden, table, targets, allowed = kept.hidden, kept.table, kept.targets, kept.allowed
  size, dtype = _size(table.shape[0], blocks), wide(hidden.dtype)
  of_own, of_total = (
    jnp.zeros((), dtype) if isinstance(g, SymbolicZero) else g[..., None] for g in gradients[:2]
  )
  number = jnp.asarray(_number(table, allowed))[..., None]
  leading = tuple(range(hidden.ndim - 1))

  def body(carry, n):
    states, rows = carry
    block = _block(hidden, table, allowed, n, size=size)
    p = jnp.exp((block.logits - kept.high[..., None]) - kept.log_sum[..., None])
    # In whole before it is multiplied, which may be in fewer digits: p and 1 cancel.
    slope = of_total - (of_own + number * of_total) * p
    slope += jnp.where(block.ids == targets[..., None], of_own, 0.0)
    slope = jnp.where(block.seen, slope, 0.0)
    with jax.named_scope("linear"):
      if kept.of_hidden:
        product = (((hidden.ndim - 1,), (0,)), ((), ()))
        states += jax.lax.dot_general(slope, block.rows, product, preferred_element_type=dtype)
      if kept.of_table:
        product = ((leading, leading), ((), ()))
        more = jax.lax.dot_general(slope, hidden, product, preferred_element_type=dtype)
        first = block.ids[0]
        more = more.astype(table.dtype) + jax.lax.dynamic_slice_in_dim(rows, first, size)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, more, first, axis=0)
    return (states, rows), None

  start = (
    jnp.zeros(hidden.shape, dtype) if kept.of_hidden else None,
    jnp.zeros(table.shape, table.dtype) if kept.of_table else None,
  )
  (states, rows), _ = jax.lax.scan(body, start, jnp.arange(-(-table.shape[0] // size)))
  return states.astype(hidden.dtype) if kept.of_hidden else None, rows, None, None


_told.defvjp(_told_forward, _told_backward, symbolic_zeros=True)
