import numpy as np
import pytest

from ofa_jax.scoring import calibration
from ofa_jax.scoring.calibration import TEMPERATURES


def test_error_is_the_distance_of_bins_by_answers():
  # Two bins of 15 are filled: 0.1 with one of four right, 0.95 with two of two.
  probabilities = np.array([0.1, 0.1, 0.1, 0.1, 0.95, 0.95])
  right = np.array([1.0, 0, 0, 0, 1, 1])
  expected = (4 * abs(0.1 - 0.25) + 2 * 0.05) / 6
  assert calibration.expected_error(probabilities, right) == pytest.approx(expected)
  assert calibration.expected_error([0.0, 1.0], [0.0, 1.0]) == 0  # both ends have their bin
  assert calibration.expected_error([0.5], [0.9]) == pytest.approx(0.4)  # rightness may be a share


def drawn(temperature, rows=4000, seed=0):
  """Probabilities of the best of ten answers at each temperature, of a model that is too sure."""
  rng = np.random.default_rng(seed)
  truth = rng.normal(size=(rows, 10)) * 2
  probabilities = np.exp(truth) / np.exp(truth).sum(axis=1, keepdims=True)
  label = (probabilities.cumsum(axis=1) > rng.random((rows, 1))).argmax(axis=1)
  scores = truth * temperature
  below = scores - scores.max(axis=1, keepdims=True)  # the best has 0
  rest = np.stack([np.exp(below / t).sum(axis=1) for t in TEMPERATURES], axis=1)
  return 1 / rest, label == scores.argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_that_spoilt_probabilities_mends_them(temperature):
  probabilities, right = drawn(temperature)
  fit = calibration.fit(probabilities, right)
  assert fit.temperature == pytest.approx(temperature, rel=0.08) and not fit.at_edge
  assert fit.rows == len(right) and fit.right == pytest.approx(right.mean())
  assert fit.ece_before > 0.1 and fit.ece_after < 0.03
  assert fit.nll_after < fit.nll_before
  plain = probabilities[:, calibration.PLAIN]
  assert fit.ece_before == calibration.expected_error(plain, right)


def test_what_is_after_is_measured_on_the_other_half():
  """Halves that contradict each other fit to nothing; right and wrong by turns are no such."""
  logs = np.log(np.full(400, 0.5))
  probabilities = np.exp(logs[:, None] / TEMPERATURES)
  right = (np.random.default_rng(0).permutation(400) % 2 == 0).astype(float)
  fit = calibration.fit(probabilities, right)
  assert fit.ece_before == pytest.approx(0) and fit.ece_after > 0.9
  assert fit.temperature == pytest.approx(1, rel=0.03)
  fit = calibration.fit(probabilities, (np.arange(400) % 2 == 0).astype(float))
  assert fit.ece_after < 0.1


@pytest.mark.parametrize(
  ("right", "said"),
  [
    ([], "at least two answers .* found 0"),
    ([1], "found 1"),
    ([1] * 8, "all 8 right"),
    ([0] * 8, "all 8 wrong"),
  ],
)
def test_what_cannot_be_fitted_is_told(right, said):
  probabilities = np.full((len(right), len(TEMPERATURES)), 0.5)
  with pytest.raises(ValueError, match=said):
    calibration.fit(probabilities, np.array(right, float))


def test_the_last_temperature_is_told_as_that():
  """A model that is quite sure, and wrong every second time."""
  probabilities = np.exp(np.full((40, 1), -1e-6) / TEMPERATURES)
  fit = calibration.fit(probabilities, np.arange(40) % 4 < 2)
  assert fit.at_edge and fit.temperature == TEMPERATURES[0]
