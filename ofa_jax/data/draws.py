"""What is drawn for an example, from a source that can be exchanged.

A task asks for its random numbers by what they decide, in a fixed order. `Drawn` takes them from a
row's generator; those of `data/original_draws.py` are the original's.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from ofa_jax.data.span_mask import draw_lengths

T = TypeVar("T")


class Uniform(Protocol):
  """The two methods of `np.random.Generator` that `random_augment` asks."""

  def integers(self, high: int, *, size: int) -> np.ndarray:
    """int[size] below `high`."""

  def random(self) -> float:
    """From 0 to below 1."""


class Draws(Protocol):
  """A source of random numbers.

  Attributes:
    augment: what `random_augment` draws from.
  """

  augment: Uniform

  def choice(self, options: Sequence[T]) -> T:
    """One of the options."""

  def random(self) -> float:
    """From 0 to below 1."""

  def uniform(self, number: int) -> np.ndarray:
    """float32[number] from 0 to below 1."""

  def lengths(self, number: int, *, mean: float) -> np.ndarray:
    """int[number], words of spans, see `span_mask.draw_lengths`."""

  def permutation(self, number: int) -> np.ndarray:
    """int[number], the numbers below it in a random order."""

  def unused(self, number: int) -> None:
    """Numbers that the original draws here, of which nothing depends."""


class Drawn:
  """Draws of a row's own generator.

  Args:
    rng: the generator.
    augment: what augments pictures; None: the generator, too.
  """

  def __init__(self, rng: np.random.Generator, *, augment: Uniform | None = None):
    self._rng = rng
    self.augment = rng if augment is None else augment

  def choice(self, options: Sequence[T]) -> T:
    """See `Draws`."""
    return options[int(self._rng.integers(len(options)))]

  def random(self) -> float:
    """See `Draws`."""
    return float(self._rng.random())

  def uniform(self, number: int) -> np.ndarray:
    """See `Draws`."""
    return self._rng.random(number, np.float32)

  def lengths(self, number: int, *, mean: float) -> np.ndarray:
    """See `Draws`."""
    return draw_lengths(self._rng, mean=mean)(number)

  def permutation(self, number: int) -> np.ndarray:
    """See `Draws`."""
    return self._rng.permutation(number)

  def unused(self, number: int) -> None:
    """See `Draws`; nothing is drawn."""
