"""The original's draws: written down, or out of the generators that it seeds.

An example of the original whose draws were written down is made again by `Replayed`; `Seeded` makes
those of a process that began with `random.seed`, `np.random.seed` and `torch.manual_seed`, without
any of the draws. Both are for `made` of `tasks/pretrain_parts.py`, which training calls, too.

The original augments all pictures of an epoch alike: it seeds numpy anew before every row, with
numbers that do not have the row among them. `augmenting(epoch)` is what it then has.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from ofa_jax.data.draws import Uniform
from ofa_jax.data.span_mask import length_shares

T = TypeVar("T")

SEED = 7  # of the original's data sets: --pretrain-seed


class Replayed:
  """Draws that were written down: `[what, ..., value]` each, in the order in which they were made.

  What was chosen is written as text. A draw of another kind than is asked for is a ValueError.

  Args:
    draws: they, such as ["random.choice", "cart"], ["random.random", 0.75], ["torch.rand", [0.2]],
      ["torch.randperm", 2, [1, 0]] or ["Categorical.sample(span lengths)", [3, 1]].
    augment: what augments pictures, such as `augmenting(1)`.
  """

  def __init__(self, draws: Iterable[Sequence[Any]], *, augment: Uniform):
    self._draws = iter(draws)
    self.augment = augment

  @property
  def left(self) -> list[Sequence[Any]]:
    """Those that nobody asked for; none are left afterwards."""
    return list(self._draws)

  def choice(self, options: Sequence[T]) -> T:
    """See `Draws`."""
    text = self._next("random.choice")
    for option in options:
      if str(option) == text:
        return option
    raise ValueError(f"Expected a choice out of {list(options)[:20]}, found {text!r}")

  def random(self) -> float:
    """See `Draws`."""
    return self._next("random.random")

  def uniform(self, number: int) -> np.ndarray:
    """See `Draws`."""
    return self._several("torch.rand", number).astype(np.float32)

  def lengths(self, number: int, *, mean: float) -> np.ndarray:
    """See `Draws`."""
    del mean
    return self._several("Categorical.sample", number)

  def permutation(self, number: int) -> np.ndarray:
    """See `Draws`."""
    return self._several("torch.randperm", number)

  def unused(self, number: int) -> None:
    """See `Draws`; these were not written down."""

  def _next(self, kind: str) -> Any:
    name, *values = next(self._draws, ["nothing"])
    if not name.startswith(kind) or not values:
      raise ValueError(f"Expected a draw of {kind}, found {name}")
    return values[-1]

  def _several(self, kind: str, number: int) -> np.ndarray:
    values = np.array(self._next(kind))
    if len(values) != number:
      raise ValueError(f"Expected {number} draws of {kind}, found {len(values)}")
    return values


class Seeded:
  """Draws of the generators of a process that seeded all three with a number.

  Of texts with so few words that one span is drawn alone, PyTorch goes another way, which depends
  on how it was built: those are not the same.

  Args:
    seed: the number, below 2^32.
    augment: what augments pictures; None: numpy's generator, seeded with the number.
  """

  def __init__(self, seed: int, *, augment: Uniform | None = None):
    self.augment = _Numpy(seed) if augment is None else augment
    self._python, self._torch = random.Random(seed), np.random.RandomState(seed)

  def choice(self, options: Sequence[T]) -> T:
    """See `Draws`."""
    return self._python.choice(options)

  def random(self) -> float:
    """See `Draws`."""
    return self._python.random()

  def uniform(self, number: int) -> np.ndarray:
    """See `Draws`."""
    return (self._bits(number) & (2**24 - 1)).astype(np.float32) / np.float32(2**24)

  def lengths(self, number: int, *, mean: float) -> np.ndarray:
    """See `Draws`."""
    shares = length_shares(mean).astype(np.float32)
    ends = np.cumsum(shares / shares.sum(dtype=np.float32), dtype=np.float32)
    high, low = self._bits(2 * number).reshape(number, 2).T
    drawn = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) / 2**53
    return np.searchsorted(ends / ends[-1], drawn)

  def permutation(self, number: int) -> np.ndarray:
    """See `Draws`."""
    order = np.arange(number)
    for i, bits in enumerate(self._bits(max(number - 1, 0))):
      other = i + int(bits) % (number - i)
      order[i], order[other] = order[other], order[i]
    return order

  def unused(self, number: int) -> None:
    """See `Draws`."""
    self._bits(number)

  def _bits(self, number: int) -> np.ndarray:
    """uint64[number] below 2^32, of the Mersenne Twister that PyTorch draws from on CPUs."""
    return self._torch.randint(0, 2**32, size=number, dtype=np.uint32).astype(np.uint64)


class _Numpy:
  """numpy's global generator of old."""

  def __init__(self, seed: int):
    self._random = np.random.RandomState(seed)

  def integers(self, high: int, *, size: int) -> np.ndarray:
    return self._random.randint(0, high, size=size)

  def random(self) -> float:
    return float(self._random.random_sample())


def augmenting(epoch: int, *, seed: int = SEED, before_3_8: bool = False) -> Uniform:
  """What the original augments every picture of an epoch with, anew for each of them.

  Args:
    epoch: from 1.
    seed: of the data set.
    before_3_8: as Python 3.7 hashes, which the original was run with; newer ones do otherwise.
  """
  hashed = _hash_before_3_8(seed, epoch) if before_3_8 else hash((seed, epoch))
  return _Numpy(int(hashed % 1e6))


def epoch_of(rng: np.random.Generator) -> int:
  """The epoch, from 1, of a row whose generator `data.pipeline` made: it is part of the seed."""
  return int(rng.bit_generator.seed_seq.entropy[1]) + 1


def _hash_before_3_8(*numbers: int) -> int:
  """The hash of a tuple of small numbers, as Python had it before 3.8."""
  value, factor, left, word = 0x345678, 1000003, len(numbers), 2**64
  for number in numbers:
    left -= 1
    value = ((value ^ hash(number)) * factor) % word
    factor += 82520 + 2 * left
  value = (value + 97531) % word
  return value - word if value >= word // 2 else value
