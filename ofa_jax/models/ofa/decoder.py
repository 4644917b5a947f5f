"""OFA's decoder: words, boxes or image codes one after the other, with a cache for generation.

A row of image codes differs from a row of text in its positions, which lie on the image's grid, and
in the norm of its embedding. One batch may hold both.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ofa_jax.models.layers import (
  LayerNorm,
  Scan,
  dropout,
  read_once,
  scan_blocks,
  shard_batch,
  split_rngs,
  stack,
)
from ofa_jax.models.ofa.config import OFAConfig
from ofa_jax.models.ofa.encoder import Encoded
from ofa_jax.models.ofa.layers import (
  INIT,
  CrossPositions,
  DecoderBlock,
  SelfPositions,
  layer_drops,
  make_prompt,
  read,
  write,
)
from ofa_jax.models.ofa.positions import EPS, MAX_TOKENS, Positions, RelativeBias, code_cells


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """What decoding keeps of B inputs with M hypotheses each; T counts the prompt's positions too.

  Everything is by layer, also the weights: what a loop takes off a stack it copies at every step,
  a quarter of the work on a CPU. Here the stack is taken apart once.

  Attributes:
    layers: the decoder's L layers.
    keys, values: of each layer, [B, M, T, H, K] of the positions decoded so far.
    mask: bool[B, M, T], False for padding.
    memory: of each layer, keys and values [B, S, H, K] of the encoder's output, which the
      hypotheses share.
    memory_mask: bool[B, S].
    bias: float32[1, H, N, N], the absolute bias of self-attention between N positions.
    cross_bias: float32[1 or B, H, N, S].
    code: the hypotheses are image codes.
  """

  layers: tuple[DecoderBlock, ...]
  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  mask: jax.Array
  memory: tuple[tuple[jax.Array, jax.Array], ...]
  memory_mask: jax.Array
  bias: jax.Array
  cross_bias: jax.Array
  code: bool = dataclasses.field(metadata={"static": True})

  @property
  def length(self) -> int:
    """N, the positions that there is room for; without the prompt's."""
    return self.bias.shape[-1]

  def first(self, length: int, *, of: "Cache | None" = None) -> "Cache":
    """Returns the cache of the first N positions alone, for steps among them.

    Args:
      length: N.
      of: one of fewer positions, whose keys and values it has; None: its own.
    """
    source, prefix = of or self, self.mask.shape[2] - self.length

    def fit(x, fill=0):
      x = x[:, :, : prefix + length]
      more = [(0, 0)] * x.ndim
      more[2] = (0, prefix + length - x.shape[2])
      return jnp.pad(x, more, constant_values=fill)

    return dataclasses.replace(
      self,
      keys=tuple(map(fit, source.keys)),
      values=tuple(map(fit, source.values)),
      mask=fit(source.mask, True),
      bias=self.bias[:, :, :length, :length],
      cross_bias=self.cross_bias[:, :, :length],
    )

  def reorder(self, parents: jax.Array) -> "Cache":
    """Returns the cache of hypotheses that continue `parents` int32[B, M'] of the old ones."""
    rows = jnp.arange(parents.shape[0])[:, None]
    keys, values, mask = jax.tree.map(
      lambda x: x[rows, parents], (self.keys, self.values, self.mask)
    )
    return dataclasses.replace(self, keys=keys, values=values, mask=mask)


class Decoder(nnx.Module):
  """Embedded tokens and the encoder's output to hidden states."""

  def __init__(self, config: OFAConfig, *, scan: Scan, rngs: nnx.Rngs):
    """Makes the parameters."""
    width, layers = config.width, config.decoder_layers
    self.scan, self.dropout, self.num = scan, config.dropout, layers
    self.drop_path = config.decoder_drop_path
    self.entangled = not config.disable_entangle
    self.grid_size, self.window = config.image_bucket_size, config.code_window
    self.text_norm = LayerNorm(width, eps=EPS)
    self.code_norm = LayerNorm(width, eps=EPS)
    self.positions = Positions(width, self.grid_size**2, init=INIT, rngs=rngs)
    self.self_positions = SelfPositions(config, rngs=rngs)
    self.cross_positions = CrossPositions(config, rngs=rngs)
    self.prompt = make_prompt(config, config.decoder_prompt, layers=layers, rngs=rngs)
    self.blocks = stack(lambda rngs: DecoderBlock(config, rngs=rngs), layers, rngs=rngs)
    self.norm = LayerNorm(width, eps=EPS)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    encoded: Encoded,
    *,
    code_mask: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Maps embedded tokens [B, T, D] with mask bool[B, T] to states; see `OFA.decode`."""
    embed_key, prompt_key, blocks_key = split_rngs(rngs, 3)
    length = x.shape[1]
    x = self.embed(x, code_mask=code_mask, rngs=embed_key)
    absolute, cross_bias = self.biases(encoded, length, code_mask=code_mask)
    causal = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, None]
    cross_mask = encoded.mask[:, None, None]
    prompt = None if self.prompt is None else self.prompt(batch=x.shape[0], rngs=prompt_key)

    def run(layer, x, key):
      block, drop, prompt = layer
      return block(
        x,
        encoded.hidden,
        bias=absolute + self.relative_bias(block.relative, length, code_mask=code_mask),
        mask=causal,
        cross_bias=cross_bias,
        cross_mask=cross_mask,
        prompt=prompt,
        drop=drop,
        rngs=key,
      )

    layers = (self.blocks, layer_drops(self.drop_path, self.num), prompt)
    return self.norm(scan_blocks(run, layers, x, scan=self.scan, rngs=blocks_key))

  def embed(
    self,
    x: jax.Array,
    *,
    code_mask: jax.Array | bool | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Maps embedded tokens [B, T, D] to what the first layer is given."""
    length = x.shape[1]
    _check_length(length)

    def one_kind(code):
      y = x + self.vectors(length, code=code) if self.entangled else x
      return (self.code_norm if code else self.text_norm)(y)

    return dropout(by_kind(one_kind, code_mask), self.dropout, rngs=rngs)

  def vectors(self, length: int, *, code: bool) -> jax.Array:
    """Returns the position vectors [1, T, D] of a text or of image codes, not normalised."""
    if code:
      return self.positions.image(code_cells(length, self.window, self.grid_size))[None]
    return self.positions.text.embedding[:length][None]

  def biases(
    self, encoded: Encoded, length: int, *, code_mask: jax.Array | bool | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the absolute biases float32[1 or B, H, T, T] and, to the encoder's, [..., T, S]."""

    def positions(code):
      norm = self.positions.image_norm if code else self.positions.text_norm
      return norm(self.vectors(length, code=code))

    return (
      by_kind(lambda code: self.self_positions(positions(code)), code_mask),
      by_kind(lambda code: self.cross_positions(positions(code), encoded.positions), code_mask),
    )

  def relative_bias(
    self, tables: RelativeBias, length: int, *, code_mask: jax.Array | bool | None = None
  ) -> jax.Array:
    """Returns a layer's bias by distance [1 or B, H, T, T]."""
    return by_kind(
      lambda code: (tables.codes(length, self.window) if code else tables.text(length))[None],
      code_mask,
    )

  def start(
    self, encoded: Encoded, *, max_length: int, hypotheses: int = 1, code: bool = False
  ) -> Cache:
    """Returns an empty cache; see `OFA.start`."""
    _check_length(max_length)
    B, M = encoded.hidden.shape[0], hypotheses
    layers = [jax.tree.map(lambda x, i=i: x[i], self.blocks) for i in range(self.num)]
    layers = tuple(read_once(layer) for layer in layers)
    memory = tuple(layer.cross.key_value(encoded.hidden) for layer in layers)
    bias, cross_bias = self.biases(encoded, max_length, code_mask=code)
    k = memory[0][0]
    keys = values = (jnp.zeros((B, M, max_length, *k.shape[2:]), k.dtype),) * self.num
    if self.prompt is not None:
      keys, values = (
        tuple(
          jnp.concatenate([jnp.broadcast_to(p[:, None], (B, M, *p.shape[1:])), x], axis=2)
          for p, x in zip(prompts, first, strict=True)
        )
        for prompts, first in zip(self.prompt(batch=B), (keys, values), strict=True)
      )
    return Cache(
      layers=layers,
      keys=keys,
      values=values,
      mask=jnp.ones((B, M, keys[0].shape[2]), bool),
      memory=memory,
      memory_mask=encoded.mask,
      bias=bias,
      cross_bias=cross_bias,
      code=code,
    )

  def step(
    self, cache: Cache, x: jax.Array, mask: jax.Array, *, position: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Maps embedded tokens [B, M, D] at `position`, mask bool[B, M], to states; see `OFA.step`."""
    length = cache.length
    if self.entangled:
      x = x + read(self.vectors(length, code=cache.code), position, axis=1)

    def row(tables, position):
      if cache.code:
        return tables.codes_step(position, length, self.window)[:, None]
      return tables.text_step(position, length)[:, None]

    def relative(tables):
      one = functools.partial(row, tables)
      return jax.vmap(one)(position) if jnp.ndim(position) else one(position)[None]

    return self._advance(
      cache,
      x,
      mask[..., None],
      position=position,
      absolute=read(cache.bias, position, axis=2),
      relative=relative,
      cross_bias=read(cache.cross_bias, position, axis=2),
    )

  def prefill(self, cache: Cache, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, Cache]:
    """Maps embedded tokens [B, P, D] at the first P positions to states [B, P, D].

    Padding, where mask bool[B, P] is False, is written but never attended to.
    """
    first = slice(x.shape[1])
    if self.entangled:
      x = x + self.vectors(cache.length, code=cache.code)[:, first]
    return self._advance(
      cache,
      x,
      mask[:, None],
      position=jnp.int32(0),
      absolute=cache.bias[:, :, first],
      relative=lambda tables: self.relative_bias(tables, cache.length, code_mask=cache.code)[
        :, :, first
      ],
      cross_bias=cache.cross_bias[:, :, first],
    )

  def _advance(
    self,
    cache: Cache,
    x: jax.Array,
    mask: jax.Array,
    *,
    position: jax.Array,
    absolute: jax.Array,
    relative: Callable[[RelativeBias], jax.Array],
    cross_bias: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    """Runs the layers over N positions from `position` on: [B, M * N, D], mask bool[B, M, N].

    The biases are those of the positions, [1 or B, H, N, T] and, to the encoder's, [..., N, S].
    """
    hypotheses, new = mask.shape[1:]
    prefix = cache.mask.shape[2] - cache.length
    slot = prefix + position
    x = (self.code_norm if cache.code else self.text_norm)(x)
    seen = write(cache.mask, mask, slot, axis=2)
    last = jnp.reshape(slot, (-1, 1, 1, 1)) + jnp.arange(new)[:, None]
    causal = seen[:, :, None] & (jnp.arange(cache.mask.shape[2]) <= last)

    x, keys, values = shard_batch(x), [], []
    for layer, k, v, memory in zip(
      cache.layers, cache.keys, cache.values, cache.memory, strict=True
    ):
      bias = absolute + relative(layer.relative)
      if bias.shape[0] != 1:  # of each input, for each of its hypotheses
        bias = jnp.broadcast_to(bias[:, None], (bias.shape[0], hypotheses, *bias.shape[1:]))
        bias = bias.reshape(-1, *bias.shape[2:])
      x, k, v = layer.step(
        x,
        k,
        v,
        slot=slot,
        bias=jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (prefix, 0))),
        mask=causal,
        memory=memory,
        cross_bias=cross_bias,
        cross_mask=cache.memory_mask[:, None, None],
      )
      x = shard_batch(x)
      keys.append(k)
      values.append(v)
    return self.norm(x), dataclasses.replace(
      cache, keys=tuple(keys), values=tuple(values), mask=seen
    )


def _check_length(length: int) -> None:
  if length > MAX_TOKENS + 1:  # an image of 32 x 32 codes and its start
    raise ValueError(f"Expected at most {MAX_TOKENS + 1} decoder tokens, found {length}")


def by_kind(fn: Callable[[bool], jax.Array], code_mask: jax.Array | bool | None) -> jax.Array:
  """Returns `fn(code)` [1 or B, ...] for rows of one kind, or each row's kind of a mixed batch.

  Args:
    fn: what text (False) and image codes (True) have.
    code_mask: bool[B] of a mixed batch, or one kind for all; None: text.
  """
  if code_mask is None or isinstance(code_mask, bool):
    return fn(bool(code_mask))
  text, code = fn(False), fn(True)
  return jnp.where(code_mask.reshape(-1, *[1] * (text.ndim - 1)), code, text)
