"""A model whose next token depends on the tokens before, by a table, with a cache to go wrong.

The cache remembers the tokens that it was given, as a real one remembers keys and values: a step
with the cache of another hypothesis looks up another row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax.decode import beam


def table(seed: int = 0, *, batch: int = 2, vocab_size: int = 9) -> jax.Array:
  """Logits float32[B, V, V] of every token after every token, for each input."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(2 * rng.normal(size=(batch, vocab_size, vocab_size)), jnp.float32)


def functions(logits: jax.Array):
  """(step, reorder) of the model with this table."""

  def step(cache, tokens, position):
    here = jnp.arange(cache.shape[2]) - jnp.reshape(position, (-1, 1, 1))
    cache = jnp.where(here == 0, tokens[..., None], cache)
    history = jnp.sum(jnp.where(here <= 0, cache, 0), axis=2)
    rows = jnp.arange(len(cache))[:, None]
    return logits[rows, tokens] + logits[rows, history % logits.shape[1]], cache

  def reorder(cache, parents):
    return jnp.take_along_axis(cache, parents[:, :, None], axis=1)

  return step, reorder


def prefill(logits: jax.Array):
  """`prefill` of the model with this table."""
  step, _ = functions(logits)

  def run(cache, prompts):
    cache = cache.at[:, 0, : prompts.shape[1]].set(prompts)
    last = jnp.sum(prompts != beam.PAD, axis=1) - 1
    return step(cache, jnp.take_along_axis(prompts, last[:, None], axis=1), last)

  return run


def cache(*, batch: int, hypotheses: int, length: int) -> jax.Array:
  """An empty cache int32[B, M, length]."""
  return jnp.zeros((batch, hypotheses, length), jnp.int32)


def log_probs(logits: np.ndarray, tokens: list[int], *, allowed=slice(None)) -> np.ndarray:
  """What follows `tokens` (bos first): log-probabilities float[V] of an input's table [V, V]."""
  row = logits[tokens[-1]] + logits[sum(tokens) % len(logits)]
  row = row.astype(np.float64)
  return row - np.log(np.sum(np.exp(row[allowed])))


def generate(logits: jax.Array, search: beam.Search, **arguments) -> beam.Hypotheses:
  """`beam.generate` with the model of a table, or of several."""
  models = logits if isinstance(logits, tuple) else (logits,)
  batch = len(models[0])
  step, reorder = beam.ensemble([functions(x) for x in models])
  if len(models) == 1:
    step, reorder = functions(logits)
  caches = tuple(
    cache(batch=batch, hypotheses=search.num_beams, length=search.max_length + 1) for _ in models
  )

  @jax.jit
  def run(caches, arguments):
    caches = caches if isinstance(logits, tuple) else caches[0]
    return beam.generate(step, caches, reorder=reorder, search=search, batch=batch, **arguments)

  return jax.tree.map(np.asarray, run(caches, arguments))
