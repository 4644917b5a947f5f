"""Metrics of optical character recognition: exact texts, and edits that are needed."""

from collections.abc import Sequence

import numpy as np


def accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
  """The share of answers that equal their reference, of at least one."""
  return float(np.mean([a == r for a, r in zip(answers, references, strict=True)]))


def normalized_similarity(answers: Sequence[str], references: Sequence[str]) -> float:
  """The original's "ned", of at least one: 1 - mean(edits / characters of the longer text).

  Two empty texts are equal; the original divides by zero.
  """
  pairs = zip(answers, references, strict=True)
  parts = [edit_distance(a, r) / max(len(a), len(r), 1) for a, r in pairs]
  return float(1 - np.mean(parts))


def edit_distance(one: str, other: str) -> int:
  """Characters to insert, to leave out or to replace (Levenshtein)."""
  # Row by row of the usual table. What a row gains by insertions is the least of all places before
  # it, each with its distance: a running minimum of the costs without their place.
  letters, places = np.array(list(other), "U1"), np.arange(len(other) + 1)
  costs = places
  for number, letter in enumerate(one, 1):
    replaced = costs[:-1] + (letters != letter)
    best = np.minimum(replaced, costs[1:] + 1)
    costs = np.minimum.accumulate(np.concatenate([[number], best]) - places) + places
  return int(costs[-1])
