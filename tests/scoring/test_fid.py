"""Frechet distance and inception score against the originals' scripts."""

import numpy as np
import pytest

from ofa_jax.scoring import fid
from ofa_jax.scoring.fid import Moments, Statistics
from tests.frozen_golden import golden_json

METRICS = golden_json("fid_is", "metrics")


def normal(seed, shape):
  return np.random.default_rng(seed).normal(size=shape)


def cases():
  """The two sides of each golden case, by its name."""
  a, b = normal(11, (500, 16)), normal(12, (400, 16)) * 1.5 + 0.3
  f, g = normal(16, (500, 16)), normal(18, (500, 16))
  f[:, -1] = f[:, 0] + 1e-9 * normal(17, 500)
  g[:, -1] = g[:, 0]
  z, y = normal(19, (500, 16)), normal(20, (500, 16))
  z[:, 3] = y[:, 3] = 0.5
  y[:, 5] = 0
  sides = {
    "plain": (a, b),
    "correlated": (a @ normal(13, (16, 16)), b),
    "same": (a, a),
    "rank_deficient": (normal(14, (20, 64)), normal(15, (20, 64)) + 0.1),
    "nearly_singular": (f, g),
    "constant_columns": (z, y),
  }
  stored = {k: tuple(Moments.of(x).statistics for x in pair) for k, pair in sides.items()}
  zeros, nothing = np.zeros(16), np.zeros((16, 16))
  return stored | {
    "zero_covariance": (Statistics(zeros, nothing), Statistics(np.ones(16), nothing)),
    "one_dim": (Statistics(0.5, 2.0), Statistics(2.0, 3.0)),
    "zero_with_full": (
      Statistics(zeros, nothing),
      Statistics(zeros, Moments.of(a).statistics.covariance),
    ),
  }


@pytest.mark.parametrize("case", METRICS["frechet"], ids=lambda case: case["name"])
def test_distances_are_the_originals(case):
  found = fid.frechet_distance(*cases()[case["name"]])
  assert found == pytest.approx(case["value"], rel=1e-6, abs=1e-7)
  assert found == pytest.approx(case["pytorch_fid_value"], rel=1e-6, abs=1e-7)


def test_sums_of_parts_are_those_of_the_whole():
  x = normal(0, (90, 5)) * 10 + 300
  whole = Moments.of(x).statistics
  parts = (Moments.of(x[:13]) + Moments.of(x[13:14]) + Moments.of(x[14:])).statistics
  for found in (whole, parts):
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("case", METRICS["inception_score"], ids=lambda case: case["name"])
def test_scores_are_the_originals(case):
  seeds = {"plain": (2, 31, 50), "splits4": (2, 32, 64), "remainder": (3, 33, 37)}
  if case["name"] in seeds:
    factor, seed, number = seeds[case["name"]]
    logits = np.float32(factor * normal(seed, (number, 1000)))
  elif case["name"] == "identical":
    logits = np.float32(normal(34, (1, 1000)).repeat(10, 0))
  else:
    logits = np.full((20, 1000), -40, np.float32)
    logits[np.arange(20), 3 * np.arange(20)] = 40
  exp = np.exp(logits - logits.max(1, keepdims=True))
  mean, std = fid.inception_score(exp / exp.sum(1, keepdims=True), splits=case["splits"])
  assert mean == pytest.approx(case["mean"], rel=2e-6)
  assert std == pytest.approx(case["std"], rel=1e-4, abs=1e-9)


def test_statistics_are_stored_as_the_originals_read_them(tmp_path):
  statistics = Moments.of(normal(0, (9, 4))).statistics
  fid.save(tmp_path / "real.npz", statistics)
  with np.load(tmp_path / "real.npz") as arrays:
    np.testing.assert_array_equal(arrays["mu"], statistics.mean)
    np.testing.assert_array_equal(arrays["sigma"], statistics.covariance)
  found = fid.load(tmp_path / "real.npz")
  assert fid.frechet_distance(found, statistics) == pytest.approx(0, abs=1e-9)


def test_what_does_not_fit_is_told(tmp_path):
  one, two = (Moments.of(normal(0, (9, width))).statistics for width in (4, 6))
  with pytest.raises(ValueError, match=r"one width, found mean \[4\].*different models or blocks"):
    fid.frechet_distance(one, two)
  with pytest.raises(ValueError, match="one width, found 4 and 6"):
    Moments.of(normal(0, (9, 4))) + Moments.of(normal(0, (9, 6)))
  with pytest.raises(ValueError, match="at least two pictures for a covariance, found 1"):
    Moments.of(normal(0, (1, 4))).statistics  # noqa: B018
  with pytest.raises(ValueError, match="finite features"):
    Moments.of(np.full((3, 4), np.nan)).statistics  # noqa: B018
  with pytest.raises(ValueError, match=r"\[N, C\] of at least 5 pictures, found \[3, 4\]"):
    fid.inception_score(np.full((3, 4), 0.25), splits=5)
  with pytest.raises(ValueError, match="found no file"):
    fid.load(tmp_path / "none.npz")
  (tmp_path / "text.npz").write_text("hello")
  with pytest.raises(ValueError, match="arrays mu and sigma"):
    fid.load(tmp_path / "text.npz")
  np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.zeros((4, 4)))
  with pytest.raises(ValueError, match=r"found \[3\] and \[4, 4\]"):
    fid.load(tmp_path / "other.npz")
  negative = Statistics(np.zeros(4), -np.eye(4))
  with pytest.raises(ValueError, match="imaginary part of 1"):
    fid.frechet_distance(Statistics(np.zeros(4), np.eye(4)), negative)
