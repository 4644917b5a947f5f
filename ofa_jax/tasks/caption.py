"""Image captioning (OFA, arXiv 2202.03052, section 3.3): what does the image describe?

A training row has one caption; a row of an evaluation has all of its image, "&&" between them.
"""

import dataclasses
from typing import ClassVar

from ofa_jax.data.text import REFERENCES, reference_captions, target_caption
from ofa_jax.tasks.seq2seq import IMAGE, Seq2Seq

PROMPT = " what does the image describe?"
CHINESE_PROMPT = "图片描述了什么内容?"


@dataclasses.dataclass(kw_only=True)
class Caption(Seq2Seq):
  """Captions of images, compared with those that people wrote.

  Attributes:
    prompt: what the encoder reads beside the image.
    max_words: words of a caption that are learnt.
  """

  fields: ClassVar[tuple[str, ...]] = ("id", IMAGE, "caption")

  columns: tuple[int, ...] = (0, 4, 2)
  prompt: str = PROMPT
  max_words: int = 20
  source_length: int = 10

  def example(self, row, rng):
    if rng is None:
      caption = REFERENCES.join(reference_captions(row["caption"]))
    else:
      caption = target_caption(row["caption"], max_words=self.max_words)
    return {"source": self.encode(self.prompt), "target": self.encode(" " + caption)}
