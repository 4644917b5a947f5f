"""Image codes drawn one after the other (OFA's generator with `gen_code`), for many inputs at once.

The same numbers as `beam.generate` would compute, in less time: the length is known, so that the
loop keeps nothing but the cache; only the logits of special tokens and codes are computed, to which
the original's range leaves a probability; and the cache grows in a few pieces, so that attention
does not read places that are empty yet.

What is drawn for a sample comes from its input's key and its own number: a picture is the same in
any batch, on any number of devices, and beside any number of other samples.

Classifier-free guidance (arXiv:2207.12598 for diffusion, arXiv:2203.13131 for tokens) is not the
original's: of each input a second one without the caption runs in the same batch, and the logits go
beyond those of the first, away from the second's.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ofa_jax.decode import sample
from ofa_jax.decode.beam import Hypotheses, Search
from ofa_jax.tokenizers.special import BOS, EOS, NUM_SPECIAL

PIECES = 4  # in which the cache grows


class DrawsCodes(Protocol):
  """What a model needs to draw codes: see `models.ofa.OFA`."""

  def start(self, encoded: Any, *, max_length: int, hypotheses: int = 1, code: bool = False) -> Any:
    """An empty cache."""

  def code_step(self, cache: Any, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
    """Logits of the special tokens and the codes behind one more token, and the cache."""

  def code_ids(self, places: jax.Array) -> jax.Array:
    """The ids that are found at these places of the logits."""


def generate(
  model: DrawsCodes,
  encoded: Any,
  *,
  search: Search,
  rngs: jax.Array,
  guidance: float = 1.0,
  pieces: int = PIECES,
) -> Hypotheses:
  """Draws `search.num_beams` samples of `search.max_length` codes for each of B inputs.

  Args:
    model: whose codes.
    encoded: from `encode`, of B inputs; with guidance of 2 B, the same without captions behind.
    search: how many of what length, `top_k`, `top_p`, `temperature`; its other fields are not read.
    rngs: PRNG keys [B].
    guidance: how far the logits go from those without the caption to those with it, and beyond; 1:
      as they are, and nothing else is computed.
    pieces: in which the cache grows, each a loop of its own.

  Returns:
    All samples, the best score first, as `beam.generate` gives them: scores are means over the
    codes and the end, positional scores log-probabilities before top-k or top-p.
  """
  batch, samples, length = len(rngs), search.num_beams, search.max_length
  guided = guidance != 1
  whole = model.start(encoded, max_length=length + 1, hypotheses=samples, code=True)
  numbers = jnp.arange(samples)
  rngs = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers))(rngs)

  def body(state, step):
    tokens, cache = state
    rows = jnp.concatenate([tokens, tokens]) if guided else tokens
    logits, cache = model.code_step(cache, rows, step)
    if guided:
      told, untold = logits[:batch], logits[batch:]
      logits = untold + guidance * (told - untold)
    scores = log_probs(logits, temperature=search.temperature, ends=step >= length)
    keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, step)))(rngs)
    places, chosen = jax.vmap(jax.vmap(_draw(search)))(scores, keys)
    tokens = model.code_ids(places)
    return (tokens, cache), (tokens, chosen)

  tokens, cache = jnp.full((batch, samples), BOS, jnp.int32), None
  drawn, begin = [], 0
  for end in _ends(length + 1, pieces):
    cache = whole.first(end, of=cache)
    (tokens, cache), told = jax.lax.scan(body, (tokens, cache), jnp.arange(begin, end))
    drawn.append(told)
    begin = end
  tokens, positional = (jnp.moveaxis(jnp.concatenate(x), 0, -1) for x in zip(*drawn, strict=True))
  scores = jnp.sum(positional, axis=-1)
  if search.normalize_scores:
    scores /= (length + 1) ** search.length_penalty
  found = Hypotheses(tokens, jnp.full((batch, samples), length + 1, jnp.int32), scores, positional)
  best = jnp.argsort(-scores, axis=1, stable=True)
  return jax.tree.map(
    lambda x: jnp.take_along_axis(x, best.reshape(best.shape + (1,) * (x.ndim - 2)), axis=1), found
  )


def log_probs(logits: jax.Array, *, temperature: float, ends: jax.Array | bool) -> jax.Array:
  """Log-probabilities of what may follow, -inf of all else; as in the original not normalised.

  The special tokens, too, have their share of the probability, and are not drawn before the end.

  Args:
    logits: float32[..., 4 + C], special tokens first.
    temperature: divides the logits.
    ends: whether the codes are complete and nothing but the end may follow.
  """
  places = jnp.arange(logits.shape[-1])
  allowed = jnp.where(ends, places == EOS, places >= NUM_SPECIAL)
  return jnp.where(allowed, jax.nn.log_softmax(logits / temperature), -jnp.inf)


def _draw(search: Search):
  def one(scores, key):
    return sample.draw(scores, top_k=search.top_k, top_p=search.top_p, rngs=key)

  return one


def _ends(length: int, pieces: int) -> list[int]:
  """Where so many pieces of about the same size end."""
  return sorted({-(-length * i // pieces) for i in range(1, pieces + 1)})
