"""Seven tasks of GLUE (arXiv 1804.07461) as OFA learns them (arXiv 2202.03052, section 4.2).

A question about one or two sentences is answered by one word, out of two or three, without an end
after it. No row has a picture, and none is computed.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import ClassVar

from ofa_jax.data import prompts
from ofa_jax.data.text import pre_sentence
from ofa_jax.data.tfds_texts import TfdsTexts, is_tfds
from ofa_jax.data.tsv import BadRow
from ofa_jax.scoring import glue as scoring
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.choice import Choices
from ofa_jax.tasks.chosen import Chosen
from ofa_jax.tasks.seq2seq import Rows, cut
from ofa_jax.tasks.words import load_tokenizer
from ofa_jax.tokenizers.special import PAD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One of GLUE's tasks.

  Attributes:
    template: what is asked, with `{}` for each text.
    texts: their names, those of TensorFlow Datasets, in the order of the template.
    labels: the answer that each label stands for, as the original's files number them or as
      TensorFlow Datasets names them.
    columns: places of the texts and the label in the original's files (--selected-cols), by name.
    metrics: beside accuracy "acc".
    positive: the answer that F1 and Matthews' correlation are of.
    told: how GLUE's server wants the answers.
    submission: the file's name there.
    valid, test: the splits of TensorFlow Datasets.
  """

  template: str
  texts: tuple[str, ...]
  labels: Mapping[str, str]
  columns: Mapping[str, int]
  told: Mapping[str, str]
  submission: str
  metrics: tuple[str, ...] = ()
  positive: str = "yes"
  valid: str = "validation"
  test: str = "test"

  @property
  def answers(self) -> tuple[str, ...]:
    """What may be answered."""
    return tuple(dict.fromkeys(self.labels.values()))

  @property
  def called(self) -> tuple[str, ...]:
    """What its texts are called outside: "text", and "text2" where there are two."""
    return ("text", "text2")[: len(self.texts)]


_TWO = ("sentence1", "sentence2")
_NUMBERS = {"no": "0", "yes": "1"}
_ENTAILED = {"no": "not_entailment", "yes": "entailment"}

# TensorFlow Datasets has names for labels, the original's files numbers, which count another way in
# MNLI: 0 maybe, 1 yes, 2 no.
PARTS: dict[str, Part] = {
  "cola": Part(
    template=' is the text " {} " grammatically correct?',
    texts=("sentence",),
    labels={"0": "no", "1": "yes", "unacceptable": "no", "acceptable": "yes"},
    columns={"sentence": 1, "label": 2},
    told=_NUMBERS,
    submission="CoLA.tsv",
    metrics=("mcc",),
  ),
  "mnli": Part(
    template=' can text1 " {} " imply text2 " {} "?',
    texts=("premise", "hypothesis"),
    labels={
      "0": "maybe",
      "1": "yes",
      "2": "no",
      "neutral": "maybe",
      "entailment": "yes",
      "contradiction": "no",
    },
    columns={"premise": 0, "hypothesis": 1, "label": 2},
    told={"maybe": "neutral", "yes": "entailment", "no": "contradiction"},
    submission="MNLI-m.tsv",
    valid="validation_matched",
    test="test_matched",
  ),
  "mrpc": Part(
    template=' does text1 " {} " and text2 " {} " have the same semantics?',
    texts=_TWO,
    labels={"0": "no", "1": "yes", "not_equivalent": "no", "equivalent": "yes"},
    columns={"sentence1": 0, "sentence2": 1, "label": 2},
    told=_NUMBERS,
    submission="MRPC.tsv",
    metrics=("f1",),
  ),
  "qnli": Part(
    template=' does " {} " contain the answer to question " {} "?',
    texts=("sentence", "question"),
    labels={"0": "no", "1": "yes", "not_entailment": "no", "entailment": "yes"},
    columns={"question": 1, "sentence": 2, "label": 3},
    told=_ENTAILED,
    submission="QNLI.tsv",
  ),
  "qqp": Part(
    template=' is question " {} " and question " {} " equivalent?',
    texts=("question1", "question2"),
    labels={"0": "no", "1": "yes", "not_duplicate": "no", "duplicate": "yes"},
    columns={"question1": 3, "question2": 4, "label": 5},
    told=_NUMBERS,
    submission="QQP.tsv",
    metrics=("f1",),
  ),
  "rte": Part(
    template=' can text1 " {} " imply text2 " {} "?',
    texts=_TWO,
    labels={"not_entailment": "no", "entailment": "yes"},
    columns={"sentence1": 1, "sentence2": 2, "label": 3},
    told=_ENTAILED,
    submission="RTE.tsv",
  ),
  "sst2": Part(
    template=' is the sentiment of text " {} " positive or negative?',
    texts=("sentence",),
    labels={"0": "negative", "1": "positive", "negative": "negative", "positive": "positive"},
    columns={"sentence": 0, "label": 1},
    told={"negative": "0", "positive": "1"},
    submission="SST-2.tsv",
  ),
}


def answering(part: str) -> Answering:
  """What a part asks and how its answers are told."""
  known = PARTS[part]
  return Answering(
    name=part,
    prompt=lambda texts, chinese: prompts.sentences(
      known.template, *(texts[name] for name in known.called)
    ),
    columns={
      called: known.columns[name] for called, name in zip(known.called, known.texts, strict=True)
    },
    id="index",
    result="prediction",
    number_ids=True,
    reads_prompt=True,
    ends_prompt=True,
    choices={answer: known.told[answer] for answer in known.answers},
  )


@dataclasses.dataclass(kw_only=True)
class Glue(Chosen):
  """Labels of sentences.

  A file is the original's TSV, or "tfds:glue/cola"; of another split "tfds:glue/cola:train[:100]".

  Attributes:
    part: which of `PARTS`.
    max_words: of each text (--max-src-length).
    submission: name of the file for GLUE's server; "": the part's own.
  """

  target_ends: ClassVar[bool] = False
  metrics: ClassVar[tuple[str, ...]] = ("acc", "f1", "mcc")

  part: str
  source_length: int = 504
  target_length: int = 512
  prompt: str = "src"
  answer_length: int = 1
  max_words: int = prompts.MAX_SENTENCE_WORDS
  submission: str = ""

  def __post_init__(self):
    if self.part in PARTS and not self.columns:
      self.columns = tuple(self._part.columns.values())

  @property
  def fields(self) -> tuple[str, ...]:
    """The columns; that of the labels may be missing where only a submission is made."""
    names = tuple(self._part.columns)
    return names if len(self.columns) == len(names) else names[:-1]

  @property
  def answering(self) -> Answering:
    return answering(self.part)

  @property
  def choices(self) -> Choices:
    known, longest = load_choices(self._part.answers, self.tokenizer)
    if longest > self.answer_length:
      raise ValueError(
        f"Expected {', '.join(known.texts)} to be one token each, found {longest} in "
        f"{self.tokenizer}; set task.answer_length={longest}"
      )
    return known

  def example(self, row, rng):
    part, learn = self._part, rng is not None
    for name in part.texts:
      if not pre_sentence(row[name], max_words=1):
        raise BadRow(row.name, f"the {name} is empty")
    label = row["label"].strip() if "label" in row else ""
    if label not in part.labels and (label or learn):
      raise BadRow(
        row.name, f"expected a label out of {', '.join(part.labels)}, found {label[:40]!r}"
      )
    texts = (row[name] for name in part.texts)
    ids = self.encode(prompts.sentences(part.template, *texts, max_words=self.max_words))
    source = cut("source", ids, self.source_length - 2, warn=learn)
    return self.asks(source, part.labels.get(label), row=row, learn=learn)

  def assemble(self, example, *, warn=False):
    """As for any task, but that the decoder does not see the answer that nothing follows."""
    arrays = super().assemble(example, warn=warn)
    learnt = len(example.get("prompt", ())) + len(example["target"])
    arrays["previous"][max(learnt, 1) :] = PAD
    return arrays

  def check(self, config):
    if self.part not in PARTS:
      return [f"task.part: expected one of {', '.join(PARTS)}, found {self.part!r}"]
    faults = super().check(config)
    if self.inference == "beamsearch":
      faults.append("task.inference: expected allcand, found beamsearch: no answer has an end")
    if self.answer_length < 1 or self.max_words < 1:
      faults.append(
        "task.answer_length, max_words: expected at least 1, found "
        f"{self.answer_length}, {self.max_words}"
      )
    return faults

  def examples(self, split):
    files = {"train": self.train, "valid": self.valid, "test": self.test}.get(split) or ()
    if not any(map(is_tfds, files)):
      return super().examples(split)
    _ = self.choices
    part = self._part
    usual = {"train": "train", "valid": part.valid, "test": part.test}[split]
    names = {name: name for name in (*part.texts, "label")} | {"id": "idx"}
    return Rows(self, TfdsTexts.of(files, columns=names, split=usual))

  def score(self, predictions, streams):
    """Accuracy, F1 and Matthews' correlation, of the rows that have labels and could be read."""
    part, pairs = self._part, self._pairs(predictions, streams).values()
    if not pairs:
      return {}
    answers, labels = zip(*pairs, strict=True)
    scores = {"acc": scoring.accuracy(answers, labels)}
    counts = scoring.count(answers, labels, positive=part.positive)
    for name, value in (("f1", counts.f1), ("mcc", counts.matthews)):
      if name in part.metrics:
        if value is None:
          said = f"{sum(a == part.positive for a in answers)} predictions and "
          said += f"{sum(y == part.positive for y in labels)} labels of {len(labels)}"
          warnings.warn(f"{name} is undefined with {said} being {part.positive!r}: 0 is reported")
        scores[name] = value or 0.0
    return scores

  def right(self, predictions, streams):
    pairs = self._pairs(predictions, streams)
    return {i: float(answer == label) for i, (answer, label) in pairs.items()}

  def _pairs(self, predictions, streams):
    """(answer, what the label stands for) by row, of the rows that have labels."""
    rows, pairs = streams["examples"], {}
    for i, answer in self.texts(predictions).items():
      row = rows.row(i)
      label = row["label"].strip() if "label" in row else ""
      if label:
        pairs[i] = answer, self._part.labels[label]
    return pairs

  def results(self, predictions, streams):
    """The file for GLUE's server: the number of each row, from 0, and its label."""
    rows, part = streams["examples"], self._part
    told = {}
    for i, answer in self.texts(predictions).items():
      row = rows.row(i)
      told[int(row["id"]) if "id" in row else i] = part.told[answer]
    lines = ["index\tprediction", *(f"{i}\t{told[i]}" for i in sorted(told))]
    return {self.submission or part.submission: ("\n".join(lines) + "\n").encode()}

  @property
  def _part(self):
    return PARTS[self.part]


@functools.lru_cache(maxsize=8)
def load_choices(answers: tuple[str, ...], tokenizer: str) -> tuple[Choices, int]:
  """The answers of a part, encoded once, and the tokens of the longest."""
  encode = load_tokenizer(tokenizer).encode
  return Choices.of(answers, encode), max(len(encode(f" {text}")) for text in answers)
