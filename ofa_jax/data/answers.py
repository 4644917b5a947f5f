"""Lists of the answers that a model may give, in the order of their numbers.

The original's `trainval_ans2label.pkl` is a pickled dict, answer -> number; the same as JSON, a
JSON list, and a text file with one answer a line are read too. Without a file the list is counted.
"""

import collections
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from ofa_jax import storage, text_files
from ofa_jax.data import plain_pickle

PICKLES = (".pkl", ".pickle", ".p")


def load(path: str | pathlib.Path) -> tuple[str, ...]:
  """The answers in a file: a pickle by its ending, JSON by its content, or one answer a line.

  Raises:
    ValueError: the file is missing, holds something else, no answer, or an empty one.
  """
  return tuple(_listed(storage.of(path)))


def numbered(path: str | pathlib.Path) -> tuple[str, ...]:
  """The answers by their numbers, where the file has such from 0 or 1 on; else as they stand there.

  Raises:
    ValueError: as for `load`, or the numbers of an object are no such.
  """
  listed = _listed(storage.of(path))
  if isinstance(listed, list):
    return tuple(listed)
  whole = [value for value in listed.values() if type(value) is int]
  ordered = sorted(whole)
  if len(whole) < len(listed) or ordered != list(range(ordered[0], ordered[0] + len(listed))):
    raise ValueError(
      f"Expected the {len(listed)} answers in {path} to have the numbers from 0 on, each once, "
      f"found {str(list(listed.values())[:5])[1:-1]} ..."
    )
  return tuple(sorted(listed, key=listed.get))


def _listed(path: pathlib.Path) -> list[str] | dict[str, Any]:
  """The answers in a file, checked, with their numbers if it has such."""
  try:
    if path.suffix in PICKLES:
      listed = plain_pickle.load(storage.read_bytes(path))
    else:
      text = text_files.read(path)
      if text.lstrip()[:1] in ("{", "["):
        listed = json.loads(text)
      else:
        listed = [line.strip() for line in text.splitlines() if line.strip()]
  except (OSError, ValueError, RecursionError) as error:  # of which JSONDecodeError is
    raise ValueError(
      f"Expected answers in {path}: a pickled or JSON object answer -> number, a JSON list, or one "
      f"answer a line; found {error}"
    ) from error
  if not isinstance(listed, list | dict) or not all(type(text) is str for text in listed):
    raise ValueError(
      f"Expected answers in {path}, texts in a list or as the keys of an object, found "
      f"{type(listed).__name__}{'' if not isinstance(listed, list | dict) else ' of other things'}"
    )
  empty = [str(i) for i, text in enumerate(listed) if not text.strip()]
  if empty or not listed:
    number = f"{len(empty)} empty: numbers {', '.join(empty[:5])}" if empty else "none"
    raise ValueError(f"Expected answers with words in them in {path}, found {number}")
  return listed


def counted(answers: Iterable[str], *, least: int) -> tuple[str, ...]:
  """Those that come at least so often: the most frequent first, equal ones by the alphabet.

  Raises:
    ValueError: none does.
  """
  counts = collections.Counter(text for text in answers if text.strip())
  kept = sorted((-count, text) for text, count in counts.items() if count >= least)
  if not kept:
    raise ValueError(
      f"Expected answers that come at least {least} times in the training data, found none among "
      f"{len(counts)} different ones; lower the number, or give a file of answers"
    )
  return tuple(text for _, text in kept)
