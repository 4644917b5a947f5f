"""Image captioning (OFA, arXiv 2202.03052, section 3.3): what does the image describe?

A training row has one caption; a row of an evaluation has all of its image, "&&" between them.
"""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from ofa_jax import pictures
from ofa_jax.data import caption_rows, prompts
from ofa_jax.data.text import REFERENCES, reference_captions, remove_punctuation, target_caption
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.decode.beam import Search
from ofa_jax.scoring.bleu import bleu
from ofa_jax.scoring.cider import Frequencies, cider_d
from ofa_jax.scoring.rouge import rouge_l
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.seq2seq import PAGE_PIXELS, Rows, Seq2Seq

ANSWERING = Answering(
  prompt=lambda texts, chinese: prompts.caption(chinese=chinese),
  columns={"id": 1, IMAGE: 4},
  id="image_id",
  result="caption",
  searched_as="caption",
  search=Search(num_beams=5, max_length=16, no_repeat_ngram_size=3),
  tell=lambda caption, scale: remove_punctuation(caption).strip(),
)


@dataclasses.dataclass(kw_only=True)
class Caption(Seq2Seq):
  """Captions of images, compared with those that people wrote.

  The data is OFA's TSV, or pairs of pictures and captions in any form (`data/caption_rows.py`). A
  row has a "uniq_id", its own, and an "image_id", its picture's, which results are told by. The
  original reads one or the other (--selected-cols=0,4,2 to train, 1,4,2 to evaluate).

  Attributes:
    max_words: words of a caption that are learnt.
    frequencies: file of the n-grams' document frequencies for CIDEr-D, the original's
      `coco-valid-words.p`; None: they are counted over the references of the evaluation.
    hold_out: where `valid` is not given: share of the training pictures that are kept back and
      evaluated in its place; 0: none.
    page: pictures of the evaluation that are shown with their captions; 0: none.
    joined: whether the Chinese captions that people wrote of one picture count as one long caption,
      as in the original's validation, whose Chinese words do not tell them apart.
  """

  fields: ClassVar[tuple[str, ...]] = ("uniq_id", "image_id", IMAGE, "caption")
  answering: ClassVar[Answering] = ANSWERING
  grouped: ClassVar[bool] = False  # whether a picture of pairs is one row in training, too
  metrics: ClassVar[tuple[str, ...]] = ("cider", "bleu4", "rouge_l", "exact")

  columns: tuple[int, ...] = (0, ANSWERING.columns["id"], ANSWERING.columns[IMAGE], 2)
  search: Search = dataclasses.field(default_factory=lambda: dataclasses.replace(ANSWERING.search))
  source_length: int = 10
  max_words: int = 20
  frequencies: str | None = None
  hold_out: float = 0.0
  page: int = 24
  joined: bool = False

  def example(self, row, rng):
    if rng is None:
      caption = REFERENCES.join(reference_captions(row["caption"]))
    else:
      caption = target_caption(row["caption"], max_words=self.max_words)
      if not caption.strip():
        raise BadRow(row.name, "the caption is empty")
    return {
      "image": self.image(row, rng),
      "source": self.asked(row),
      "target": self.encode(" " + caption),
    }

  def check(self, config):
    faults = super().check(config)
    if not 0 <= self.hold_out < 1:
      faults.append(f"task.hold_out: expected 0 <= share < 1, found {self.hold_out}")
    return faults

  def examples(self, split):
    _ = self.words  # its faults are told before anything is compiled
    table, notes = caption_rows.load(
      {"train": self.train, "valid": self.valid, "test": self.test},
      split,
      columns=dict(zip(self.fields, self.columns, strict=True)),
      hold_out=self.hold_out,
      grouped=self.grouped,
    )
    return Rows(self, table, notes)

  def streams(self, split):
    _ = self._frequencies  # its faults are told before anything is compiled
    return super().streams(split)

  def score(self, predictions, streams):
    """CIDEr-D (the original's "cider"), BLEU-4, ROUGE-L, and the share that equal a reference.

    Captions are compared without punctuation, case and all, as in the original's validation; rows
    that could not be read are left out.
    """
    captions = self._captions(predictions, streams)
    told = [caption for _, caption, _ in captions]
    references = [group for _, _, group in captions]
    exact = [caption in group for caption, group in zip(told, references, strict=True)]
    return {
      "cider": np.mean(cider_d(told, references, frequencies=self._frequencies)),
      "bleu4": bleu(told, references)[3],
      "rouge_l": np.mean(rouge_l(told, references)),
      "exact": np.mean(exact),
    }

  def pages(self, predictions, streams):
    """`captions`, a page of pictures."""
    rows, shown = streams["examples"], self._captions(predictions, streams)[: self.page]
    if not shown:
      return {}
    images = [rows.image(i, size=PAGE_PIXELS) for i, _, _ in shown]
    return pictures.captions("captions", images, *([c[k] for c in shown] for k in (1, 2)))

  @property
  def _frequencies(self):
    return None if self.frequencies is None else _load_frequencies(self.frequencies)

  def _captions(self, predictions, streams):
    """(row, its caption, its references) of all rows that could be read."""
    rows, told = streams["examples"], self.told(predictions)
    return [(i, text, self.references(rows.row(i)["caption"])) for i, text in told.items()]

  def references(self, text: str) -> list[str]:
    """The captions in a text as answers are spelled: in Chinese, spaces between the characters."""
    captions = reference_captions(text)
    if not self.words.chinese:
      return captions
    captions = [REFERENCES.join(captions)] if self.joined else captions
    spelled = (self.words.decode(self.encode(caption)) for caption in captions)
    return [self.answering.tell(caption, None) for caption in spelled]


@functools.lru_cache(maxsize=1)
def _load_frequencies(path: str) -> Frequencies:
  """Read once; ValueError where it cannot be."""
  return Frequencies.load(path)
