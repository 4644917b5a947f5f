"""Visual entailment (OFA, arXiv 2202.03052, section 3.3): do an image and a text imply another?

The data is SNLI-VE (arXiv 1901.06706): the caption of the picture is the premise, which may be left
out; the answer is yes, no or maybe.
"""

import dataclasses
import functools
import json
from typing import ClassVar

from ofa_jax import pictures
from ofa_jax.data import prompts
from ofa_jax.data.text import pre_caption
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.choice import Choices
from ofa_jax.tasks.chosen import Chosen
from ofa_jax.tasks.seq2seq import cut
from ofa_jax.tasks.words import load_tokenizer

ANSWERING = Answering(
  prompt=lambda texts, chinese: prompts.entailment(texts["text"], texts.get("premise")),
  columns={"id": 0, IMAGE: 2, "text": 3, "premise": 4},
  id="uniq_id",
  result="label",
  reads_prompt=True,
  choices={"yes": "entailment", "maybe": "neutral", "no": "contradiction"},
)
# In the original's order, --ans2label-dict: of equal scores the first wins.
ANSWERS = ("no", "yes", "maybe")
LABELS = {ANSWERING.choices[answer]: answer for answer in ANSWERS}


@dataclasses.dataclass(kw_only=True)
class SnliVE(Chosen):
  """Whether a picture, and perhaps its caption, imply a text, contradict it, or neither.

  Attributes:
    premise: whether the caption stands in the question (--add-caption).
    max_words: of the caption and of the text (--max-src-length).
  """

  metrics: ClassVar[tuple[str, ...]] = ("snli_score",)
  names: ClassVar[tuple[str, ...]] = ("id", IMAGE, "text", "premise", "label")
  answering: ClassVar[Answering] = ANSWERING

  columns: tuple[int, ...] = (0, 2, 3, 4, 5)
  answer_length: int = 6
  premise: bool = True
  max_words: int = prompts.MAX_WORDS

  @property
  def fields(self) -> tuple[str, ...]:
    """The columns; that of the premise may be missing where it is not used."""
    if self.premise or len(self.columns) == len(self.names):
      return self.names
    return tuple(name for name in self.names if name != "premise")

  @property
  def choices(self) -> Choices:
    return load_choices(self.tokenizer)

  def example(self, row, rng):
    learn, label = rng is not None, row["label"].strip()
    if label not in LABELS and (label or learn):
      raise BadRow(row.name, f"expected a label out of {', '.join(LABELS)}, found {label[:40]!r}")
    told = {"hypothesis": row["text"]} | ({"premise": row["premise"]} if self.premise else {})
    for name, text in told.items():
      if not pre_caption(text, max_words=1):
        raise BadRow(row.name, f"the {name} is empty")
    ids = self.encode(prompts.entailment(**told, max_words=self.max_words))
    source = cut("source", ids, self.source_length - 2, warn=learn)
    example = self.asks(source, LABELS.get(label), row=row, learn=learn)
    return example | {IMAGE: self.image(row, rng)}

  def check(self, config):
    faults = super().check(config)
    if self.answer_length < 1 or self.max_words < 1:
      faults.append(
        "task.answer_length, max_words: expected at least 1, found "
        f"{self.answer_length}, {self.max_words}"
      )
    return faults

  def score(self, predictions, streams):
    """The original's "snli_score": the share that is right of what has a label and can be read."""
    rows = streams["examples"]
    labels = {i: rows.row(i)["label"].strip() for i in self.texts(predictions)}
    right = [LABELS[labels[i]] == x for i, x in self.texts(predictions).items() if labels[i]]
    return {"snli_score": sum(right) / len(right)} if right else {}

  def results(self, predictions, streams):
    """`predict.json`: id and answer, as the original writes them, and the label that is meant."""
    rows = streams["examples"]
    told = [
      {"uniq_id": rows.row(i)["id"], "answer": answer, "label": ANSWERING.called(answer)}
      for i, answer in self.texts(predictions).items()
    ]
    return {"predict.json": json.dumps(told, ensure_ascii=False).encode()} | self.pages(
      predictions, streams
    )

  def cell(self, row, answer, *, image):
    label = row["label"].strip()
    return pictures.answer(image, row["text"], answer, label, right=answer == label)


@functools.lru_cache(maxsize=4)
def load_choices(tokenizer: str) -> Choices:
  """The three answers, encoded once."""
  return Choices.of(ANSWERS, load_tokenizer(tokenizer).encode)
