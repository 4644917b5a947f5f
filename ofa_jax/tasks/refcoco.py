"""Visual grounding (OFA, arXiv 2202.03052, section 3.3): which region does the text describe?

An answer is a box of four numbered bins: x0, y0, x1, y1 in the square that the picture is resized
to, whose sides are divided as if they had 512 pixels.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from ofa_jax import pictures
from ofa_jax.data import boxes, prompts
from ofa_jax.data.text import pre_caption
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.decode.beam import EOS, Search
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.seq2seq import PAGE_PIXELS, Seq2Seq
from ofa_jax.tokenizers.ofa import OFATokenizer

CORNERS = 4  # numbers of a box

ANSWERING = Answering(
  prompt=lambda texts, chinese: prompts.region(texts["text"], chinese=chinese),
  columns={"id": 0, IMAGE: 4, "text": 2},
  id="uniq_id",
  result="box",
  searched_as="ground",
  search=Search(num_beams=5, min_length=CORNERS, max_length=CORNERS, no_repeat_ngram_size=3),
  tell=lambda box, scale: (np.asarray(box, float) * np.tile(scale, 2)).tolist(),
)


@dataclasses.dataclass(kw_only=True)
class RefCOCO(Seq2Seq):
  """Boxes of what texts describe, compared with those that people drew.

  Attributes:
    clip: whether a box that reaches over its picture's edge ends there; else its row is bad.
    box_size: pixels that the bins divide (--max-image-size).
    max_words: of a text (--max-src-length).
    any_box: whether the best hypothesis that is a box is the answer. Else it is the best of all, as
      in the original; there is none where that is no box.
  """

  metrics: ClassVar[tuple[str, ...]] = ("score",)
  fields: ClassVar[tuple[str, ...]] = ("id", IMAGE, "text", "box")
  answering: ClassVar[Answering] = ANSWERING

  columns: tuple[int, ...] = (0, 4, 2, 3)
  image_size: int = 512
  source_length: int = 128
  target_length: int = CORNERS + 1
  clip: bool = False
  box_size: int = boxes.BOX_SIZE
  max_words: int = prompts.MAX_WORDS
  any_box: bool = False
  search: Search = dataclasses.field(default_factory=lambda: dataclasses.replace(ANSWERING.search))

  def example(self, row, rng):
    text = row["text"]
    if not pre_caption(text, max_words=1):
      raise BadRow(row.name, "the text is empty")
    size = np.array(row.size, np.float32)
    box = self._box(row, size)
    if rng is not None and box is None:
      raise BadRow(row.name, "there is no box to learn")
    return {
      IMAGE: self.image(row, rng),
      "source": self.encode(
        prompts.region(text, chinese=self.words.chinese, max_words=self.max_words)
      ),
      "target": [] if box is None else self.target(box, size),
      "size": size,
    }

  def blank(self):
    return super().blank() | {"size": np.full(2, self.image_size, np.float32)}

  def target(self, box: np.ndarray, size: np.ndarray) -> list[int]:
    """The ids of a box float32[4] in a picture of `size` float32[2], width and height."""
    words, scale = self.words, np.float32(self.image_size) / size
    bins = boxes.to_bins(box, num_bins=words.num_bins, scale=scale, box_size=self.box_size)
    return [words.bin_id(i) for i in np.clip(bins, 0, words.num_bins - 1)]

  def check(self, config):
    faults = super().check(config)
    if config.model.num_bins < 2:
      faults.append(
        f"model.num_bins: expected bins that boxes are told in, found {config.model.num_bins}"
      )
    if self.box_size < self.image_size:
      faults.append(
        f"task.box_size: expected at least task.image_size={self.image_size}, as the bins do not "
        f"reach further, found {self.box_size}"
      )
    if self.max_words < 1:
      faults.append(f"task.max_words: expected at least 1, found {self.max_words}")
    return faults

  def best(self, hypotheses):
    """Of each row the best hypothesis, with `any_box` of those that are boxes if some are."""
    tokens = hypotheses.tokens
    if not self.any_box or tokens.shape[2] <= CORNERS:
      return super().best(hypotheses)
    first = self.words.bin_id(0)
    are_boxes = jnp.all(tokens[..., :CORNERS] >= first, axis=2) & (tokens[..., CORNERS] == EOS)
    chosen = jnp.argmax(are_boxes, axis=1)
    take = (jnp.arange(len(chosen)), chosen)
    return {"tokens": tokens[take], "score": hypotheses.scores[take]}

  def predict(self, model, batch, *, rngs, frozen):
    predictions = super().predict(model, batch, rngs=rngs, frozen=frozen)
    return {**predictions, "size": batch["size"]}

  def told(self, predictions):
    """The boxes by row, in pixels of the stored picture; None where the answer is none."""
    read, told = predictions["examples"], {}
    for i in map(int, np.flatnonzero(read["valid"])):
      tokens = read["tokens"][i][: CORNERS + 1]
      box = (
        read_box(tokens, tokenizer=self.words, scale=np.ones(2), box_size=self.box_size)
        if tokens[-1] == EOS
        else None
      )
      scale = read["size"][i] / self.image_size
      told[i] = None if box is None else self.answering.tell(box, scale)
    return told

  def score(self, predictions, streams):
    """The original's "score": Acc@0.5, the share of boxes that overlap the right ones by half.

    The right boxes are those of the files, not their bins; rows without one count for nothing.
    """
    rows, sizes = streams["examples"], predictions["examples"]["size"]
    told = self.told(predictions)
    right = {i: self._box(rows.row(i), sizes[i]) for i in told}
    known = [i for i in told if right[i] is not None]
    if not known:
      return {}
    none = [np.nan] * CORNERS
    answers = np.array([none if told[i] is None else told[i] for i in known], np.float32)
    return {"score": float(np.mean(boxes.hits(answers, np.stack([right[i] for i in known]))))}

  def cell(self, row, answer, *, image):
    """The text, the box that the model found, and in grey the right one."""
    size = np.array(row.size, np.float32)
    box, scale = self._box(row, size), np.tile(PAGE_PIXELS / size, 2)
    right = (
      answer is not None
      and box is not None
      and bool(boxes.hits(np.array([answer], np.float32), box[None])[0])
    )
    colour = pictures.RIGHT if right else pictures.WRONG
    drawn = [] if box is None else [(box * scale, pictures.PLAIN)]
    drawn += [] if answer is None else [(np.array(answer) * scale, colour)]
    return pictures.Cell(image=image, lines=((row["text"], colour),), boxes=tuple(drawn))

  def _box(self, row, size):
    """The right box of a row, float32[4]; None where an evaluation has none."""
    text = row["box"]
    if not text.strip():
      return None
    try:
      return boxes.read(text, size=(int(size[0]), int(size[1])), clip=self.clip)
    except ValueError as error:
      raise BadRow(row.name, str(error)) from error


def read_box(
  tokens: np.ndarray,
  *,
  tokenizer: OFATokenizer,
  scale: np.ndarray,
  box_size: int = boxes.BOX_SIZE,
) -> np.ndarray | None:
  """Returns the box that tokens with their end say, None where they are no box.

  Nothing keeps the model to coordinates, as in the original.

  Args:
    tokens: int32[N].
    tokenizer: the model's.
    scale: float[2], width and height of the image, divided by those that the model was given.
    box_size: pixels that the bins divide.

  Returns:
    float32[4]: x0, y0, x1, y1 in pixels of the image.
  """
  bins = tokens[:-1] - tokenizer.bin_id(0)
  if len(bins) != CORNERS or bins.min() < 0:
    return None
  return boxes.from_bins(bins, num_bins=tokenizer.num_bins, scale=scale, box_size=box_size)
