"""What the methods of an OFA give back: answers, and where they are asked for scores and more."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from ofa_jax.calibrations import Calibration
from ofa_jax.tasks import confidence
from ofa_jax.tasks.answering import Answering

# Answers alone, or a tuple of them and what was asked for besides.
Results: TypeAlias = list | tuple[list, np.ndarray] | tuple[list, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Returns:
  """What is given back.

  Attributes:
    scores: whether scores are.
    temperature: by which probabilities are; None: they are not.
  """

  scores: bool
  temperature: float | None

  @classmethod
  def of(
    cls,
    known: Mapping[str, Calibration],
    answering: Answering,
    *,
    chosen: bool = False,
    scores: bool = False,
    probabilities: bool = False,
  ) -> "Returns":
    """What a caller asked for.

    Args:
      known: the model's calibrations.
      answering: the task's.
      chosen: whether answers are chosen out of candidates.
      scores, probabilities: whether these are given back.

    Raises:
      ValueError: probabilities of a model that was not calibrated for such answers.
    """
    if not probabilities:
      return cls(scores=scores, temperature=None)
    name = confidence.name_of(answering, chosen=chosen)
    if name not in known:
      raise ValueError(confidence.MISSING.format(what="return_probabilities", name=name))
    return cls(scores=scores, temperature=known[name].temperature)

  def generated(self, told: list, scores: np.ndarray, log_probabilities: np.ndarray) -> Results:
    """Answers with their scores float32[N] and the log-probabilities float[N] of their tokens."""
    probabilities = None
    if self.temperature is not None:
      values = confidence.probabilities(log_probabilities, temperatures=(self.temperature,))
      probabilities = values[:, 0].astype(np.float32)
    return self._with(told, scores, probabilities)

  def chosen(self, told: list, scores: np.ndarray) -> Results:
    """The best answers with the scores float32[N, A] of all candidates."""
    probabilities = None
    if self.temperature is not None:
      logs = confidence.of_choices(jnp.asarray(scores), temperatures=(self.temperature,))
      probabilities = np.exp(np.asarray(logs)[:, 0])
    return self._with(told, scores.max(axis=1, initial=-np.inf), probabilities)

  def _with(self, told, scores, probabilities):
    more = ([scores] if self.scores else []) + ([] if probabilities is None else [probabilities])
    return (told, *more) if more else told


def log_probability(hypothesis: Mapping[str, Any] | None) -> float:
  """Of a hypothesis' tokens, see `OFAModel.generate_tokens`; -inf where there is none."""
  if hypothesis is None:
    return -np.inf
  return float(np.sum(hypothesis["positional_scores"], dtype=np.float32))


def log_probabilities(hypotheses: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """The same of several, float64[M]."""
  return np.array([log_probability(x) for x in hypotheses], np.float64)
