"""Summaries of Gigaword as they are compared with the references, whose words are the Treebank's.

OFA writes words as its vocabulary has them; the original puts them into the form of the references
before it scores them by ROUGE (`scoring/rouge.py`).
"""

import string
from collections.abc import Sequence

import numpy as np

from ofa_jax.scoring import rouge

KINDS = ("rouge1", "rouge2", "rougeL")

_NAMES = {
  "(": "-lrb-",
  ")": "-rrb-",
  "[": "-lsb-",
  "]": "-rsb-",
  "{": "-lcb-",
  "}": "-rcb-",
  "[UNK]": "UNK",
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
}
_QUOTES = {'"': ("``", "''"), "'": ("`", "'")}  # opening, closing
_ENDINGS = ("s", "d", "ll")  # behind an apostrophe


def fix_tokenization(text: str) -> str:
  """Returns a text with brackets, quotes, contractions, numbers and hyphens as the Treebank's.

  As in the original, quotes open and close in turn wherever they stand, and what is behind the
  second letter of an acronym stands there twice.
  """
  words, fixed = text.split(), []
  opened = dict.fromkeys(_QUOTES, False)
  at, glued = 0, False
  while at < len(words):
    word, rest = words[at], words[at + 1 :]
    glue, used = glued, 1
    glued = False
    if word in _NAMES:
      fixed.append(_NAMES[word])
    elif word == "'" and fixed and fixed[-1].endswith("n") and rest[:1] == ["t"]:
      fixed[-1] = fixed[-1][:-1]
      fixed.append("n't")
      used = 2
    elif word == "'" and rest and rest[0] in _ENDINGS:
      fixed.append(f"'{rest[0]}")
      used = 2
    elif word in _QUOTES:
      fixed.append(_QUOTES[word][opened[word]])
      opened[word] = not opened[word]
    elif word == "." and rest[:2] == [".", "."]:
      fixed.append("...")
      used = 3
    elif joins := _number(word, fixed, rest) or _acronym(word, fixed, rest):
      fixed[-1] += joins
      used = 2
    elif word == "-" and rest[:1] == ["-"]:
      fixed.append("--")
      used = 2
    elif word == "-":
      glued = bool(fixed and rest) and fixed[-1] not in string.punctuation
      glued = glued and rest[0][0] not in string.punctuation
      if glued:
        fixed[-1] += "-"
      else:
        fixed.append("-")
    elif glue and word[0] not in string.punctuation:
      fixed[-1] += word
    else:
      fixed.append(word)
    at += used
  return " ".join(fixed)


def hypothesis(text: str, *, validation: bool = False) -> str:
  """Returns an answer as it is scored: lower case, the Treebank's words, "#" for "1".

  Args:
    text: what the model wrote.
    validation: as while training, where "<unk>" becomes " unk"; else as in the last evaluation.
  """
  text = fix_tokenization(text.lower().strip())
  if validation:
    text = text.replace("<unk>", " unk")
  return text.replace("1", "#")


def scores(
  answers: Sequence[str], references: Sequence[str], *, bootstrap: bool = False
) -> dict[str, float]:
  """The original's ROUGE in percent, words compared by their stems.

  Args:
    answers: what the model wrote, at least one.
    references: one for each.
    bootstrap: whether the F of the last evaluation is there, too: the median of resampled means.

  Returns:
    "rouge1_f1", "rouge1_recall" and those of rouge2 and rougeL, means as while training; with
    `bootstrap` also "rouge1", "rouge2" and "rougeL".

  Raises:
    ImportError: the `rouge-score` package is not installed.
  """
  references = [text.lower() for text in references]
  told = [hypothesis(text, validation=True) for text in answers]
  rows = rouge.summary_scores(told, references, stem=True)
  values = {}
  for kind in KINDS:
    _, values[f"{kind}_recall"], values[f"{kind}_f1"] = 100 * np.mean(rows[kind], axis=0)
  if bootstrap:
    last = [hypothesis(text) for text in answers]
    rows = rows if last == told else rouge.summary_scores(last, references, stem=True)
    medians = rouge.bootstrap(rows)
    values |= {kind: 100 * medians[kind][2] for kind in KINDS}
  return {name: float(value) for name, value in values.items()}


def _number(word: str, before: Sequence[str], after: Sequence[str]) -> str:
  """What a comma or a point between digits adds to those before it; "" where it is none."""
  if not before or not after:
    return ""
  if word == "," and all(c.isdigit() or c == "," for c in before[-1] + after[0]):
    return f",{after[0]}"
  if word == "." and before[-1].isdigit() and after[0].isdigit():
    return f".{after[0]}"
  return ""


def _acronym(word: str, before: Sequence[str], after: Sequence[str]) -> str:
  """What a point in an acronym adds to the capital before it: ". N ." of "U . N ."; or ""."""
  if word != "." or not before or not (len(before[-1]) == 1 and before[-1].isupper()):
    return ""
  length = 0
  while len(after) > length + 1 and len(after[length]) == 1 and after[length + 1] == ".":
    length += 2
  return "".join((word, *after[:length])) if length else ""
