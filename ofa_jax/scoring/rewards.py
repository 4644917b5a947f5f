"""What learning from rewards rewards: scores of texts beside those that people wrote.

A reward is one function, `(texts, references) -> scores`: `rouge.rouge_l` is one as it stands, and
so is a user's own. One that has to see the references of the training data before has a method
`learn`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from ofa_jax.scoring.bleu import bleu
from ofa_jax.scoring.cider import Frequencies, cider_d

References = Sequence[Sequence[str]]


class Reward(Protocol):
  """A score of each text, the higher the better; the same wherever and whenever it is asked."""

  def __call__(self, texts: Sequence[str], references: References) -> Sequence[float] | np.ndarray:
    """N scores.

    Args:
      texts: N of them.
      references: for each text those of its row, at least one.
    """


@dataclasses.dataclass(kw_only=True)
class CiderD:
  """CIDEr-D as in the original's self-critical training: every text ends with a word of its own.

  A text that breaks off has other last n-grams than one that ends, and so is told from it.

  Attributes:
    frequencies: file of the n-grams' document frequencies, the original's `coco-train-words.p`, or
      what `cider.Frequencies.save` wrote; None: they are counted over the training references.
  """

  frequencies: str | None = None
  counted: Frequencies | None = dataclasses.field(
    default=None, init=False, repr=False, compare=False
  )

  def learn(self, corpus: Iterable[Sequence[str]]) -> None:
    """Opens the file of frequencies or counts those of the references, a group for each row.

    Raises:
      ValueError: the file is missing or something else.
    """
    if self.frequencies is not None:
      self.counted = _load(self.frequencies)
    else:
      self.counted = Frequencies.of([_ended(text) for text in group] for group in corpus)

  def __call__(self, texts: Sequence[str], references: References) -> np.ndarray:
    if self.counted is None:
      raise ValueError(
        "CiderD: expected document frequencies, found none; call `learn`, with the references of "
        "the training data where no file is given"
      )
    groups = [[_ended(text) for text in group] for group in references]
    return cider_d([_ended(text) for text in texts], groups, frequencies=self.counted)


@dataclasses.dataclass(kw_only=True)
class Weighted:
  """A weighted sum of rewards.

  Attributes:
    parts: weights and rewards.
  """

  parts: tuple[tuple[float, Reward], ...]

  def learn(self, corpus: Iterable[Sequence[str]]) -> None:
    """Lets every part see the references."""
    corpus = list(corpus)
    for _, reward in self.parts:
      learn(reward, corpus)

  def __call__(self, texts: Sequence[str], references: References) -> np.ndarray:
    return sum(
      weight * np.asarray(reward(texts, references), np.float64) for weight, reward in self.parts
    )


def learn(reward: Reward, corpus: Iterable[Sequence[str]]) -> None:
  """Lets a reward see the references of the training data, where it wants to."""
  if hasattr(reward, "learn"):
    reward.learn(corpus)


def bleu4(texts: Sequence[str], references: References) -> np.ndarray:
  """BLEU-4 of each text by itself, not smoothed: 0 without a common word sequence of four."""
  return np.array([bleu([t], [group])[3] for t, group in zip(texts, references, strict=True)])


def length_gap(texts: Sequence[str], references: References) -> np.ndarray:
  """Minus the words that a text is longer or shorter than the reference of the nearest length.

  As a part of `Weighted` it keeps texts from growing or shrinking.
  """
  gaps = [
    min(abs(len(other.split()) - len(text.split())) for other in group)
    for text, group in zip(texts, references, strict=True)
  ]
  return -np.array(gaps, np.float64)


def leave_one_out(scores: np.ndarray, there: np.ndarray) -> np.ndarray:
  """Each score minus the mean of the others of its row, float64[B, M].

  Args:
    scores: float[B, M].
    there: bool[B, M], False where there is no sample; its value is 0, and so is that of one that
      is alone.
  """
  scores = np.where(there, np.asarray(scores, np.float64), 0.0)
  others = there.sum(axis=1, keepdims=True) - 1
  baseline = (scores.sum(axis=1, keepdims=True) - scores) / np.maximum(others, 1)
  return np.where(there & (others > 0), scores - baseline, 0.0)


def _ended(text: str) -> str:
  return f"{text.strip().removesuffix('.')} <eos>"


@functools.lru_cache(maxsize=1)
def _load(path: str) -> Frequencies:
  """Read once; ValueError where it cannot be."""
  return Frequencies.load(path)
