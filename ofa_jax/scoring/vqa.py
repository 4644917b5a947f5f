"""Answers to questions about images and their score (VQA v2, arXiv 1612.00837).

OFA's files hold the ten people's answers of a question as `0.3|!+2&&0.9|!+red and white`: each
answer with its confidence, which is what VQA's accuracy gives for it, min(people / 3, 1) as the
official formula averages it.
"""

import math
from collections.abc import Mapping, Sequence

from ofa_jax.data.text import REFERENCES

CONFIDENCE = "|!+"  # between an answer's confidence and the answer


def confidences(text: str) -> dict[str, float]:
  """The confidence of each answer in a column of the original's files; none in an empty one.

  Of an answer that is there twice the last counts.

  Raises:
    ValueError: an answer is empty, or has no number as its confidence.
  """
  values = {}
  for part in text.split(REFERENCES) if text.strip() else ():
    number, separator, answer = part.partition(CONFIDENCE)
    try:
      value = float(number)
    except ValueError:
      value = math.nan
    if not separator or not answer.strip() or not 0 <= value < math.inf:
      raise ValueError(
        f"expected answers as confidence{CONFIDENCE}answer, {REFERENCES} between them, found "
        f"{part[:60]!r}"
      )
    values[answer] = value
  return values


def best(answers: Mapping[str, float]) -> str:
  """The answer of the highest confidence, the first of equal ones: what is learnt."""
  return max(answers, key=answers.__getitem__)


def score(answers: Sequence[str], references: Sequence[Mapping[str, float]]) -> float:
  """The mean confidence of the answers given, 0 for one that nobody gave: the original's score.

  Args:
    answers: one a question.
    references: the confidences of each question's answers.
  """
  given = [reference.get(text, 0.0) for text, reference in zip(answers, references, strict=True)]
  return sum(given) / len(given)
