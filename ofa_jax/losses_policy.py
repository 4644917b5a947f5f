"""The loss of sequences that a model wrote itself and something else judged (policy gradient).

Self-critical training (arXiv 1612.00563) as OFA has it: a token costs -log p times what its whole
sequence was better than the others of its row, over the tokens of all sequences.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax.losses import Mean
from ofa_jax.losses_vocabulary import InBlocks, told
from ofa_jax.numerics import widened
from ofa_jax.tokenizers.special import NUM_SPECIAL, PAD


@jax.named_scope("loss")
def policy_gradient(
  log_probs: jax.Array,
  tokens: jax.Array,
  advantages: jax.Array,
  *,
  ignore_prefix: int = 0,
  sentence_avg: bool = False,
  kl: float = 0.0,
  before: jax.Array | None = None,
) -> dict[str, Mean]:
  """The loss of sequences by what they are worth.

  Args:
    log_probs: float[N, T], of each token; see `token_log_probs`.
    tokens: int32[N, T]; padding costs nothing.
    advantages: float[N], how much better each is than what it is compared with; they carry no
      gradient.
    ignore_prefix: positions at the front that cost nothing.
    sentence_avg: the count of the loss is the sequences, not their tokens.
    kl: weight of the divergence from another model, that of the start.
    before: float[N, T], the other model's log-probability of each token, for `kl`.

  Returns:
    "loss", whose count is the original's sample size: the tokens of all sequences that are not
    ignored, or all sequences; with `kl` also the divergence itself, by the estimator
    exp(r) - 1 - r of r = before - log_probs, which is never negative and 0 where both agree.
  """
  sequences = jnp.sum(tokens[:, 0] != PAD, dtype=jnp.float32)
  keep = (tokens != PAD) & (np.arange(tokens.shape[1]) >= ignore_prefix)
  count = jnp.sum(keep, dtype=jnp.float32)
  cost = -log_probs * jax.lax.stop_gradient(widened(advantages))[:, None]
  metrics = {}
  if kl:
    ratio = jnp.where(keep, jax.lax.stop_gradient(before) - log_probs, 0.0)
    divergence = jnp.exp(ratio) - 1 - ratio
    cost += kl * divergence
    metrics["kl"] = Mean(jnp.sum(divergence), count)
  total = jnp.sum(jnp.where(keep, cost, 0.0))
  return {"loss": Mean(total, sequences if sentence_avg else count), **metrics}


def token_log_probs(
  logits: jax.Array | InBlocks, tokens: jax.Array, *, allowed_range: tuple[int, int] | None = None
) -> jax.Array:
  """The log-probability of each token, in at least float32 [N, T].

  Args:
    logits: float[N, T, V].
    tokens: int32[N, T].
    allowed_range: (first, end): only these ids and the special ones have a probability.
  """
  inside = None
  if allowed_range is not None:
    ids = np.arange(logits.shape[-1])
    inside = (ids < NUM_SPECIAL) | ((ids >= allowed_range[0]) & (ids < allowed_range[1]))
  if isinstance(logits, InBlocks):
    return told(logits, tokens, allowed=inside).own
  logits = widened(logits)
  if inside is not None:
    logits = jnp.where(inside, logits, -jnp.inf)
  own = jnp.take_along_axis(logits, tokens[..., None], axis=-1).squeeze(-1)
  return own - jax.nn.logsumexp(logits, axis=-1)
