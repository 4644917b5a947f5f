"""Spans of words are hidden as in the original, draw by draw."""

import numpy as np

from ofa_jax.data.span_mask import draw_lengths, mask_spans
from tests.ofa_golden import golden_json

MASK = 50264


def replayed(draws, kind):
  """What the original drew, next, of a kind; each as many as it is asked for."""

  def draw(number):
    name, *drawn = next(draws)
    assert name.startswith(kind)
    assert (len(drawn[0]) if kind == "Categorical" else drawn[0]) == number
    return np.array(drawn[-1])

  return draw


def test_spans_are_those_of_the_original():
  cases = golden_json("infilling/whole_word_mask")
  assert len(cases) == 30
  for case in cases:
    draws = iter(case["random_draws"])
    hidden = mask_spans(
      case["input"],
      case["word_starts"],
      mask=MASK,
      ratio=case["mask_ratio"],
      lengths=replayed(draws, "Categorical"),
      permutation=replayed(draws, "torch.randperm"),
    )
    assert hidden == case["output"]
    assert next(draws, None) is None


def test_a_share_of_the_words_is_hidden():
  rng = np.random.default_rng(0)
  tokens, starts = [0, *range(10, 30), 2], [False, *[True] * 20, False]
  left = []
  for _ in range(200):
    hidden = mask_spans(
      tokens,
      starts,
      mask=MASK,
      ratio=0.3,
      lengths=draw_lengths(rng),
      permutation=rng.permutation,
    )
    assert hidden[0] == 0 and hidden[-1] == 2
    words = [token for token in hidden[1:-1] if token != MASK]
    assert words == sorted(words) and len(words) >= 14
    left.append(len(words))
  assert 14 <= np.mean(left) < 15.5  # spans may meet, or end with the text


def test_nothing_is_hidden_of_no_words():
  options = {"mask": MASK, "lengths": None, "permutation": None}
  assert mask_spans([0, 5, 2], [False, False, False], ratio=0.3, **options) == [0, 5, 2]
  assert mask_spans([0, 5, 2], [False, True, False], ratio=0.0, **options) == [0, 5, 2]


def test_lengths_are_poissons():
  drawn = draw_lengths(np.random.default_rng(0), mean=3.0)(20_000)
  assert abs(drawn.mean() - 3) < 0.05 and abs(drawn.var() - 3) < 0.12 and drawn.max() < 18
