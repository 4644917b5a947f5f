"""Choosing the next token: the largest of many, and sampling among the likeliest.

The filters are fairseq's: top-k keeps the k likeliest tokens; top-p (arXiv:1904.09751) the fewest
whose probabilities sum up to at least p. What is kept is drawn in proportion, but scored with its
probability among all tokens.
"""

import jax
import jax.numpy as jnp

_BLOCK = 128  # elements of which `largest` first looks at the maximum alone


def largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns the k largest of the last axis and where they are, the largest first.

  The same as `jax.lax.top_k`, but for the order among equals; an axis as long as a vocabulary is
  searched in two stages, since the k largest lie in the k blocks with the largest maxima.

  Args:
    x: float[..., N] without NaN.
    k: at most N.
  """
  size = x.shape[-1]
  if size < 4 * k * _BLOCK:
    return jax.lax.top_k(x, k)
  padding = [(0, 0)] * (x.ndim - 1) + [(0, -size % _BLOCK)]
  blocks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(*x.shape[:-1], -1, _BLOCK)
  _, best = jax.lax.top_k(blocks.max(-1), k)
  # In the order of their places, which is then the order among equals.
  best = jnp.sort(best, axis=-1)
  few = jnp.take_along_axis(blocks, best[..., None], axis=-2)
  values, at = jax.lax.top_k(few.reshape(*x.shape[:-1], k * _BLOCK), k)
  return values, jnp.take_along_axis(best, at // _BLOCK, axis=-1) * _BLOCK + at % _BLOCK


def nucleus(log_probs: jax.Array, p: float) -> tuple[jax.Array, jax.Array]:
  """Sorts the tokens by probability and drops those beyond the fewest that reach `p` together.

  Args:
    log_probs: float32[..., V].
    p: the share of the probability to keep.

  Returns:
    log_probs float32[..., V], the largest first and -inf where dropped, and their tokens.
  """
  tokens = jnp.argsort(-log_probs, axis=-1)
  log_probs = jnp.take_along_axis(log_probs, tokens, axis=-1)
  probs = jnp.exp(log_probs)
  # A token is kept while those before it do not suffice; the first always is.
  short = jnp.cumsum(probs, axis=-1) < p
  keep = jnp.concatenate([jnp.ones_like(short[..., :1]), short[..., :-1]], axis=-1)
  return jnp.where(keep, log_probs, -jnp.inf), tokens


def draw(
  log_probs: jax.Array, *, top_k: int = 0, top_p: float = 0.0, rngs: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Draws a token from each distribution.

  Args:
    log_probs: float32[..., V].
    top_k: how many of the likeliest tokens to choose from, 0 for all.
    top_p: the share of the probability to choose from, 0 for all of it; goes before `top_k`, as in
      the original.
    rngs: PRNG key.

  Returns:
    Tokens int32[...] and their log_probs float32[...].
  """
  tokens = None
  if top_p > 0:
    log_probs, tokens = nucleus(log_probs, top_p)
  elif top_k > 0:
    log_probs, tokens = largest(log_probs, min(top_k, log_probs.shape[-1]))
  drawn = jax.random.categorical(rngs, log_probs)[..., None]
  scores = jnp.take_along_axis(log_probs, drawn, axis=-1)[..., 0]
  if tokens is not None:
    drawn = jnp.take_along_axis(tokens, drawn, axis=-1)
  return drawn[..., 0].astype(jnp.int32), scores
