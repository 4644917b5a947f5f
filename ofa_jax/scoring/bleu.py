"""Corpus BLEU of captions with the conventions of coco-caption (Papineni et al. 2002).

Of several references the one nearest in length counts for brevity, of equally near ones the
shorter; an order without matches is not smoothed but for 1e-15.
"""

import collections
from collections.abc import Sequence

import numpy as np

ORDERS = 4

_TINY, _SMALL = 1e-15, 1e-9  # coco-caption's, against division by zero


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
  """Returns BLEU-1 to BLEU-4 of the whole corpus as fractions, float64[4].

  Args:
    hypotheses: captions, their words separated by white space.
    references: for each hypothesis the captions of its image, at least one.

  Raises:
    ValueError: the numbers do not fit, or there is nothing to score.
  """
  if not hypotheses or len(hypotheses) != len(references) or not all(map(len, references)):
    raise ValueError(
      f"Expected hypotheses and at least one reference for each, found {len(hypotheses)} "
      f"hypotheses and {len(references)} groups of references."
    )
  right, guessed, length, wanted = np.zeros(ORDERS), np.zeros(ORDERS), 0, 0
  for hypothesis, group in zip(hypotheses, references, strict=True):
    words, others = hypothesis.split(), [caption.split() for caption in group]
    length += len(words)
    wanted += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    allowed = collections.Counter()
    for other in others:
      allowed |= _count(other)  # the larger count of each n-gram
    for ngram, count in (_count(words) & allowed).items():
      right[len(ngram) - 1] += count
    guessed += np.maximum(len(words) - np.arange(ORDERS), 0)
  precision = (right + _TINY) / (guessed + _SMALL)
  ratio = (length + _TINY) / (wanted + _SMALL)
  brevity = np.exp(1 - 1 / ratio) if ratio < 1 else 1.0
  return brevity * np.cumprod(precision) ** (1 / np.arange(1, ORDERS + 1))


def _count(words: Sequence[str]) -> collections.Counter:
  return collections.Counter(
    tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1)
  )
