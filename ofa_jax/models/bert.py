"""BERT's encoder (arXiv:1810.04805) as Chinese-CLIP's text tower (RoBERTa-wwm-ext, RBT3).

Post-norm blocks, exact GELU, absolute positions, one token type, no pooler.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, zeros

from ofa_jax.models.attention import SelfAttention
from ofa_jax.models.layers import (
  Embed,
  LayerNorm,
  Mlp,
  Scan,
  dropout,
  gelu,
  scan_blocks,
  split_rngs,
  stack,
)

EPS = 1e-12  # BERT's own
INIT = normal(0.02)  # of every matrix and table (text_initializer_range)
MASKED = -10000.0  # added to the logits of padding, as in the original; not minus infinity


@dataclasses.dataclass(kw_only=True)
class BertConfig:
  """Sizes and dropout rates of a BERT encoder; `pad` is the id of the padding token."""

  vocab_size: int = 21128
  width: int
  layers: int
  heads: int
  mlp: int
  max_positions: int = 512
  type_vocab: int = 2
  dropout: float = 0.1
  attention_dropout: float = 0.1
  pad: int = 0


class Block(nnx.Module):
  """One post-norm transformer layer."""

  def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
    """Makes the parameters: matrices N(0, 0.02), biases 0."""
    self.dropout = config.dropout
    self.attn = SelfAttention(
      config.width,
      config.heads,
      qkv_init=INIT,
      out_init=INIT,
      dropout=config.attention_dropout,
      rngs=rngs,
    )
    self.attn_norm = LayerNorm(config.width, eps=EPS)
    self.mlp = Mlp(
      config.width, config.mlp, activation=gelu, kernel_init=INIT, bias_init=zeros, rngs=rngs
    )
    self.mlp_norm = LayerNorm(config.width, eps=EPS)

  def __call__(self, x: jax.Array, *, bias: jax.Array, rngs: jax.Array | None = None) -> jax.Array:
    """Maps x [B, T, D] to the same shape; `bias` float32[B, 1, 1, T] hides the padding."""
    attn_key, hidden_key, mlp_key = split_rngs(rngs, 3)
    y = self.attn(x, bias=bias, rngs=attn_key)
    x = self.attn_norm(x + dropout(y, self.dropout, rngs=hidden_key))
    return self.mlp_norm(x + dropout(self.mlp(x), self.dropout, rngs=mlp_key))


class Bert(nnx.Module):
  """The text tower: tokens to the states of the last layer."""

  def __init__(self, config: BertConfig, *, scan: Scan, rngs: nnx.Rngs):
    """Makes the parameters.

    Raises:
      ValueError: the width is not a multiple of the heads.
    """
    if config.width % config.heads:
      raise ValueError(
        f"BertConfig: expected width to be a multiple of heads {config.heads}, found {config.width}"
      )
    width = config.width
    self.pad, self.dropout, self.scan = config.pad, config.dropout, scan
    self.word = Embed(config.vocab_size, width, init=INIT, pad=config.pad, rngs=rngs)
    self.position = Embed(config.max_positions, width, init=INIT, rngs=rngs)
    self.token_type = Embed(config.type_vocab, width, init=INIT, rngs=rngs)
    self.embed_norm = LayerNorm(width, eps=EPS)
    self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.layers, rngs=rngs)

  def __call__(self, tokens: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Encodes tokens.

    Args:
      tokens: int32[B, T], filled up with `pad`, which no other token attends to.
      rngs: PRNG key for dropout, or None in evaluation.

    Returns:
      The last layer's states [B, T, D].

    Raises:
      ValueError: T is more than max_positions.
    """
    embed_key, blocks_key = split_rngs(rngs, 2)
    bias = self.padding_bias(tokens)
    return scan_blocks(
      lambda block, x, key: block(x, bias=bias, rngs=key),
      self.blocks,
      self.embed(tokens, rngs=embed_key),
      scan=self.scan,
      rngs=blocks_key,
    )

  def embed(self, tokens: jax.Array, *, rngs: jax.Array | None = None) -> jax.Array:
    """Maps tokens int32[B, T] to the first layer's input [B, T, D]."""
    position = self.position.embedding[...]
    length, longest = tokens.shape[1], len(position)
    if length > longest:
      raise ValueError(
        f"Expected at most {longest} tokens, found {length}; shorten the texts "
        "(context_length) or raise max_positions."
      )
    x = self.word(tokens) + position[:length] + self.token_type.embedding[0]
    return dropout(self.embed_norm(x), self.dropout, rngs=rngs)

  def padding_bias(self, tokens: jax.Array) -> jax.Array:
    """Returns float32[B, 1, 1, T] to add to attention logits: 0 for tokens, MASKED for padding."""
    return jnp.where(tokens == self.pad, MASKED, 0.0)[:, None, None, :]
