"""CMMD and CLIPSIM against their definitions."""

import itertools
import math

import numpy as np
import pytest

from ofa_jax.scoring import clip_scores


def features(seed, number, width=6):
  return np.random.default_rng(seed).normal(size=(number, width)) * 3


def kernel(a, b):
  a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
  return math.exp(-np.square(a - b).sum() / (2 * 10**2))


def test_cmmd_is_the_papers(monkeypatch):
  """The unbiased estimate of the paper's equation, and the biased one of its published code."""
  monkeypatch.setattr(clip_scores, "_ROWS", 3)  # several parts
  x, y = features(0, 7), features(1, 5) + 1
  between = np.mean([kernel(a, b) for a in x for b in y])
  unbiased = sum(np.mean([kernel(*pair) for pair in itertools.permutations(z, 2)]) for z in (x, y))
  biased = sum(np.mean([kernel(a, b) for a in z for b in z]) for z in (x, y))
  assert clip_scores.cmmd(x, y) == pytest.approx(1000 * (unbiased - 2 * between), abs=1e-9)
  found = clip_scores.cmmd(x, y, unbiased=False)
  assert found == pytest.approx(1000 * (biased - 2 * between), abs=1e-9)


def test_cmmd_of_equal_distributions_is_zero_in_the_mean():
  """However few the pictures are, which a biased estimate is not."""
  pairs = [(features(2 * i, 8), features(2 * i + 1, 8)) for i in range(200)]
  found = np.mean([clip_scores.cmmd(*pair) for pair in pairs])
  biased = np.mean([clip_scores.cmmd(*pair, unbiased=False) for pair in pairs])
  assert abs(found) < 0.1 < 1 < biased
  assert clip_scores.cmmd(features(0, 50), features(1, 50) + 5) > 3


def test_clipsim_is_the_mean_cosine():
  x, y = features(0, 4), features(1, 4)
  cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)]
  assert clip_scores.clipsim(x, y) == pytest.approx(np.mean(cosines))
  assert clip_scores.clipsim(x, 7 * x) == pytest.approx(1)


def test_what_does_not_fit_is_told():
  with pytest.raises(ValueError, match="one CLIP, found widths 6 and 5"):
    clip_scores.cmmd(features(0, 4), features(0, 4, width=5))
  with pytest.raises(ValueError, match="at least 2 pictures on each side, found 1 and 4"):
    clip_scores.cmmd(features(0, 1), features(0, 4))
  with pytest.raises(ValueError, match="as many pictures as captions"):
    clip_scores.clipsim(features(0, 3), features(0, 4))
