"""What a task of OFA asks, how it searches and how its answers are told: in one place.

Each task's file has one `Answering`, for its training and evaluations, the API and the command.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from ofa_jax.decode.beam import Search
from ofa_jax.tokenizers.ofa import OFATokenizer


def _as_it_is(answer: Any, scale: np.ndarray) -> Any:
  del scale
  return answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering:
  """The words of a task.

  Attributes:
    prompt: `(texts by name, whether in Chinese) -> str`, what the model is asked.
    columns: places in the original's files, from 0, of a row's "id", its "image" and the texts of
      its prompt: "text", "premise".
    id: what the row's id is called in result files.
    result: what the answer is called there.
    number_ids: ids that are whole numbers are written as such.
    searched_as: under which name `OFAModel.searches` has the search.
    search: how answers are searched for, as in the original's scripts.
    reads_prompt: whether the decoder, too, reads the prompt before it answers.
    ends_prompt: whether it then reads the prompt's end as well.
    marks: whether "<mask>" in the prompt is the dictionary's symbol, not a text like any other.
    choices: all that may be answered, and what each is called; None: anything.
    square: `(picture, its side) -> uint8[S, S, 3]`, what the model sees of a picture in evaluations
      and inference; None: the whole of it, squashed.
    tell: `(answer, scale) -> JSON`, the answer as result files have it; scale is the stored
      picture's width and height divided by those that the model was given.
  """

  prompt: Callable[[Mapping[str, str], bool], str]
  columns: Mapping[str, int]
  id: str
  result: str
  number_ids: bool = False
  searched_as: str = "answer"
  search: Search = dataclasses.field(default_factory=Search)
  reads_prompt: bool = False
  ends_prompt: bool = False
  marks: bool = False
  choices: Mapping[str, str] | None = None
  square: Callable[[Image.Image, int], np.ndarray] | None = None
  tell: Callable[[Any, np.ndarray], Any] = _as_it_is

  def called(self, answer: str) -> str:
    """What an answer is called in results."""
    return answer if self.choices is None else self.choices.get(answer, answer)

  def told_id(self, text: str) -> str | int:
    """A row's id as result files have it."""
    return int(text) if self.number_ids and text.isdecimal() and len(text) < 100 else text


def read(tokenizer: OFATokenizer, tokens: np.ndarray) -> str:
  """The text of an answer, int32[N] with its end and padding."""
  return tokenizer.decode(tokens).strip()
