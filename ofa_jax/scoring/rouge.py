"""ROUGE (Lin 2004): coco-caption's ROUGE-L for captions, and Google's `rouge-score` for summaries.

The two differ in their words (as they stand; lower case without signs), in the weight of recall and
in how several references are put together.
"""

from collections.abc import Sequence

import numpy as np

BETA = 1.2  # coco-caption's weight of recall
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
  """Returns the ROUGE-L of each caption as coco-caption has it, float64[N].

  Precision and recall are each the best over the references, also when of different ones.

  Args:
    hypotheses: captions, their words separated by single spaces.
    references: for each hypothesis the captions of its image, at least one.

  Raises:
    ValueError: the numbers do not fit.
  """
  if len(hypotheses) != len(references) or not all(map(len, references)):
    raise ValueError(
      f"Expected at least one reference for each of {len(hypotheses)} hypotheses, found "
      f"{len(references)} groups of references."
    )
  return np.array([_caption(h, group) for h, group in zip(hypotheses, references, strict=True)])


def summary_scores(
  predictions: Sequence[str], references: Sequence[str], *, stem: bool = False
) -> dict[str, np.ndarray]:
  """Returns precision, recall and F of each summary, float64[N, 3] for each of `KINDS`.

  Args:
    predictions: summaries; for rougeLsum their sentences stand in lines.
    references: one for each.
    stem: whether words are compared by their Porter stems.

  Raises:
    ImportError: the `rouge-score` package is not installed.
    ValueError: the numbers do not fit.
  """
  scorer, _ = _package()
  if len(predictions) != len(references):
    raise ValueError(
      f"Expected one reference for each of {len(predictions)} summaries, found {len(references)}."
    )
  score = scorer.RougeScorer(KINDS, use_stemmer=stem).score
  rows = [score(r, p) for p, r in zip(predictions, references, strict=True)]
  return {kind: np.array([row[kind] for row in rows]).reshape(-1, 3) for kind in KINDS}


def check() -> None:
  """Raises ValueError where the `rouge-score` package is not installed."""
  try:
    _package()
  except ImportError as error:
    raise ValueError(str(error)) from error


def bootstrap(scores: dict[str, np.ndarray], *, seed: int = 0) -> dict[str, np.ndarray]:
  """Returns the medians of 1,000 resampled means, float64[3] a kind: the official aggregate.

  Args:
    scores: from `summary_scores`, at least one summary.
    seed: of NumPy's old generator, which the package draws from; its state is put back.
  """
  _, scoring = _package()
  aggregator = scoring.BootstrapAggregator()
  for row in zip(*scores.values(), strict=True):
    aggregator.add_scores({kind: scoring.Score(*s) for kind, s in zip(scores, row, strict=True)})
  state = np.random.get_state()
  np.random.seed(seed)
  try:
    return {kind: np.array(result.mid) for kind, result in aggregator.aggregate().items()}
  finally:
    np.random.set_state(state)


def _caption(hypothesis: str, references: Sequence[str]) -> float:
  words = hypothesis.split(" ")
  common = [(_longest_common(words, other), other) for other in (r.split(" ") for r in references)]
  precision = max(length / len(words) for length, _ in common)
  recall = max(length / len(other) for length, other in common)
  if not precision or not recall:
    return 0.0
  return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
  """Length of the longest common subsequence."""
  above = [0] * (len(right) + 1)
  for word in left:
    row = [0]
    for j, other in enumerate(right):
      row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    above = row
  return above[-1]


def _package():
  try:
    from rouge_score import rouge_scorer, scoring
  except ImportError as error:
    raise ImportError("Scoring summaries needs `pip install rouge-score`.") from error
  return rouge_scorer, scoring
