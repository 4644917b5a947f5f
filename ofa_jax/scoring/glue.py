"""GLUE's metrics (arXiv 1804.07461) of predictions that are right or wrong about one class.

F1 and Matthews' correlation are quotients. Where the divisor is zero they are undefined; there the
original stops with an error.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Counts(NamedTuple):
  """Rows by what was predicted and what is right, of a class against all others."""

  true_positive: int
  false_positive: int
  false_negative: int
  true_negative: int

  @property
  def f1(self) -> float | None:
    """The harmonic mean of precision and recall; None where nothing is or was said to be right."""
    divisor = 2 * self.true_positive + self.false_positive + self.false_negative
    return 2 * self.true_positive / divisor if divisor else None

  @property
  def matthews(self) -> float | None:
    """Matthews' correlation, -1 to 1; None where all predictions or all labels are of one class."""
    tp, fp, fn, tn = self
    divisor = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(divisor) if divisor else None


def accuracy(predictions: Sequence[str], labels: Sequence[str]) -> float:
  """The share of predictions that equal their label, of at least one."""
  return sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels)


def count(predictions: Sequence[str], labels: Sequence[str], *, positive: str) -> Counts:
  """Counts predictions of a class."""
  pairs = [(p == positive, y == positive) for p, y in zip(predictions, labels, strict=True)]
  kinds = ((True, True), (True, False), (False, True), (False, False))
  return Counts(*(pairs.count(kind) for kind in kinds))
