"""Hiding spans of words in a text (BART, arXiv 1910.13461), as OFA's pretraining does."""

import math
from collections.abc import Callable, Sequence

import numpy as np

MEAN_LENGTH = 3.0  # words of a span
_LEAST = 1e-7  # of a length's probability, behind which there are no lengths
_LONGEST = 128


def mask_spans(
  tokens: Sequence[int],
  starts: Sequence[bool],
  *,
  mask: int,
  ratio: float,
  lengths: Callable[[int], np.ndarray],
  permutation: Callable[[int], np.ndarray],
  placed: Callable[[int], object] | None = None,
) -> list[int]:
  """Puts one `mask` in the place of each of some spans of whole words.

  Spans of no words are masks that are put between two tokens.

  Args:
    tokens: between the begin and the end of the text, which are among them.
    starts: True where a word begins; False at the begin and the end.
    mask: the id that takes a span's place.
    ratio: share of the words that is hidden, rounded up.
    lengths: n -> int[n], the lengths of spans as they are drawn.
    permutation: n -> int[n], the numbers below n in a random order.
    placed: is told how many spans of words there are, once their places are drawn.
  """
  tokens, starts = np.array(tokens), np.array(starts, int)
  hidden = math.ceil(starts.sum() * ratio)
  if not hidden:
    return tokens.tolist()
  spans = lengths(hidden)
  while spans.sum() < hidden:
    spans = np.concatenate([spans, lengths(hidden)])
  ends = np.cumsum(spans)
  last = int(np.argmax(ends >= hidden))
  spans = spans[: last + 1].copy()
  spans[last] -= ends[last] - hidden
  inserted = int((spans == 0).sum())
  spans = spans[spans > 0]
  if not len(spans):
    return _insert(tokens, inserted / len(tokens), mask, permutation)
  words = np.flatnonzero(starts)
  places = words[np.asarray(permutation(len(words)))[: len(spans)]]
  if placed is not None:
    placed(len(places))
  keep = np.ones(len(tokens), bool)
  tokens[places] = mask
  starts[-1] = _LONGEST + 1  # no span goes on over the end
  left = spans - 1
  while len(places):  # every span grows by a token, until the word behind its last one begins
    left = left - starts[places + 1]
    places, left = places[left >= 0] + 1, left[left >= 0]
    keep[places] = False
  tokens = tokens[keep]
  return _insert(tokens, inserted / len(tokens), mask, permutation)


def draw_lengths(rng: np.random.Generator, *, mean: float = MEAN_LENGTH) -> Callable:
  """`lengths` for `mask_spans`: Poisson's, cut where they are rare."""
  shares = length_shares(mean)
  return lambda number: rng.choice(len(shares), number, p=shares)


def length_shares(mean: float = MEAN_LENGTH) -> np.ndarray:
  """The probabilities float64[N] of spans of 0, 1, ... words."""
  probabilities, value = [], math.exp(-mean)
  while len(probabilities) <= _LONGEST and (value >= _LEAST or len(probabilities) < mean):
    probabilities.append(value)
    value *= mean / len(probabilities)
  return np.array(probabilities) / sum(probabilities)


def _insert(tokens, share, mask, permutation):
  """Masks put between the tokens, in number a share of these."""
  number = math.ceil(len(tokens) * share)
  if not number:
    return tokens.tolist()
  total = len(tokens) + number
  whole = np.full(total, mask)
  others = np.ones(total, bool)
  others[np.asarray(permutation(total - 2))[:number] + 1] = False
  whole[others] = tokens
  return whole.tolist()
