"""Visual grounding (OFA, arXiv 2202.03052, section 3.3): which region does the text describe?

An answer is a box of four numbered bins.
"""

import numpy as np

from ofa_jax.data import prompts
from ofa_jax.data.boxes import from_bins
from ofa_jax.data.tsv import IMAGE
from ofa_jax.decode.beam import Search
from ofa_jax.tasks.answering import Answering
from ofa_jax.tokenizers.ofa import OFATokenizer

ANSWERING = Answering(
  prompt=lambda texts, chinese: prompts.region(texts["text"], chinese=chinese),
  columns={"id": 0, IMAGE: 4, "text": 2},
  id="uniq_id",
  result="box",
  searched_as="ground",
  search=Search(num_beams=5, min_length=4, max_length=4, no_repeat_ngram_size=3),
  tell=lambda box, scale: (np.asarray(box, float) * np.tile(scale, 2)).tolist(),
)


def read_box(
  tokens: np.ndarray, *, tokenizer: OFATokenizer, scale: np.ndarray
) -> np.ndarray | None:
  """Returns the box that tokens with their end say, None where they are no box.

  Nothing keeps the model to coordinates, as in the original.

  Args:
    tokens: int32[N].
    tokenizer: the model's.
    scale: float[2], width and height of the image, divided by those that the model was given.

  Returns:
    float32[4]: x0, y0, x1, y1 in pixels of the image.
  """
  bins = tokens[:-1] - tokenizer.bin_id(0)
  if len(bins) != 4 or bins.min() < 0:
    return None
  return from_bins(bins, num_bins=tokenizer.num_bins, scale=scale)
