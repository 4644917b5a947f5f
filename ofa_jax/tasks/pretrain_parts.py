"""The four kinds of rows that OFA is pretrained on (arXiv 2202.03052, section 3.2).

Pairs of a picture and a text are asked about twice; texts, pictures and pictures with objects once.
Each kind is a task with its file's columns, its picture and what it asks; `tasks/pretrain.py` puts
them together.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax.data import boxes, crops, negatives, prompts
from ofa_jax.data.draws import Drawn, Draws
from ofa_jax.data.negatives import Negatives
from ofa_jax.data.original_draws import augmenting, epoch_of
from ofa_jax.data.random_augment import random_augment
from ofa_jax.data.rows import Row
from ofa_jax.data.text import REFERENCES, pre_caption, pre_question
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.scoring import vqa
from ofa_jax.tasks.infilling import masked
from ofa_jax.tasks.seq2seq import Seq2Seq
from ofa_jax.tokenizers.special import PAD

# What is learnt of pairs, by the number that an example's "kind" is.
OBJECTIVES = (
  "caption", "vqa", "grounding", "grounded_caption", "matching_caption", "matching_answer",
)  # fmt: skip
TYPES = ("caption", "qa", "visual_grounding")  # of the rows
ASKED = 2  # examples of a pair
EXTRA = 2.0  # the confidence of all that are no pairs

UNLEARNT = {"cc12m": 2}  # data sets whose captions' first tokens cost nothing
READ_TOKENS = 512  # of a text, before the last ones of these are kept
CODE_PIXELS = 8  # a side of what an image code stands for
AUGMENT_BY = ("row", "epoch")

load_negatives = functools.cache(negatives.load)


@dataclasses.dataclass(kw_only=True)
class Part(Seq2Seq):
  """What all kinds share.

  Attributes:
    clip: whether a box that reaches over its picture's edge ends there; else its row is bad.
    box_size: pixels that the bins divide (--max-image-size).
    code_image_size: a side of the part of a picture that is filled in; those of pictures that are
      no pairs are twice as long.
    augment_by: "row", or "epoch": all pairs of an epoch are recoloured and bent alike, as in the
      original.
  """

  clip: bool = False
  box_size: int = boxes.BOX_SIZE
  code_image_size: int = 128
  augment_by: str = "row"

  def example(self, row, rng):
    if rng is None:
      return self.made(row, Drawn(np.random.default_rng(row.index)))
    by_epoch = self.augment_by == "epoch"
    return self.made(row, Drawn(rng, augment=augmenting(epoch_of(rng)) if by_epoch else None))

  def made(self, row: Row, draws: Draws) -> dict[str, Any]:
    """The example that these draws make of a row, see `Seq2Seq.example`."""
    raise NotImplementedError

  def bins(self, box: np.ndarray) -> list[int]:
    """The ids of a box float32[4] in the pixels of the picture that the model sees."""
    words = self.words
    numbers = boxes.to_bins(
      box, num_bins=words.num_bins, scale=np.ones(2, np.float32), box_size=self.box_size
    )
    return [words.bin_id(i) for i in numbers]

  def box(self, row: Row, text: str, size: tuple[int, int]) -> np.ndarray:
    """A box of a row's, float32[4] in pixels of the stored picture."""
    try:
      return boxes.read(text, size=size, clip=self.clip)
    except ValueError as error:
      raise BadRow(row.name, str(error)) from error


@dataclasses.dataclass(kw_only=True)
class Pairs(Part):
  """Pictures with a caption, a question, or a text about a region of theirs: two examples each.

  Attributes:
    negatives: folder of what wrong captions and answers are made of, see `data/negatives.py`.
    max_words, max_target_words: of texts that are asked about (--max-src-length) and of captions
      that are learnt (--max-tgt-length).
  """

  fields: ClassVar[tuple[str, ...]] = (
    "id", IMAGE, "caption", "question", "answer", "objects", "dataset", "type",
  )  # fmt: skip

  negatives: str
  max_words: int = prompts.MAX_WORDS
  max_target_words: int = 30

  @property
  def wrong(self) -> Negatives:
    """The wrong captions and answers; ValueError where their files are missing or faulty."""
    return load_negatives(self.negatives)

  def examples(self, split):
    _ = self.wrong  # its faults are told before anything is compiled
    return super().examples(split)

  def made(self, row, draws):
    make = dict(zip(TYPES, (self._caption, self._question, self._region), strict=True))
    kind = row["type"]
    if kind not in make:
      raise BadRow(row.name, f"expected a type out of {', '.join(TYPES)}, found {kind[:40]!r}")
    image, asked = make[kind](row, draws)
    return {IMAGE: np.asarray(image), "asked": asked}

  def assemble(self, example, *, warn=False):
    made = [Seq2Seq.assemble(self, asked, warn=warn) for asked in example["asked"]]
    arrays = {name: np.stack([each[name] for each in made]) for name in made[0]}
    return {IMAGE: example[IMAGE]} | arrays

  def blank(self):
    nothing = {"source": [], "target": [], "kind": np.int32(0), "conf": np.float32(1)}
    image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
    blank = self.assemble({IMAGE: image, "asked": [nothing] * ASKED})
    return blank | {"target": np.full_like(blank["target"], PAD)}

  def taught(self, batch):
    return super().taught(asked_apart(batch))

  def _whole(self, row, draws):
    """The middle of a picture, recoloured and bent."""
    image = crops.central(
      crops.resized(row.image(), draws, side=self.image_size), side=self.image_size
    )
    return random_augment(np.asarray(image), draws.augment, sparing=True)

  def _caption(self, row, draws):
    image, text = self._whole(row, draws), row["caption"]
    if not pre_caption(text, max_words=1):
      raise BadRow(row.name, "the caption is empty")
    wrong = self.wrong.caption(text, row["objects"], draws)
    right = draws.random() >= 0.5
    about = pre_caption(text if right else wrong, max_words=self.max_words)
    caption = self.encode(" " + pre_caption(text, max_words=self.max_target_words))
    unlearnt = min(UNLEARNT.get(row["dataset"], 0), len(caption))
    learnt = {"target": [PAD] * unlearnt + caption[unlearnt:], "seen": caption}
    return image, [
      self._asked("caption", prompts.caption(), learnt),
      self._asked("matching_caption", prompts.MATCHING.format(about), _yes(right)),
    ]

  def _question(self, row, draws):
    image = self._whole(row, draws)
    question = pre_question(row["question"], max_words=self.max_words)
    if not question:
      raise BadRow(row.name, "the question is empty")
    answer, confidence = _likeliest(row)
    wrong = self.wrong.answer(answer, confidence, draws)
    right = draws.random() >= 0.5
    about = prompts.ANSWER_MATCHING.format(question, answer if right else wrong)
    return image, [
      self._asked("vqa", f" {question}", f" {answer}", confidence),
      self._asked("matching_answer", about, _yes(right), confidence),
    ]

  def _region(self, row, draws):
    image, text = row.image(), row["caption"]
    about = pre_caption(text, max_words=self.max_words)
    if not about:
      raise BadRow(row.name, "the caption is empty")
    box = self.box(row, row["answer"], image.size)
    image, box = crops.around(image, box, draws, side=self.image_size)
    draws.random()  # the original's, of whether a match is right, which regions have none of
    bins = self.bins(box)
    region = [*self.encode(prompts.REGION_CAPTION), *bins]
    caption = " " + pre_caption(text, max_words=self.max_target_words)
    return image, [
      self._asked("grounding", prompts.REGION.format(about), bins),
      self._asked("grounded_caption", region, caption),
    ]

  def _asked(self, kind, source, target, confidence=1.0):
    """One of the two examples: texts or ids in, ids out."""
    example = {"source": source, "target": target}
    example = {k: self.encode(v) if isinstance(v, str) else v for k, v in example.items()}
    if isinstance(target, Mapping):
      example |= target
    return example | {
      "kind": np.int32(OBJECTIVES.index(kind)),
      "conf": np.float32(confidence),
    }


@dataclasses.dataclass(kw_only=True)
class Texts(Part):
  """Texts with hidden words.

  Attributes:
    ratio: share of the words that is hidden (--mask-ratio).
    mean: words of a span (--poisson-lambda).
    max_tokens: of a text, the last of its first 512.
  """

  fields: ClassVar[tuple[str, ...]] = ("id", "text")

  columns: tuple[int, ...] = (0, 1)
  ratio: float = 0.3
  mean: float = 3.0
  max_tokens: int = 256

  def made(self, row, draws):
    text = row["text"].strip().lower()
    if not text:
      raise BadRow(row.name, "the text is empty")
    tokens = self.words.encode(f" {text}", most=READ_TOKENS)[-self.max_tokens :]
    hidden = masked(tokens, self.words, draws, ratio=self.ratio, mean=self.mean)
    before, after = map(self.encode, prompts.WHOLE_TEXT)
    return {
      "source": [*before, *hidden, *after],
      "target": tokens,
      "conf": np.float32(EXTRA),
    }

  def blank(self):
    return super().blank() | {"conf": np.float32(EXTRA)}


@dataclasses.dataclass(kw_only=True)
class Middles(Part):
  """Pictures without their middle part, which comes back as image codes."""

  fields: ClassVar[tuple[str, ...]] = ("id", IMAGE, "codes")

  columns: tuple[int, ...] = (0, 1, 2)

  def made(self, row, draws):
    del draws
    image, side = row.image(), self.image_size
    if image.size != (side, side):
      found = " x ".join(map(str, image.size))
      raise BadRow(row.name, f"expected a picture of {side} x {side} pixels, found {found}")
    return {
      IMAGE: np.asarray(image),
      "source": self.encode(prompts.MIDDLE),
      "target": self._codes(row),
      "conf": np.float32(EXTRA),
      "code_mask": np.bool_(True),
    }

  def blank(self):
    return super().blank() | {"conf": np.float32(EXTRA), "code_mask": np.bool_(True)}

  def pictures(self, rows):
    """The middle is the mean of all colours: 0."""
    given = super().pictures(rows)
    begin = (self.image_size - self.code_image_size) // 2
    inside = (jnp.arange(self.image_size) >= begin) & (
      jnp.arange(self.image_size) < begin + self.code_image_size
    )
    hidden = (inside[:, None] & inside)[..., None]
    return given | {IMAGE: jnp.where(hidden, 0.0, given[IMAGE])}

  def _codes(self, row):
    words, number = self.words, (self.code_image_size // CODE_PIXELS) ** 2
    codes = row["codes"].split()
    if len(codes) != number:
      raise BadRow(row.name, f"expected {number} image codes, found {len(codes)}")
    faulty = [code for code in codes if not code.isdecimal() or int(code) >= words.num_codes]
    if faulty:
      raise BadRow(
        row.name, f"expected image codes from 0 to {words.num_codes - 1}, found {faulty[0][:20]!r}"
      )
    return [words.code_id(int(code)) for code in codes]


@dataclasses.dataclass(kw_only=True)
class Objects(Part):
  """Pictures in which all objects are asked for: four bins and a name each."""

  fields: ClassVar[tuple[str, ...]] = ("id", IMAGE, "objects")

  columns: tuple[int, ...] = (0, 1, 2)

  def made(self, row, draws):
    image = row.image()
    told = [
      self._object(row, text, image.size) for text in row["objects"].strip().split(REFERENCES)
    ]
    whole = np.stack([box for box, _ in told])
    image, inside, kept = crops.jittered(image, whole, draws, side=self.image_size)
    target = []
    for box, number in zip(inside, kept, strict=True):
      target += [*self.bins(box), *self.encode(f" {told[number][1]}")]
    return {
      IMAGE: np.asarray(image),
      "source": self.encode(prompts.OBJECTS),
      "target": target,
      "conf": np.float32(EXTRA),
    }

  def blank(self):
    return super().blank() | {"conf": np.float32(EXTRA)}

  def _object(self, row, text, size):
    """The box and the name in "x0,y0,x1,y1,id,name"."""
    parts = text.strip().split(",", 5)
    if len(parts) != 6 or not parts[5].strip():
      raise BadRow(row.name, f"expected an object x0,y0,x1,y1,id,name, found {text[:60]!r}")
    return self.box(row, ",".join(parts[:4]), size), parts[5]


def asked_apart(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """A batch of pairs as one of their examples, two behind each other with the same picture."""
  apart = {}
  for name, x in batch.items():
    if name in (IMAGE, "weight"):
      apart[name] = jnp.repeat(x, ASKED, axis=0)
    else:
      apart[name] = x.reshape(-1, *x.shape[2:])
  return apart


def _likeliest(row: Row) -> tuple[str, float]:
  """The answer of the highest confidence, the first of equal ones, and that."""
  try:
    answers = vqa.confidences(row["answer"])
  except ValueError as error:
    raise BadRow(row.name, str(error)) from error
  if not any(answers.values()):
    raise BadRow(row.name, "there is no answer to learn")
  answer = vqa.best(answers)
  return answer, answers[answer]


def _yes(right: bool) -> str:
  return " yes" if right else " no"
