"""Answering questions about images (OFA, arXiv 2202.03052, section 3.3; VQA v2, arXiv 1612.00837).

A row has a question and people's answers with their confidences; the answer of the highest
confidence is learnt, with that confidence as its weight. The names of the objects that a detector
saw may stand behind the question. Answers come from a list, which is then learnt with ("constrained
training") and chosen from, or they are free.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ofa_jax import pictures
from ofa_jax.data import answers as answer_lists
from ofa_jax.data import prompts
from ofa_jax.data.text import pre_question
from ofa_jax.data.tsv import IMAGE, BadRow, Table
from ofa_jax.decode.beam import Search
from ofa_jax.scoring import vqa
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.choice import Choices
from ofa_jax.tasks.chosen import Chosen
from ofa_jax.tasks.seq2seq import cut
from ofa_jax.tasks.words import load_tokenizer

COUNTED = "train"  # instead of a file: the answers are counted in the training data
MAX_OBJECTS = 30  # the original's --max-object-length


def asked(
  texts: Mapping[str, str], *, max_words: int = prompts.MAX_WORDS, max_objects: int = MAX_OBJECTS
) -> str:
  """The question in "text", and behind it the names in "objects", "&&" between them, if given."""
  question = prompts.question(texts["text"], max_words=max_words)
  if max_objects and "objects" in texts:
    return question + prompts.objects(texts["objects"], most=max_objects)
  return question


ANSWERING = Answering(
  prompt=lambda texts, chinese: asked(texts),
  columns={"id": 0, IMAGE: 5, "text": 2, "objects": 4},
  id="question_id",
  result="answer",
  number_ids=True,
  reads_prompt=True,
  # The length of an answer is ours, the original's is 200 with the question.
  search=Search(num_beams=5, max_length=30, normalize_scores=False),
)


@dataclasses.dataclass(kw_only=True)
class VQA(Chosen):
  """Answers to questions about images, compared with those that people gave.

  Attributes:
    answers: the answers to choose from: a file, see `data/answers.py`, or "train", those that are
      learnt at least `least` times in the training data. None: any answer, in training (the
      original's --unconstrained-training) as in evaluation.
    least: see there; the published list has those that nine questions have.
    max_words: of a question (--max-src-length).
    max_objects: names behind the question (--max-object-length); 0: none (no --add-object).
  """

  metrics: ClassVar[tuple[str, ...]] = ("vqa_score",)
  names: ClassVar[tuple[str, ...]] = ("id", IMAGE, "text", "answer", "objects")
  answering: ClassVar[Answering] = ANSWERING

  columns: tuple[int, ...] = (0, 5, 2, 3, 4)
  answers: str | None = None
  least: int = 9
  max_words: int = prompts.MAX_WORDS
  max_objects: int = MAX_OBJECTS
  search: Search = dataclasses.field(default_factory=lambda: dataclasses.replace(ANSWERING.search))

  @property
  def fields(self) -> tuple[str, ...]:
    """The columns; that of the objects may be missing where they are not used."""
    return self.names if self.max_objects or len(self.columns) == 5 else self.names[:4]

  @property
  def constrained(self) -> bool:
    return self.answers is not None

  @property
  def choices(self) -> Choices | None:
    if self.answers is None:
      return None
    files = self.train if self.answers == COUNTED else ()
    return load_choices(self.answers, self.tokenizer, files, self.columns[3], self.least)

  def example(self, row, rng):
    try:
      confidences = vqa.confidences(row["answer"])
    except ValueError as error:
      raise BadRow(row.name, str(error)) from error
    if rng is not None and not confidences:
      raise BadRow(row.name, "there is no answer to learn")
    source = self._question(row, warn=rng is not None)
    answer = vqa.best(confidences) if confidences else None
    example = self.asks(source, answer, row=row, learn=rng is not None)
    conf = np.float32(confidences[answer] if confidences else 1)
    return example | {IMAGE: self.image(row, rng), "conf": conf}

  def blank(self):
    return super().blank() | {"conf": np.float32(1)}

  def check(self, config):
    faults = super().check(config)
    if self.inference == "allcand" and self.answers is None:
      faults.append(
        "task.answers: expected a file of answers, or 'train', to choose from, found none; "
        "task.inference=beamsearch needs none"
      )
    if self.answer_length < 1 or self.max_words < 1 or self.max_objects < 0 or self.least < 1:
      faults.append(
        "task.answer_length, max_words, least: expected at least 1, and max_objects at least 0, "
        f"found {self.answer_length}, {self.max_words}, {self.least}, {self.max_objects}"
      )
    return faults

  def score(self, predictions, streams):
    """The original's "vqa_score", over the questions that have answers and could be read."""
    rows = streams["examples"]
    answers = self.texts(predictions)
    references = {i: vqa.confidences(rows.row(i)["answer"]) for i in answers}
    known = [i for i in answers if references[i]]
    if not known:
      return {}
    return {"vqa_score": vqa.score([answers[i] for i in known], [references[i] for i in known])}

  def cell(self, row, answer, *, image):
    references = vqa.confidences(row["answer"])
    expected = vqa.best(references) if references else ""
    right = references.get(answer, 0.0) > 0
    return pictures.answer(image, row["text"], answer, expected, right=right)

  def _question(self, row, *, warn):
    """The ids of a question, and of the objects behind it."""
    if not pre_question(row["text"], max_words=1):
      raise BadRow(row.name, "the question is empty")
    ids = self.encode(asked(row, max_words=self.max_words, max_objects=self.max_objects))
    return cut("source", ids, self.source_length - 2, warn=warn)


@functools.lru_cache(maxsize=4)
def load_choices(
  answers: str, tokenizer: str, files: tuple[str, ...], column: int, least: int
) -> Choices:
  """The answers of a file, or those counted in a column of training files, read once.

  Raises:
    ValueError: they cannot be read, or there are none.
  """
  if answers == COUNTED:
    texts = answer_lists.counted(_learnt(files, column), least=least)
  else:
    texts = answer_lists.load(answers)
  return Choices.of(texts, load_tokenizer(tokenizer).encode)


def _learnt(files, column):
  """The answers that the rows of training files teach; bad rows are told where they are read."""
  table = Table(files, columns={"answer": column})
  for i in range(len(table)):
    try:
      confidences = vqa.confidences(table.text(i, "answer"))
    except (BadRow, ValueError):
      continue
    if confidences:
      yield vqa.best(confidences)
