"""Image captioning (OFA, arXiv 2202.03052, section 3.3): what does the image describe?

A training row has one caption; a row of an evaluation has all of its image, "&&" between them.
"""

import dataclasses
import functools
import json
from typing import ClassVar

import numpy as np

from ofa_jax import pictures
from ofa_jax.data import prompts
from ofa_jax.data.text import REFERENCES, reference_captions, remove_punctuation, target_caption
from ofa_jax.scoring.bleu import bleu
from ofa_jax.scoring.cider import Frequencies, cider_d
from ofa_jax.scoring.rouge import rouge_l
from ofa_jax.tasks.seq2seq import IMAGE, Seq2Seq

_PAGE_PIXELS = 180  # a side of a picture on the page


@dataclasses.dataclass(kw_only=True)
class Caption(Seq2Seq):
  """Captions of images, compared with those that people wrote.

  A row has a "uniq_id", its own, and an "image_id", its picture's, which results are told by. The
  original reads one or the other (--selected-cols=0,4,2 to train, 1,4,2 to evaluate).

  Attributes:
    max_words: words of a caption that are learnt.
    frequencies: file of the n-grams' document frequencies for CIDEr-D, the original's
      `coco-valid-words.p`; None: they are counted over the references of the evaluation.
    page: pictures of the evaluation that are shown with their captions; 0: none.
  """

  fields: ClassVar[tuple[str, ...]] = ("uniq_id", "image_id", IMAGE, "caption")
  metrics: ClassVar[tuple[str, ...]] = ("cider", "bleu4", "rouge_l", "exact")

  columns: tuple[int, ...] = (0, 1, 4, 2)
  source_length: int = 10
  max_words: int = 20
  frequencies: str | None = None
  page: int = 24

  def example(self, row, rng):
    if rng is None:
      caption = REFERENCES.join(reference_captions(row["caption"]))
    else:
      caption = target_caption(row["caption"], max_words=self.max_words)
    prompt = prompts.caption(chinese=self.words.kind == "bert-chinese")
    return {
      "image": self.image(row, rng),
      "source": self.encode(prompt),
      "target": self.encode(" " + caption),
    }

  def streams(self, split):
    _ = self._frequencies  # its faults are told before anything is compiled
    return super().streams(split)

  def score(self, predictions, streams):
    """CIDEr-D (the original's "cider"), BLEU-4, ROUGE-L, and the share that equal a reference.

    Captions are compared without punctuation, case and all, as in the original's validation; rows
    that could not be read are left out.
    """
    captions = self._captions(predictions, streams)
    found = [caption for _, caption, _ in captions]
    references = [group for _, _, group in captions]
    exact = [caption in group for caption, group in zip(found, references, strict=True)]
    return {
      "cider": np.mean(cider_d(found, references, frequencies=self._frequencies)),
      "bleu4": bleu(found, references)[3],
      "rouge_l": np.mean(rouge_l(found, references)),
      "exact": np.mean(exact),
    }

  def results(self, predictions, streams):
    """`predict.json`, as coco-caption reads it, and `captions.png`, a page of pictures."""
    rows = streams["examples"]
    captions = self._captions(predictions, streams)
    told = [{"image_id": rows.row(i)["image_id"], "caption": text} for i, text, _ in captions]
    files = {"predict.json": json.dumps(told, ensure_ascii=False).encode()}
    if self.page:
      shown = captions[: self.page]
      images = [rows.image(i, size=_PAGE_PIXELS) for i, _, _ in shown]
      files["captions.png"] = pictures.captions(images, *([c[k] for c in shown] for k in (1, 2)))
    return files

  @property
  def _frequencies(self):
    return None if self.frequencies is None else _load_frequencies(self.frequencies)

  def _captions(self, predictions, streams):
    """(row, its caption, its references) of all rows that could be read."""
    rows, texts = streams["examples"], self.texts(predictions)
    return [
      (i, remove_punctuation(text).strip(), reference_captions(rows.row(i)["caption"]))
      for i, text in texts.items()
    ]


@functools.lru_cache(maxsize=1)
def _load_frequencies(path: str) -> Frequencies:
  """Read once; ValueError where it cannot be."""
  return Frequencies.load(path)
