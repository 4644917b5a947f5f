"""What a probability is worth: temperature scaling and its error (Guo et al., arXiv 1706.04599).

A probability is calibrated where, of the answers that have it, that share is right. One number, the
temperature, is fitted on answers whose rightness is known; it changes no order among them.

How right an answer is may be a share, as in VQA's score: the probability is then what is expected
of it.
"""

from typing import NamedTuple

import numpy as np

BINS = 15  # of the paper's figures
# What is tried, 2.3 % apart: fitting needs nothing but the probabilities at each of them, which for
# thousands of candidates is far less than their scores.
TEMPERATURES = tuple(float(x) for x in np.logspace(-2, 2, 401))
PLAIN = TEMPERATURES.index(1.0)

_LEAST = 1e-12  # a probability of 0 or 1 that is wrong costs so much, and not infinity


class Fit(NamedTuple):
  """A temperature and what it does.

  Attributes:
    temperature: fitted to all answers.
    rows: answers that it was fitted to.
    right: their mean rightness.
    ece_before: expected calibration error of the probabilities as they are, at temperature 1.
    ece_after: of those that each half of the answers has at the temperature of the other half.
    nll_before, nll_after: mean cross-entropy of the rightness, in the same way.
  """

  temperature: float
  rows: int
  right: float
  ece_before: float
  ece_after: float
  nll_before: float
  nll_after: float

  @property
  def at_edge(self) -> bool:
    """Whether a temperature beyond those that are tried might fit better."""
    return self.temperature in (TEMPERATURES[0], TEMPERATURES[-1])


def expected_error(probabilities: np.ndarray, right: np.ndarray, *, bins: int = BINS) -> float:
  """Returns the expected calibration error, from 0 to 1.

  Answers are sorted into bins of equal width by their probability; the error is the mean distance,
  by answers, between a bin's mean probability and its mean rightness.

  Args:
    probabilities: float[N] from 0 to 1, at least one.
    right: float[N] from 0 to 1, how right each answer is.
    bins: how many.
  """
  probabilities, right = np.asarray(probabilities, np.float64), np.asarray(right, np.float64)
  places = np.minimum((probabilities * bins).astype(int), bins - 1)
  gaps = np.bincount(places, weights=probabilities - right, minlength=bins)
  return float(np.abs(gaps).sum() / len(probabilities))


def cross_entropy(probabilities: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Returns the mean cost of probabilities float[N, ...] for how right answers are, float[N]."""
  right = np.asarray(right, np.float64).reshape(-1, *[1] * (np.ndim(probabilities) - 1))
  p = np.clip(np.asarray(probabilities, np.float64), _LEAST, 1 - _LEAST)
  return -np.mean(right * np.log(p) + (1 - right) * np.log1p(-p), axis=0)


def fit(probabilities: np.ndarray, right: np.ndarray) -> Fit:
  """Finds the temperature at which the cross-entropy is least.

  Args:
    probabilities: float[N, len(TEMPERATURES)], of each answer at each temperature.
    right: float[N] from 0 to 1, how right each answer is.

  Raises:
    ValueError: there are fewer than two answers, or all are right or all wrong.
  """
  right = np.asarray(right, np.float64)
  if len(right) < 2:
    raise ValueError(
      f"Expected at least two answers whose rightness is known to fit a temperature by, found "
      f"{len(right)}. Name a split with references"
    )
  if right.mean() in (0.0, 1.0):
    said = "right" if right[0] else "wrong"
    raise ValueError(
      f"Expected right and wrong answers to fit a temperature by, found all {len(right)} {said}. "
      "Take more rows, or others"
    )
  # Drawn: right and wrong, or present and absent, may take turns in a file.
  halves = np.random.default_rng(0).permutation(len(right)) % 2 == 0
  crossed = np.empty(len(right))
  for half in (halves, ~halves):
    crossed[half] = probabilities[half, _best(probabilities[~half], right[~half])]
  plain = probabilities[:, PLAIN]
  return Fit(
    temperature=TEMPERATURES[_best(probabilities, right)],
    rows=len(right),
    right=float(right.mean()),
    ece_before=expected_error(plain, right),
    ece_after=expected_error(crossed, right),
    nll_before=float(cross_entropy(plain, right)),
    nll_after=float(cross_entropy(crossed, right)),
  )


def _best(probabilities: np.ndarray, right: np.ndarray) -> int:
  return int(np.argmin(cross_entropy(probabilities, right)))
