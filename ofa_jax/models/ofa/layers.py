"""The layers of OFA's encoder and decoder: pre-norm blocks with NormFormer's additions.

NormFormer (arXiv:2110.09456) adds a norm after attention, one inside the feed-forward part, and a
factor for every head. Every module here is a whole residual branch: it takes the states, and
returns them with its output added.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, zeros

from ofa_jax.models.attention import attention
from ofa_jax.models.layers import (
  Embed,
  LayerNorm,
  Linear,
  Mlp,
  drop_path,
  drop_path_rates,
  dropout,
  gelu,
  split_rngs,
)
from ofa_jax.models.ofa.config import OFAConfig
from ofa_jax.models.ofa.positions import EPS, RelativeBias
from ofa_jax.numerics import wide

INIT = normal(0.02)  # of every matrix and table, relative biases included
PROMPT_DROPOUT = 0.2  # of a prompt's keys and values, fixed in the original
# Content and position are two products of K terms in the logits, scaled by 1 / sqrt(2 * K).
PRODUCTS = 2


class Attention(nnx.Module):
  """Attention to the states themselves (parameters qkv) or to those of the encoder (q and kv)."""

  def __init__(self, config: OFAConfig, *, cross: bool = False, rngs: nnx.Rngs):
    """Makes the parameters."""
    width = config.width
    self.dropout, self.attention_dropout = config.dropout, config.attention_dropout
    self.norm = LayerNorm(width, eps=EPS)
    if cross:
      self.q = linear(width, config.head_dims, rngs=rngs)
      self.kv = linear(width, (2, *config.head_dims), rngs=rngs)
    else:
      self.qkv = linear(width, (3, *config.head_dims), rngs=rngs)
    self.head_scale = nnx.Param(jnp.ones(config.heads, jnp.float32)) if config.scale_heads else None
    self.out = linear(config.head_dims, width, rngs=rngs)
    self.out_norm = LayerNorm(width, eps=EPS) if config.scale_attn else None

  def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps states [B, T, D] to their queries, keys and values [B, T, H, K]."""
    qkv = self.qkv(self.norm(x))
    return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

  def query(self, x: jax.Array) -> jax.Array:
    """Maps states [B, T, D] to the queries [B, T, H, K] of cross-attention."""
    return self.q(self.norm(x))

  def key_value(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps the encoder's output [B, S, D] to keys and values [B, S, H, K]."""
    kv = self.kv(hidden)
    return kv[:, :, 0], kv[:, :, 1]

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array,
    mask: jax.Array,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Maps queries [B, T, H, K], keys and values [B, S, H, K] to the branch's output [B, T, D].

    `bias` and `mask` (True = attend) broadcast to [B, H, T, S].
    """
    x = attention(
      q * PRODUCTS**-0.5,
      k,
      v,
      bias=bias,
      mask=mask,
      dropout_rate=self.attention_dropout,
      rngs=rngs,
    )
    if self.head_scale is not None:
      x = x * self.head_scale[...][:, None]
    x = self.out(x)
    return x if self.out_norm is None else self.out_norm(x)

  def add(
    self, x: jax.Array, y: jax.Array, *, drop: jax.Array | None, rngs: jax.Array | None = None
  ) -> jax.Array:
    """Returns the states x [B, T, D] with the branch's output y; `drop` is the drop-path rate."""
    dropout_key, drop_key = split_rngs(rngs, 2)
    return x + drop_path(dropout(y, self.dropout, rngs=dropout_key), drop, rngs=drop_key)


class FeedForward(nnx.Module):
  """The feed-forward branch, with an adapter (arXiv:1902.00751) on its output if there is one."""

  def __init__(self, config: OFAConfig, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    width = config.width
    self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
    self.norm = LayerNorm(width, eps=EPS)
    self.up = linear(width, config.mlp, rngs=rngs)
    self.mid_norm = LayerNorm(config.mlp, eps=EPS) if config.scale_fc else None
    self.down = linear(config.mlp, width, rngs=rngs)
    adapter = {"activation": jax.nn.relu, "kernel_init": INIT, "bias_init": zeros, "rngs": rngs}
    self.adapter = Mlp(width, config.adapter, **adapter) if config.adapter else None
    self.residual_scale = nnx.Param(jnp.ones(width, jnp.float32)) if config.scale_resids else None

  def __call__(
    self, x: jax.Array, *, drop: jax.Array | None = None, rngs: jax.Array | None = None
  ) -> jax.Array:
    """Maps states [B, T, D] to the next ones; `drop` is the drop-path rate."""
    activation_key, dropout_key, drop_key = split_rngs(rngs, 3)
    y = dropout(gelu(self.up(self.norm(x))), self.activation_dropout, rngs=activation_key)
    y = self.down(y if self.mid_norm is None else self.mid_norm(y))
    y = dropout(y, self.dropout, rngs=dropout_key)
    if self.adapter is not None:
      y = y + self.adapter(y)
    if self.residual_scale is not None:
      x = x * self.residual_scale[...]
    return x + drop_path(y, drop, rngs=drop_key)


class EncoderBlock(nnx.Module):
  """Self-attention and the feed-forward part, with the layer's tables of relative biases."""

  def __init__(self, config: OFAConfig, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    self.relative = relative_bias(config, rngs=rngs)
    self.attn = Attention(config, rngs=rngs)
    self.mlp = FeedForward(config, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    *,
    bias: jax.Array,
    mask: jax.Array,
    prompt: tuple[jax.Array, jax.Array] | None = None,
    drop: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Maps states [B, S, D] to the next ones.

    Args:
      x: [B, S, D].
      bias: float32, broadcastable to [B, H, S, S]: absolute and this layer's relative.
      mask: bool, broadcastable to [B, 1, S, S].
      prompt: keys and values [1 or B, P, H, K] that every state attends to as well.
      drop: float32[], rate of drop path; None: 0.
      rngs: PRNG key, or None in evaluation.
    """
    weights_key, add_key, mlp_key = split_rngs(rngs, 3)
    q, k, v = self.attn.project(x)
    k, v, bias, mask = with_prompt(prompt, k, v, bias=bias, mask=mask)
    y = self.attn.attend(q, k, v, bias=bias, mask=mask, rngs=weights_key)
    x = self.attn.add(x, y, drop=drop, rngs=add_key)
    return self.mlp(x, drop=drop, rngs=mlp_key)


class DecoderBlock(nnx.Module):
  """Self-attention, attention to the encoder's output, the feed-forward part."""

  def __init__(self, config: OFAConfig, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    self.relative = relative_bias(config, rngs=rngs)
    self.attn = Attention(config, rngs=rngs)
    self.cross = Attention(config, cross=True, rngs=rngs)
    self.mlp = FeedForward(config, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    hidden: jax.Array,
    *,
    bias: jax.Array,
    mask: jax.Array,
    cross_bias: jax.Array,
    cross_mask: jax.Array,
    prompt: tuple[jax.Array, jax.Array] | None = None,
    drop: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Maps states [B, T, D] to the next ones, given the encoder's output [B, S, D].

    The other arguments are `EncoderBlock`'s, with biases and masks for both attentions.
    """
    weights_key, add_key, rest_key = split_rngs(rngs, 3)
    q, k, v = self.attn.project(x)
    k, v, bias, mask = with_prompt(prompt, k, v, bias=bias, mask=mask)
    y = self.attn.attend(q, k, v, bias=bias, mask=mask, rngs=weights_key)
    x = self.attn.add(x, y, drop=drop, rngs=add_key)
    memory = self.cross.key_value(hidden)
    return self.rest(x, memory, bias=cross_bias, mask=cross_mask, drop=drop, rngs=rest_key)

  def step(
    self,
    x: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    slot: jax.Array,
    bias: jax.Array,
    mask: jax.Array,
    memory: tuple[jax.Array, jax.Array],
    cross_bias: jax.Array,
    cross_mask: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps the states of N positions to the next ones, with those before them in a cache.

    Args:
      x: [B, M * N, D], of M hypotheses of every input.
      keys, values: [B, M, T, H, K]; those of the positions are written from `slot` on.
      slot: int32[] or int32[B], the first position's place in the cache.
      bias: float32, broadcastable to [B * M, H, N, T].
      mask: bool[B, M, N, T].
      memory: keys and values [B, S, H, K] of the encoder's output.
      cross_bias: float32, broadcastable to [B, H, M * N, S].
      cross_mask: bool[B, 1, 1, S].

    Returns:
      The states, and `keys` and `values`.
    """
    M, N, T = mask.shape[1:]
    q, k, v = self.attn.project(x)
    k, v = (new.reshape(-1, M, N, *new.shape[2:]) for new in (k, v))
    keys, values = write(keys, k, slot, axis=2), write(values, v, slot, axis=2)
    k, v = (old.reshape(-1, *old.shape[2:]) for old in (keys, values))
    mask = mask.reshape(-1, 1, N, T)
    y = self.attn.attend(q.reshape(-1, N, *q.shape[2:]), k, v, bias=bias, mask=mask)
    x = self.attn.add(x, y.reshape(x.shape), drop=None)
    return self.rest(x, memory, bias=cross_bias, mask=cross_mask, drop=None), keys, values

  def rest(
    self,
    x: jax.Array,
    memory: tuple[jax.Array, jax.Array],
    *,
    bias: jax.Array,
    mask: jax.Array,
    drop: jax.Array | None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Maps the states [B, T, D] after self-attention to the next layer's."""
    weights_key, add_key, mlp_key = split_rngs(rngs, 3)
    q = self.cross.query(x)
    y = self.cross.attend(q, *memory, bias=bias, mask=mask, rngs=weights_key)
    x = self.cross.add(x, y, drop=drop, rngs=add_key)
    return self.mlp(x, drop=drop, rngs=mlp_key)


class SelfPositions(nnx.Module):
  """The absolute bias of self-attention: position queries and keys by qk [D, 2, H, K]."""

  def __init__(self, config: OFAConfig, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    self.qk = linear(config.width, (2, *config.head_dims), rngs=rngs)

  def __call__(self, positions: jax.Array) -> jax.Array:
    """Maps normalised positions [B, T, D] to the bias float32[B, H, T, T]."""
    qk = self.qk(positions)
    return position_product(qk[:, :, 0], qk[:, :, 1])


class CrossPositions(nnx.Module):
  """The absolute bias of cross-attention: position queries and keys by q and k [D, H, K]."""

  def __init__(self, config: OFAConfig, *, rngs: nnx.Rngs):
    """Makes the parameters."""
    self.q = linear(config.width, config.head_dims, rngs=rngs)
    self.k = linear(config.width, config.head_dims, rngs=rngs)

  def __call__(self, positions: jax.Array, memory: jax.Array) -> jax.Array:
    """Maps positions [B, T, D] and the encoder's [B, S, D] to the bias float32[B, H, T, S]."""
    return position_product(self.q(positions), self.k(memory))


class Prompt(nnx.Module):
  """Learnt keys and values before every layer's own: prefix tuning (arXiv:2101.00190).

  They come straight from a table, or (`prompt_hidden` > 0) from a smaller one through two layers.
  """

  def __init__(self, config: OFAConfig, length: int, *, layers: int, rngs: nnx.Rngs):
    """Makes the parameters of a prompt of `length` for a stack of `layers`."""
    hidden, size = config.prompt_hidden, 2 * layers * config.width
    self.outputs, self.length = (layers, 2, *config.head_dims), length
    self.table = Embed(length, config.width if hidden else size, init=INIT, rngs=rngs)
    self.up = linear(config.width, hidden, rngs=rngs) if hidden else None
    self.down = linear(hidden, size, rngs=rngs) if hidden else None

  def __call__(self, *, batch: int, rngs: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values [L, 1, P, H, K]; in training [L, batch, P, H, K], by dropout."""
    x = self.table.embedding[...]
    if self.up is not None:
      x = self.down(jax.nn.relu(self.up(x)))
    x = x.reshape(1, self.length, *self.outputs)
    if rngs is not None:
      x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
      x = dropout(x, PROMPT_DROPOUT, rngs=rngs)
    x = x.transpose(2, 3, 0, 1, 4, 5)
    return x[:, 0], x[:, 1]


def make_prompt(config: OFAConfig, length: int, *, layers: int, rngs: nnx.Rngs) -> Prompt | None:
  """Returns the prompt of a stack of `layers`, None for length 0."""
  return Prompt(config, length, layers=layers, rngs=rngs) if length else None


def layer_drops(last: float, layers: int) -> jax.Array | None:
  """Returns the drop-path rates float32[L] of a stack, from 0 to `last`; None if all are 0."""
  return jnp.array(drop_path_rates(last, layers), jnp.float32) if last else None


def linear(
  inputs: int | tuple[int, ...], outputs: int | tuple[int, ...], *, rngs: nnx.Rngs
) -> Linear:
  """Returns a linear map as OFA initialises all of them: N(0, 0.02), biases 0."""
  return Linear(inputs, outputs, kernel_init=INIT, bias_init=zeros, rngs=rngs)


def position_product(q: jax.Array, k: jax.Array) -> jax.Array:
  """Maps position queries and keys [1 or B, T, H, K] to the bias float32[1 or B, H, T, S]."""
  q = (q * (PRODUCTS * q.shape[-1]) ** -0.5).transpose(0, 2, 1, 3)
  return jnp.matmul(q, k.transpose(0, 2, 3, 1), preferred_element_type=wide(q.dtype))


def relative_bias(config: OFAConfig, *, rngs: nnx.Rngs) -> RelativeBias:
  """Returns one layer's tables."""
  return RelativeBias(
    config.heads,
    token_size=config.token_bucket_size,
    image_size=config.image_bucket_size,
    init=INIT,
    rngs=rngs,
  )


def read(x: jax.Array, position: jax.Array, *, axis: int) -> jax.Array:
  """Returns the slice of x [1 or B, ...] at `position` on an axis, which stays, of length one.

  The position is one for all rows, int32[], or each row's own, int32[B].
  """
  if jnp.ndim(position) == 0:
    return jax.lax.dynamic_slice_in_dim(x, position, 1, axis=axis)
  rows, x = (None, x[0]) if x.shape[0] == 1 else (0, x)
  each = functools.partial(read, axis=axis - 1)
  return jax.vmap(each, in_axes=(rows, 0))(x, position)


def write(x: jax.Array, new: jax.Array, position: jax.Array, *, axis: int) -> jax.Array:
  """Returns x [B, ...] with `new` from `position` (as for `read`) on along an axis."""
  if jnp.ndim(position) == 0:
    return jax.lax.dynamic_update_slice_in_dim(x, new, position, axis=axis)
  return jax.vmap(functools.partial(write, axis=axis - 1))(x, new, position)


def with_prompt(
  prompt: tuple[jax.Array, jax.Array] | None,
  k: jax.Array,
  v: jax.Array,
  *,
  bias: jax.Array,
  mask: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Puts a prompt before keys and values: everyone attends to it, and without a bias."""
  if prompt is None:
    return k, v, bias, mask
  length = prompt[0].shape[1]
  k, v = (
    jnp.concatenate([jnp.broadcast_to(p, (x.shape[0], *p.shape[1:])), x], axis=1)
    for p, x in zip(prompt, (k, v), strict=True)
  )
  bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (length, 0)))
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (length, 0)), constant_values=True)
  return k, v, bias, mask
