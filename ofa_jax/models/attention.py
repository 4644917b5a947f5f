"""Attention: one function that chooses its implementation, and self-attention made of it."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from ofa_jax.models.layers import Linear, device_kind, dropout, recomputed
from ofa_jax.numerics import wide

_SHORT = 128  # queries below which attention stays with XLA


class SelfAttention(nnx.Module):
  """Multi-head self-attention: parameters qkv [D, 3, H, K] and out [H, K, D], each with a bias.

  The head axis stands alone in both kernels so that it can be split over devices.
  """

  def __init__(
    self,
    width: int,
    heads: int,
    *,
    qkv_init: Initializer,
    out_init: Initializer,
    dropout: float = 0.0,
    rngs: nnx.Rngs,
  ):
    """Makes the parameters; `dropout` is the rate on the attention weights, biases start at 0."""
    head_dims = (heads, width // heads)
    zeros = jax.nn.initializers.zeros
    self.dropout = dropout
    self.qkv = Linear(width, (3, *head_dims), kernel_init=qkv_init, bias_init=zeros, rngs=rngs)
    self.out = Linear(head_dims, width, kernel_init=out_init, bias_init=zeros, rngs=rngs)

  def __call__(
    self, x: jax.Array, *, bias: jax.Array | None = None, rngs: jax.Array | None = None
  ) -> jax.Array:
    """Maps x [B, T, D] to [B, T, D]; `bias` broadcasts to logits [B, H, T, T]."""
    qkv = self.qkv(x)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    return self.out(attention(q, k, v, bias=bias, dropout_rate=self.dropout, rngs=rngs))


@jax.named_scope("attention")
def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  bias: jax.Array | None = None,
  dropout_rate: float = 0.0,
  rngs: jax.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention with a float32 softmax (arXiv:1706.03762, section 3.2.1).

  Args:
    q: [B, T, H, K].
    k, v: [B, S, H, K], of q's dtype.
    mask: bool, broadcastable to [B, H, T, S]; True = attend. A row of only False attends evenly.
    bias: broadcastable to [B, H, T, S]; added to the scaled logits.
    dropout_rate: share of the attention weights dropped in training.
    rngs: PRNG key, or None in evaluation.

  Returns:
    [B, T, H, K] of q's dtype.
  """
  plain = mask is None and bias is None and (rngs is None or dropout_rate == 0)
  if attention_choice(q, k, plain=plain, device=device_kind())[0] == "cudnn":
    return fused_attention(q, k, v, implementation="cudnn")
  return _xla_attention(q, k, v, mask, bias, rngs, dropout_rate)


# Kept for the backward pass, the weights of all layers would grow with the square of the length.
@functools.partial(recomputed, static_argnums=6)
def _xla_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None,
  bias: jax.Array | None,
  rngs: jax.Array | None,
  dropout_rate: float,
) -> jax.Array:
  weights = attention_weights(q, k, mask=mask, bias=bias).astype(q.dtype)
  weights = dropout(weights, dropout_rate, rngs=rngs)
  return jnp.einsum("bhts,bshk->bthk", weights, v)


def attention_weights(
  q: jax.Array, k: jax.Array, *, mask: jax.Array | None = None, bias: jax.Array | None = None
) -> jax.Array:
  """How much each query attends to each key, of at least float32 [B, H, T, S], one in sum over S.

  Args: as of `attention`.
  """
  logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=wide(q.dtype))
  logits = logits * q.shape[-1] ** -0.5
  if bias is not None:
    logits = logits + bias
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(logits)


def attention_choice(
  q: jax.Array, k: jax.Array, *, plain: bool, device: str
) -> tuple[Literal["xla", "cudnn"], str]:
  """Returns which implementation `attention` takes, and why.

  Args:
    q, k: [B, T, H, K] and [B, S, H, K], or their shapes and dtypes.
    plain: no mask, no bias, no dropout of the weights.
    device: the kind, as JAX names it.
  """
  if not device.startswith("NVIDIA"):
    # Compiled for a TPU at a ViT's 257 tokens, Pallas' flash attention needs more memory backward
    # than XLA, and splash attention as much for half the bytes; neither was timed on one yet
    # (docs/scaling.md).
    return "xla", f"cuDNN is not for {device}, and no TPU kernel has shown to be faster here"
  if not plain:
    return "xla", "cuDNN has no dropout that matches, and folds masks and biases into large arrays"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return "xla", f"cuDNN takes bfloat16 and float16, not {q.dtype}"
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return "xla", f"cuDNN takes heads of a multiple of 8 up to 128, not {q.shape[-1]}"
  if q.shape[1] < _SHORT:
    return "xla", f"{q.shape[1]} queries are too few to win from a fused kernel"
  return "cudnn", "a fused kernel never writes the logits to memory"


def fused_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: Literal["xla", "cudnn"]
) -> jax.Array:
  """Attention as `jax.nn` has it, with odd lengths, which cuDNN refuses, padded and masked.

  Args:
    q, k, v: as `attention`.
    implementation: of `jax.nn.dot_product_attention`.
  """
  B, T, S = q.shape[0], q.shape[1], k.shape[1]
  lengths = {}
  if T % 2 or S % 2:
    q = jnp.pad(q, ((0, 0), (0, T % 2), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, S % 2), (0, 0), (0, 0))) for x in (k, v))
    lengths = {
      "query_seq_lengths": jnp.full(B, T, jnp.int32),
      "key_value_seq_lengths": jnp.full(B, S, jnp.int32),
    }
  x = jax.nn.dot_product_attention(q, k, v, **lengths, implementation=implementation)
  return x[:, :T]
