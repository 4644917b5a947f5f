"""Image classification (OFA, arXiv 2202.03052, section 4.3): the class whose name fits best.

The question is that for captions; the answer is chosen among the names of all classes.
"""

import dataclasses
import functools
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax import pictures
from ofa_jax.data import answers as answer_lists
from ofa_jax.data import augment_imagenet, images, prompts
from ofa_jax.data.tfds_images import TfdsImages
from ofa_jax.data.tfds_texts import is_tfds
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.tasks.answering import Answering
from ofa_jax.tasks.base import normalized
from ofa_jax.tasks.choice import Choices
from ofa_jax.tasks.chosen import Chosen
from ofa_jax.tasks.seq2seq import Rows
from ofa_jax.tasks.words import load_tokenizer

AUGMENT = ("none", "original", "repaired")
TFDS_SPLITS = {"valid": "validation"}  # what the splits are called there

ANSWERING = Answering(
  prompt=lambda texts, chinese: prompts.caption(chinese=chinese),
  columns={"id": 1, IMAGE: 0},
  id="id",
  result="class",
)


@dataclasses.dataclass(kw_only=True)
class ImageClassify(Chosen):
  """The class of a picture, out of the names of all classes.

  Data is the original's TSV; or images with labels of TensorFlow Datasets, tfds:NAME or
  tfds:NAME:SPLIT, such as tfds:imagenet2012, whose decoded pictures are not cached.

  Attributes:
    answers: a file of the classes' names, see `data/answers.py`. For TensorFlow Datasets they are
      in the order of its classes, or have numbers that say it.
    augment: of training pictures. "original": the recipe's, `data/augment_imagenet.py`, with the
      fault of its AutoContrast; "repaired": without it; "none".
  """

  metrics: ClassVar[tuple[str, ...]] = ("score",)
  fields: ClassVar[tuple[str, ...]] = (IMAGE, "label")
  answering: ClassVar[Answering] = ANSWERING

  columns: tuple[int, ...] = (0, 2)
  pixel_mean: tuple[float, ...] = images.IMAGENET_MEAN
  pixel_std: tuple[float, ...] = images.IMAGENET_STD
  source_length: int = 16
  target_length: int = 32
  prompt: str = "none"
  answers: str
  augment: str = "original"

  @property
  def choices(self) -> Choices:
    return load_classes(self.answers, self.tokenizer)

  def image(self, row, rng):
    if rng is None or self.augment == "none":
      return super().image(row, rng)
    repaired = self.augment == "repaired"
    return augment_imagenet.augment(row.image(), rng, size=self.image_size, repaired=repaired)

  def example(self, row, rng):
    label = row["label"] if row["label"].strip() else None
    if label is None and rng is not None:
      raise BadRow(row.name, "there is no class to learn")
    example = self.asks(self.asked(row), label, row=row, learn=label is not None)
    erased = np.zeros(4, np.int32)
    if rng is not None and self.augment != "none":
      erased = augment_imagenet.erased_box(self.image_size, rng)
    return example | {IMAGE: self.image(row, rng), "erased": erased}

  def blank(self):
    return super().blank() | {"erased": np.zeros(4, np.int32)}

  def check(self, config):
    faults = super().check(config)
    if self.augment not in AUGMENT:
      faults.append(f"task.augment: expected one of {', '.join(AUGMENT)}, found {self.augment!r}")
    if self.answer_length < 1:
      faults.append(f"task.answer_length: expected at least 1, found {self.answer_length}")
    return faults

  def examples(self, split):
    files = {"train": self.train, "valid": self.valid, "test": self.test}.get(split) or ()
    if not any(map(is_tfds, files)):
      return super().examples(split)
    split, labels = TFDS_SPLITS.get(split, split), answer_lists.numbered(self.answers)
    table = TfdsImages.of(files, split=split, labels=labels)
    return Rows(dataclasses.replace(self, cache_dir=None), table)

  def prepare(self, model, batch, *, rngs, step, frozen):
    """Adds the trie, and takes the colours out of the pixels: in the erased boxes is noise."""
    batch = super().prepare(model, batch, rngs=rngs, step=step, frozen=frozen)
    if self.augment == "none":
      return batch
    pixels = normalized(batch[IMAGE], mean=self.pixel_mean, std=self.pixel_std)
    return {**batch, IMAGE: erase(pixels, batch["erased"], rngs=rngs)}

  def score(self, predictions, streams):
    """The original's "score": the share that is right of what has a class and can be read."""
    rows, told = streams["examples"], self.texts(predictions)
    labels = {i: rows.row(i)["label"] for i in told}
    right = [told[i] == label for i, label in labels.items() if label.strip()]
    return {"score": sum(right) / len(right)} if right else {}

  def results(self, predictions, streams):
    """`predict.json`: the row's number and its class, as the original writes them."""
    told = [{"uniq_id": i, "answer": name} for i, name in self.texts(predictions).items()]
    return {"predict.json": json.dumps(told, ensure_ascii=False).encode()} | self.pages(
      predictions, streams
    )

  def cell(self, row, answer, *, image):
    return pictures.answer(image, "", answer, row["label"], right=answer == row["label"])


def erase(pixels: jax.Array, boxes: jax.Array, *, rngs: jax.Array) -> jax.Array:
  """Puts normal noise into boxes int32[B, 4] = top, left, height, width of images [B, S, S, 3]."""
  top, left, height, width = (x[:, None] for x in boxes.T)
  lines, columns = jnp.arange(pixels.shape[1]), jnp.arange(pixels.shape[2])
  down = (lines >= top) & (lines < top + height)
  across = (columns >= left) & (columns < left + width)
  inside = (down[:, :, None] & across[:, None, :])[..., None]
  return jnp.where(inside, jax.random.normal(rngs, pixels.shape, pixels.dtype), pixels)


@functools.lru_cache(maxsize=4)
def load_classes(answers: str, tokenizer: str) -> Choices:
  """The classes of a file, read once; ValueError where they cannot be."""
  return Choices.of(answer_lists.load(answers), load_tokenizer(tokenizer).encode)
