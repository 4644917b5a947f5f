"""How sure a model is of an answer: one definition for evaluations, the API and the command.

What is chosen out of candidates has the probability that the softmax of all candidates' scores,
divided by the temperature, gives it. What is generated has the probability of its tokens, as the
search computed it, to the power 1 / temperature: of a box, that of all hypotheses that say nearly
the same box. The temperature is fitted so that of the answers with a probability that share is
right (`scoring/calibration.py`); at 1 the probabilities are the model's own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax.data.boxes import overlaps
from ofa_jax.decode.beam import Hypotheses
from ofa_jax.tasks.answering import Answering

MISSING = (
  "{what}: expected a calibration of {name} for probabilities, found none; python -m "
  "ofa_jax.calibrate --config=C --checkpoint=M makes one with the validation split of a config"
)


def name_of(answering: Answering, *, chosen: bool) -> str:
  """What the calibration of a task's answers is called, by how they are found."""
  return f"{answering.name or answering.result}/{'chosen' if chosen else 'generated'}"


def log_probabilities(hypotheses: Hypotheses) -> jax.Array:
  """The log-probabilities float32[B, M] of whole hypotheses; -inf where there is none."""
  there = hypotheses.lengths > 0
  return jnp.where(there, jnp.sum(hypotheses.positional_scores, axis=2), -jnp.inf)


def of_choices(scores: jax.Array, *, temperatures: Sequence[float]) -> jax.Array:
  """The log-probability float32[B, T] of each row's best candidate at each temperature.

  Args:
    scores: float32[B, A], -inf where there is no candidate.
    temperatures: T of them, one after the other: the scores may be many.
  """
  best = jnp.max(scores, axis=1)

  def at(temperature):
    return best / temperature - jax.nn.logsumexp(scores / temperature, axis=1)

  return jax.lax.map(at, jnp.asarray(temperatures, scores.dtype)).T


def probabilities(
  log_probabilities: np.ndarray, *, temperatures: Sequence[float] | np.ndarray
) -> np.ndarray:
  """The probabilities float64[N, T] of generated answers by their log-probabilities float[N].

  Those of several hypotheses together may exceed one by rounding, and are then one.
  """
  logs = np.minimum(np.asarray(log_probabilities, np.float64), 0)
  return np.exp(logs[:, None] / np.asarray(temperatures, np.float64))


def merged(
  boxes: np.ndarray, log_probabilities: np.ndarray, *, overlap: float = 0.5
) -> list[tuple[int, float]]:
  """Puts hypotheses that say nearly the same box together.

  The best hypothesis takes those that overlap with it, of the others the best takes its own, and
  so on. Hypotheses that say the very same box, as samples do, count once.

  Args:
    boxes: float32[M, 4] of one input's hypotheses, the best first; NaN where they are no boxes.
    log_probabilities: float[M] of them.
    overlap: intersection over union from which on two are nearly the same.

  Returns:
    For each box that is left the number of its best hypothesis, and the log-probability of all that
    it took, itself included.
  """
  left = [i for i in range(len(boxes)) if np.isfinite(boxes[i]).all()]
  _, first = np.unique(boxes[left], axis=0, return_index=True) if left else ((), ())
  left = [left[i] for i in sorted(first)]
  regions = []
  while left:
    others = boxes[left]
    best = np.broadcast_to(others[0], others.shape)
    near = overlaps(best, others) >= overlap
    near[0] = True  # also without an area
    taken = [i for i, n in zip(left, near, strict=True) if n]
    regions.append((left[0], float(np.logaddexp.reduce(log_probabilities[taken]))))
    left = [i for i in left if i not in taken]
  return regions
