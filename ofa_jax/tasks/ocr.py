"""Optical character recognition: what are the texts on the image?

The released models read Chinese, in scenes and in documents. Texts are learnt and compared in
simplified characters and lower case; spaces do not count.
"""

import dataclasses
from typing import ClassVar

from ofa_jax.data import ocr, prompts
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.decode.beam import Search
from ofa_jax.scoring import ocr as scoring
from ofa_jax.tasks.answering import Answering, read
from ofa_jax.tasks.seq2seq import Seq2Seq

ANSWERING = Answering(
  name="ocr",
  prompt=lambda texts, chinese: prompts.reading(chinese=chinese),
  columns={"id": 0, IMAGE: 1},
  id="image_id",
  result="ocr",
  searched_as="read",
  search=Search(num_beams=5, max_length=64),
  square=ocr.placed,
  tell=lambda text, scale: text.replace(" ", ""),
)
DOCUMENTS = dataclasses.replace(ANSWERING, name="ocr_document", square=ocr.placed_document)

# What the original's validation takes for ids that it does not know, in answers and in references.
_UNKNOWN = "<unk>"
_UNKNOWN_ANSWER, _UNKNOWN_REFERENCE = "UNKNOWNTOKENINHYP", "UNKNOWNTOKENINREF"


@dataclasses.dataclass(kw_only=True)
class OCR(Seq2Seq):
  """Texts in pictures, compared with what people read.

  Attributes:
    document: whether pictures are long lines of documents, which are cut (--is-document).
    max_words: of a text, in Chinese its characters (--max-tgt-length).
  """

  metrics: ClassVar[tuple[str, ...]] = ("acc", "ned")
  fields: ClassVar[tuple[str, ...]] = ("id", IMAGE, "text")

  columns: tuple[int, ...] = (0, 1, 2)
  source_length: int = 16
  target_length: int = 96
  document: bool = False
  max_words: int = 30
  search: Search = dataclasses.field(default_factory=lambda: dataclasses.replace(ANSWERING.search))

  @property
  def answering(self) -> Answering:
    return DOCUMENTS if self.document else ANSWERING

  def image(self, row, rng):
    return self.answering.square(row.image(), self.image_size, rng)

  def example(self, row, rng):
    text = self._learnt(row)
    if rng is not None and not text.strip():
      raise BadRow(row.name, "there is no text to learn")
    target = self.encode(f" {text}") if text.strip() else []
    return {IMAGE: self.image(row, rng), "source": self.asked(row), "target": target}

  def check(self, config):
    faults = super().check(config)
    if self.document and self.image_size != ocr.STRIP_WIDTH:
      faults.append(
        f"task.image_size: expected {ocr.STRIP_WIDTH} with task.document, whose lines are cut into "
        f"pieces of that width, found {self.image_size}"
      )
    if self.image_size < ocr.LEAST_SIDE:
      faults.append(
        f"task.image_size: expected at least {ocr.LEAST_SIDE}, which is what the short side of a "
        f"picture has, found {self.image_size}"
      )
    if self.max_words < 1:
      faults.append(f"task.max_words: expected at least 1, found {self.max_words}")
    return faults

  def examples(self, split):
    ocr.check()  # told before anything is compiled
    return super().examples(split)

  def score(self, predictions, streams):
    """The original's "acc" and "ned", over the rows that have a text and could be read."""
    pairs = self._pairs(predictions, streams).values()
    if not pairs:
      return {}
    answers, references = zip(*pairs, strict=True)
    return {
      "acc": scoring.accuracy(answers, references),
      "ned": scoring.normalized_similarity(answers, references),
    }

  def right(self, predictions, streams):
    pairs = self._pairs(predictions, streams)
    return {i: float(answer == reference) for i, (answer, reference) in pairs.items()}

  def _pairs(self, predictions, streams):
    """(answer, reference) by row as they are compared, of those that have a text."""
    rows, told = streams["examples"], self.told(predictions)
    right = {i: self._reference(rows.row(i)) for i in told}
    return {
      i: (
        answer.replace(_UNKNOWN, _UNKNOWN_ANSWER),
        right[i].replace(_UNKNOWN, _UNKNOWN_REFERENCE),
      )
      for i, answer in told.items()
      if right[i]
    }

  def _learnt(self, row):
    return ocr.learnt(row["text"], chinese=self.words.chinese, most=self.max_words)

  def _reference(self, row):
    """The text of a row as the model can say it; empty where it has none."""
    ids = self.encode(f" {self._learnt(row)}")[: self.target_length - 1]
    return self.answering.tell(read(self.words, ids), None)
