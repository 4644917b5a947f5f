"""OFA's pretraining (arXiv 2202.03052, section 3.2): eight objectives on one model at once.

Pairs of a picture and a text teach captioning, visual question answering, grounding, grounded
captioning, and whether a caption or an answer is the right one; beside them stand texts and
pictures with hidden parts and pictures whose objects are asked for. Every update has rows of all
four files, each a named stream (`data/streams.py`), so that the place in every file is a function
of the step.

As in the original the loss is the mean over the tokens of the pairs plus the mean over those of all
else. The original has the latter in every second update of four pairs; here they are in each, in
the same proportions to the pairs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax import losses
from ofa_jax import losses_vocabulary as vocabulary
from ofa_jax.data import boxes, images, prompts
from ofa_jax.data.protocols import Rows
from ofa_jax.data.tsv import IMAGE
from ofa_jax.models.layers import split_rngs
from ofa_jax.tasks import taught
from ofa_jax.tasks.base import Task
from ofa_jax.tasks.pretrain_parts import (
  AUGMENT_BY,
  CODE_PIXELS,
  OBJECTIVES,
  Middles,
  Objects,
  Pairs,
  Part,
  Texts,
  asked_apart,
)
from ofa_jax.tokenizers.special import PAD

PAIRS, TEXT, PICTURE, DETECTION = STREAMS = ("pairs", "text", "image", "detection")
ALONE = {TEXT: ("infilling",), PICTURE: ("image_infilling",), DETECTION: ("detection",)}
NAMES = (*OBJECTIVES, *(name for names in ALONE.values() for name in names))


class Present(NamedTuple):
  """As `losses.Mean`, of what not every batch has: without any it is NaN, and is not logged."""

  total: jax.Array
  count: jax.Array

  @property
  def value(self) -> jax.Array:
    """The mean."""
    return jnp.where(self.count > 0, self.total / jnp.maximum(self.count, 1e-9), jnp.nan)


@dataclasses.dataclass(kw_only=True)
class Pretrain(Task):
  """Four files, nine losses by name, one step.

  Attributes:
    train: TSV files of pairs: id, picture, caption, question, answer, objects, data set, type.
    text: of texts: id, text. (): there are none, and so for the next two.
    image: of pictures and their codes: id, picture, codes of its middle.
    detection: of pictures and their objects: id, picture, objects.
    columns, text_columns, image_columns, detection_columns: places of these in their files.
    negatives: folder of what wrong captions and answers are made of, the original's
      `negative_sample`.
    tokenizer: folder of the tokenizer's files, or a model that has them.
    every: so many pairs for each picture that is filled in and each whose objects are asked for.
    texts: that come with each of these.
    multiple: rows of the files but the pairs' are rounded to a multiple of this, at least one.
    image_size: pixels a side of the pairs' pictures.
    code_image_size: of the part that is filled in; other pictures have twice the side.
    num_patches: cells of the pairs' pictures that are drawn (--sample-patch-num); None: all.
    pixel_mean, pixel_std: what is taken out of the pixels' colours.
    source_length, target_length: tokens of a pair's sources and targets.
    text_length: tokens of a text, the last of which are kept.
    prompt_length: tokens of the questions about other pictures.
    objects_length: tokens that objects are told in.
    max_words, max_target_words: of the pairs' texts, see `Pairs`.
    smoothing: of the labels.
    vocab_blocks: parts of the vocabulary that have logits at a time, see `Seq2Seq`.
    ratio, mean: share of a text's words that is hidden, and words of a span.
    clip: whether a box that reaches over its picture's edge ends there; else its row is bad.
    box_size: pixels that the bins divide.
    augment_by: "row": pictures are recoloured and bent each for itself. "epoch": as in the
      original, whose numbers for it are the same for all of an epoch.
    blank_pictures: whether texts come with a blank picture, which is hidden from attention and goes
      into BatchNorm's statistics, as in the original.
  """

  unit: ClassVar[str] = "pairs"

  train: tuple[str, ...] = ()
  text: tuple[str, ...] = ()
  image: tuple[str, ...] = ()
  detection: tuple[str, ...] = ()
  columns: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
  text_columns: tuple[int, ...] = (0, 1)
  image_columns: tuple[int, ...] = (0, 1, 2)
  detection_columns: tuple[int, ...] = (0, 1, 2)
  negatives: str
  tokenizer: str
  every: int = 8
  texts: int = 2
  multiple: int = 1
  image_size: int = 384
  code_image_size: int = 128
  num_patches: int | None = 196
  pixel_mean: tuple[float, ...] = images.HALF_MEAN
  pixel_std: tuple[float, ...] = images.HALF_STD
  source_length: int = 96
  target_length: int = 48
  text_length: int = 256
  prompt_length: int = 16
  objects_length: int = 257
  max_words: int = prompts.MAX_WORDS
  max_target_words: int = 30
  smoothing: float = 0.0
  vocab_blocks: int = 1
  ratio: float = 0.3
  mean: float = 3.0
  clip: bool = False
  box_size: int = boxes.BOX_SIZE
  augment_by: str = "row"
  blank_pictures: bool = False

  @property
  def parts(self) -> dict[str, Part]:
    """The kinds of rows that there are, by the names of their streams."""
    shared = {
      name: getattr(self, name)
      for name in (
        "tokenizer", "pixel_mean", "pixel_std", "smoothing", "vocab_blocks", "clip", "box_size",
        "code_image_size", "augment_by",
      )
    }  # fmt: skip
    side, codes = 2 * self.code_image_size, (self.code_image_size // CODE_PIXELS) ** 2
    parts = {
      PAIRS: Pairs(
        train=self.train,
        columns=self.columns,
        negatives=self.negatives,
        image_size=self.image_size,
        num_patches=self.num_patches,
        source_length=self.source_length,
        target_length=self.target_length,
        max_words=self.max_words,
        max_target_words=self.max_target_words,
        **shared,
      ),
      TEXT: Texts(
        train=self.text,
        columns=self.text_columns,
        source_length=self.text_length + 2 * self.prompt_length,
        target_length=self.text_length + 1,
        max_tokens=self.text_length,
        ratio=self.ratio,
        mean=self.mean,
        **shared,
      ),
      PICTURE: Middles(
        train=self.image,
        columns=self.image_columns,
        image_size=side,
        source_length=self.prompt_length,
        target_length=codes + 1,
        **shared,
      ),
      DETECTION: Objects(
        train=self.detection,
        columns=self.detection_columns,
        image_size=side,
        source_length=self.prompt_length,
        target_length=self.objects_length,
        **shared,
      ),
    }
    return {name: part for name, part in parts.items() if name == PAIRS or part.train}

  def batch_sizes(self, batch_size: int) -> dict[str, int]:
    turns = batch_size / self.every
    exact = {TEXT: self.texts * turns, PICTURE: turns, DETECTION: turns}
    rounded = {
      name: max(1, math.ceil(size / self.multiple)) * self.multiple for name, size in exact.items()
    }
    return {name: batch_size if name == PAIRS else rounded[name] for name in self.parts}

  def examples(self, split: str) -> dict[str, Rows]:
    if split != "train":
      raise ValueError(
        f"Expected the split 'train', found {split!r}: pretraining has no other. It is "
        "evaluated by the other tasks, such as configs/ofa_vqa.py:base,zeroshot."
      )
    return {name: part.examples(split) for name, part in self.parts.items()}

  def batch_spec(self, batch_size: int) -> dict[str, Any]:
    sizes = self.batch_sizes(batch_size)
    return {name: part.batch_spec(sizes[name]) for name, part in self.parts.items()}

  def model_files(self) -> dict[str, bytes]:
    return self.parts[PAIRS].model_files()

  def check(self, config: Any) -> list[str]:
    faults = [
      f"task.{field}: expected at least 1, found {value}"
      for field in (
        "every", "texts", "multiple", "text_length", "max_words", "max_target_words", "box_size",
      )
      if (value := getattr(self, field)) < 1
    ]  # fmt: skip
    if faults:
      return faults
    if self.augment_by not in AUGMENT_BY:
      faults.append(
        f"task.augment_by: expected one of {', '.join(AUGMENT_BY)}, found {self.augment_by!r}"
      )
    for field in ("ratio", "mean"):
      if not (value := getattr(self, field)) > 0 or (field == "ratio" and value > 1):
        faults.append(f"task.{field}: expected more than 0, a ratio at most 1, found {value}")
    side, model = self.code_image_size, config.model
    if side % CODE_PIXELS or not side:
      faults.append(f"task.code_image_size: expected a multiple of {CODE_PIXELS}, found {side}")
    if self.image and side != model.code_image_size:
      faults.append(
        f"task.code_image_size: expected the model's {model.code_image_size}, found {side}"
      )
    for field, least in (("num_bins", 2), ("num_codes", 1)):
      if (field == "num_bins" or self.image) and getattr(model, field) < least:
        faults.append(f"model.{field}: expected {least} at least, found {getattr(model, field)}")
    largest = max(self.image_size, 2 * side if self.detection else 0)
    if self.box_size < largest:
      faults.append(
        f"task.box_size: expected at least the {largest} pixels of a picture, found {self.box_size}"
      )
    found = {name: part.check(config) for name, part in self.parts.items()}
    # What all streams have, such as the tokenizer, is told once.
    shared = [fault for fault in found[PAIRS] if all(fault in told for told in found.values())]
    for name, told in found.items():
      faults += [f"of the stream {name!r}: {fault}" for fault in told if fault not in shared]
    return faults + shared

  def groups(self) -> list[list[str]]:
    """The streams that go through the model together."""
    others = [name for name in self.parts if name != PAIRS]
    if self.blank_pictures:
      return [[PAIRS], *([others] if others else [])]
    pictured = [name for name in others if name != TEXT]
    return [[PAIRS], *([[TEXT]] if TEXT in others else []), *([pictured] if pictured else [])]

  def loss(self, model, batch, *, rngs, chunks=1):
    """The sum of both means as "loss", each of them, and every objective's "name/loss"."""
    del chunks
    parts, groups = self.parts, self.groups()
    terms, named = {}, {}
    for names, key in zip(groups, split_rngs(rngs, len(groups)), strict=True):
      batches = [self._taught(parts[name], batch[name]) for name in names]
      logits = taught.joint_logits(
        model,
        batches,
        blocks=[self.vocab_blocks] * len(names),
        num_patches=parts[names[0]].num_patches,
        rngs=key,
      )
      for name, each, own in zip(names, batches, logits, strict=True):
        rows = asked_apart(batch[name]) if name == PAIRS else batch[name]
        cost = vocabulary.costs(own, each.targets, smoothing=self.smoothing)
        keep = each.targets != PAD
        terms[name] = losses.mean(cost.loss * rows["conf"][:, None], keep)
        named |= by_objective(cost, keep, ALONE.get(name, OBJECTIVES), kinds=rows.get("kind"))
    metrics = {"pairs_loss": terms.pop(PAIRS)}
    if terms:
      totals, counts = zip(*terms.values(), strict=True)
      metrics["others_loss"] = losses.Mean(sum(totals), sum(counts))
    return {"loss": losses.sum_of_means(*metrics.values()), **metrics, **named}

  def log_line(self, values):
    there = [name for name in NAMES if not math.isnan(values.get(f"{name}/loss", math.nan))]
    told = " | ".join(
      f"{name} {values[f'{name}/loss']:.4f} ({values[f'{name}/accuracy']:.1%})" for name in there
    )
    return (
      "Global Steps: {step}/{steps} | Train Epoch: {epoch} [{seen}/{rows} ({percent:.0f}%)] | "
      "Loss: {loss:.6f} | {told} | Grad Norm: {grad_norm:.3f} | Data Time: {data_time:.3f}s | "
      "Batch Time: {batch_time:.3f}s | LR: {lr:.3e} | Global Batch Size: {batch_size}"
    ).format(told=told, **values)

  def _taught(self, part: Part, batch: Mapping[str, jax.Array]) -> taught.Taught:
    """What the model is given of a stream; with `blank_pictures` texts have pictures, too."""
    given = part.taught(batch)
    if not isinstance(part, Texts) or not self.blank_pictures:
      return given
    rows, side = len(given.inputs["tokens"]), 2 * self.code_image_size
    blank = jnp.zeros((rows, side, side, 3), np.float32)
    inputs = given.inputs | {IMAGE: blank, "image_mask": jnp.zeros(rows, bool)}
    return given._replace(inputs=inputs)


def by_objective(
  cost: vocabulary.Costs, keep: jax.Array, names: Sequence[str], *, kinds: jax.Array | None = None
) -> dict[str, Present]:
  """The mean cost and accuracy of the tokens of each objective, by name; confidences do not count.

  Args:
    cost: of tokens [B, T].
    keep: bool[B, T], which of them are learnt.
    names: of the objectives.
    kinds: int32[B], the number of each row's objective among them; None: all are of the first.
  """
  nll = jax.lax.stop_gradient(cost.nll)
  told = {}
  for number, name in enumerate(names):
    mine = keep if kinds is None else keep & (kinds == number)[:, None]
    told |= {
      f"{name}/loss": Present(*losses.mean(nll, mine)),
      f"{name}/accuracy": Present(*losses.mean(cost.hit, mine)),
    }
  return told
