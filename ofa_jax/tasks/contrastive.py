"""Contrastive image-text training and its evaluations (Chinese-CLIP, arXiv 2211.01335).

Negatives come from the whole global batch. `Contrastive` trains and scores retrieval over full
pools; `zeroshot.ZeroShot` scores classification.
"""

import dataclasses
import functools
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ofa_jax import hub, losses, pictures, trees
from ofa_jax.convert.cnclip import family as cnclip_family
from ofa_jax.data import images, pairs, pipeline, splits
from ofa_jax.data.augment import AUGMENT
from ofa_jax.data.protocols import Rows
from ofa_jax.data.text import normalize_caption
from ofa_jax.models.clip_resnet import ResNetConfig
from ofa_jax.models.layers import recomputed
from ofa_jax.numerics import widened
from ofa_jax.scoring import retrieval
from ofa_jax.tasks import in_batch
from ofa_jax.tasks.base import Batch, Task, normalized
from ofa_jax.tasks.frozen import Frozen
from ofa_jax.tokenizers.bert import ChineseBertTokenizer

_STUCK_ROWS = 5  # log rows near ln(batch) before a hint
_NEAR, _STILL = 0.03, 0.02  # how near, and how far apart, as shares of it
_PAGE_TEXTS, _PAGE_IMAGES = 8, 6  # shown of an evaluation


@dataclasses.dataclass(kw_only=True)
class Contrastive(Task):
  """Symmetric InfoNCE, or SigLIP's loss, over image-text pairs.

  Attributes:
    train, valid, test: data of each split, or its path: a folder in which the split is looked for,
      or a file or pattern (`PairData.of`); several sources are mixed by their weights.
    image_size: pixels a side.
    context_length: tokens of a text, [CLS] and [SEP] included.
    augment: "none"; "crop", a random square of three quarters of the area, mirrored at random;
      "auto", the original's random resized crop, mirror and AutoAugment (`data/augment.py`).
    exact_decode: resize training images as the evaluation does; False decodes faster.
    mask_ratio: share of image patches left out in training (FLIP, arXiv 2212.00794).
    mask_until: step from which whole images are seen, FLIP's last phase. None: never.
    multi_positive: pairs with an equal caption or the same image are positives too.
    loss_kind: "softmax" or "sigmoid" (SigLIP, arXiv 2303.15343; set `logit_bias` of the model).
    loss_chunks: strips in which a device's logits are computed; more take less memory.
    gather: False contrasts the rows of each device only (the original's --skip-aggregate).
    ring: pass the texts from device to device, so that none holds more logits than rows x rows of
      its own; False lets the compiler split the matrix by rows.
    freeze_batch_norm: a ResNet keeps its running statistics and uses them in training.
    teacher: model to learn from, as `hub.open_model` takes it; of the same image size. None: off.
    distill_features: weight of its image features, as in the original (`--kd_loss_weight`, 0.5).
    distill_logits: weight of its similarities between images and texts.
    hold_out: where `valid` is not given: share of the training pictures that are kept back and
      evaluated in its place (`data/splits.py`); 0: none.
    valid_batch_size, valid_gpus: pairs that an evaluation compares with each other for its loss and
      accuracies (the original's --valid-batch-size), drawn as its sampler draws them for so many
      GPUs, however many there are; recalls are over all.
    cache_dir: folder of the decode cache, which makes later epochs nearly free; None: off.
    cache_bytes: its size limit.
  """

  train: tuple[pairs.PairData | str, ...] = ()
  valid: tuple[pairs.PairData | str, ...] = ()
  test: tuple[pairs.PairData | str, ...] = ()
  image_size: int = 224
  context_length: int = 52
  augment: str = "none"
  exact_decode: bool = False
  mask_ratio: float = 0.0
  mask_until: int | None = None
  multi_positive: bool = False
  loss_kind: str = "softmax"
  loss_chunks: int = 1
  gather: bool = True
  ring: bool = False
  freeze_batch_norm: bool = False
  teacher: str | None = None
  distill_features: float = 0.5
  distill_logits: float = 0.0
  hold_out: float = 0.0
  valid_batch_size: int = 64
  valid_gpus: int = 1
  cache_dir: str | None = None
  cache_bytes: int = 64 * 2**30

  whole_batch: ClassVar[bool] = True
  metrics: ClassVar[tuple[str, ...]] = (
    *(f"{way}_{m}" for way in ("t2i", "i2t") for m in retrieval.METRICS),
    *("loss", "i2t_acc", "t2i_acc", "logit_scale"),
  )
  unit: ClassVar[str] = "pairs"

  def check(self, config: Any) -> list[str]:
    faults = check_image_size(self.image_size, config)
    for field in ("mask_ratio", "hold_out"):
      if not 0 <= (share := getattr(self, field)) < 1:
        faults.append(f"task.{field}: expected 0 <= share < 1, found {share}")
    if not 2 <= self.context_length <= config.model.text.max_positions:
      faults.append(
        f"task.context_length: expected 2 to {config.model.text.max_positions} (the text tower's "
        f"positions), found {self.context_length}"
      )
    for field, allowed in (("augment", AUGMENT), ("loss_kind", losses.LOSSES)):
      if getattr(self, field) not in allowed:
        value = getattr(self, field)
        faults.append(f"task.{field}: expected one of {', '.join(allowed)}, found {value!r}")
    if self.mask_until is not None and not self.mask_ratio:
      faults.append("task.mask_until: expected a mask_ratio with it, found 0")
    for field in ("loss_chunks", "valid_batch_size", "valid_gpus"):
      if getattr(self, field) < 1:
        faults.append(f"task.{field}: expected at least 1, found {getattr(self, field)}")
    if (config.model.logit_bias is None) == (self.loss_kind == "sigmoid"):
      faults.append(
        "model.logit_bias: expected a number with task.loss_kind='sigmoid' (SigLIP: -10) and None "
        f"with 'softmax', found {config.model.logit_bias}"
      )
    return faults + _check_batch_norm(self, config) + _check_teacher(self)

  def frozen(self, mesh, *, precision, training=True, load=True):
    """The teacher's weights, replicated, in the compute dtype; its statistics stay float32."""
    if self.teacher is None or not training:
      return None
    teacher = frozen_model(self.teacher)
    return (teacher.load if load else teacher.spec)(mesh, precision=precision)

  def prepare(self, model, batch, *, rngs, step, frozen):
    """Adds the teacher's features, and whether this step sees whole images."""
    del model, rngs
    batch = dict(batch)
    if self.mask_until is not None:
      batch["unmasked"] = step >= self.mask_until
    if self.teacher is not None:
      teacher = frozen_model(self.teacher).merge(frozen)
      batch["teacher_image"] = teacher.encode_image(to_float(batch["image"]))
      if self.distill_logits:
        batch["teacher_text"] = losses.normalize(teacher.encode_text(batch["tokens"]))
        batch["teacher_scale"] = jnp.exp(widened(teacher.logit_scale[...]))
    return batch

  def in_strips(self, num, *, rows):
    chunks = num * self.loss_chunks
    return {} if rows % chunks else {"loss_chunks": chunks}

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    spec = jax.ShapeDtypeStruct
    return {
      "image": spec((batch_size, self.image_size, self.image_size, 3), jnp.uint8),
      "tokens": spec((batch_size, self.context_length), jnp.int32),
      "image_index": spec((batch_size,), jnp.int32),
      "caption_index": spec((batch_size,), jnp.int32),
      "weight": spec((batch_size,), jnp.float32),
    }

  def examples(self, split: str) -> Rows:
    sources = self._load(split)
    rows = [
      pairs.PairRows(
        images,
        texts,
        size=self.image_size,
        tokenize=tokenizer(self.context_length),
        augment=self.augment,
        exact=self.exact_decode,
        cache_dir=self.cache_dir,
        cache_bytes=self.cache_bytes,
      )
      for images, texts, _ in sources
    ]
    return rows[0] if len(rows) == 1 else pipeline.Mixture(rows, [s[2] for s in sources])

  def loss(self, model, batch, *, rngs, chunks=1):
    mask_ratio = self.mask_ratio if rngs is not None else 0.0
    encode = functools.partial(
      _encode,
      mask_ratio=mask_ratio,
      unmasked=batch.get("unmasked"),
      freeze_batch_norm=self.freeze_batch_norm,
    )
    image, text = _in_chunks(encode, model, batch, rngs=rngs, chunks=chunks)
    weight = batch["weight"]
    labels = None
    if self.multi_positive:
      labels = jnp.stack([batch["caption_index"], batch["image_index"]], axis=1)
    teacher = None
    if "teacher_text" in batch:
      features = losses.normalize(batch["teacher_image"])
      teacher = losses.Teacher(features, batch["teacher_text"], batch["teacher_scale"])
    scale = widened(model.logit_scale[...])
    metrics = losses.contrastive(
      image,
      text,
      scale=jnp.exp(scale),
      weight=weight,
      labels=labels,
      kind=self.loss_kind,
      bias=None if model.logit_bias is None else model.logit_bias[...],
      teacher=teacher,
      chunks=self.loss_chunks,
      gather=self.gather,
      ring=self.ring,
    )
    total = metrics["loss"].total
    if "teacher_image" in batch:
      kd = losses.distill_features(image, batch["teacher_image"], weight=weight)
      metrics["distill_features"] = kd
      total += self.distill_features * kd.total
    if teacher is not None:
      total += self.distill_logits * metrics["distill_logits"].total
    metrics["loss"] = metrics["loss"]._replace(total=total)
    one = jnp.ones(())
    metrics["logit_scale"] = losses.Mean(scale, one)
    metrics["chance_loss"] = losses.Mean(jnp.log(jnp.sum(weight)), one)
    return metrics

  def streams(self, split: str) -> dict[str, Rows]:
    sources = self._load(split)
    if len(sources) > 1:
      raise ValueError(f"Expected 1 source for evaluating {split!r}, found {len(sources)}")
    ((images, texts, _),) = sources
    images_of = [[] for _ in range(len(texts))]
    for text, image in pairs.find_edges(images, texts):
      images_of[text].append(image)
    return {
      "image": pairs.ImageRows(images, size=self.image_size),
      "text": pairs.TextRows(
        texts.texts,
        tokenize=tokenizer(self.context_length),
        images_of=images_of,
        notes=texts.notes,
      ),
    }

  def predict(self, model, batch, *, rngs, frozen):
    del rngs, frozen
    features = {"features": encode_either(model, batch)}
    if "tokens" in batch:  # with every row, for an evaluation keeps rows only
      rows = batch["tokens"].shape[:1]
      features["logit_scale"] = jnp.broadcast_to(widened(model.logit_scale[...]), rows)
      if model.logit_bias is not None:
        features["logit_bias"] = jnp.broadcast_to(widened(model.logit_bias[...]), rows)
    return features

  def score(self, predictions, streams):
    """Full-pool recalls as fractions, and ranks from 1; what could not be read comes last.

    Beside them loss and accuracies within batches of the pairs that could be read, as the original
    has them (`in_batch`).
    """
    image, text = predictions["image"], predictions["text"]
    images_of, readable = streams["text"].images_of, image["valid"]
    values = retrieval.recall_both_ways(
      image["features"], text["features"], images_of=images_of, readable=readable
    )
    edges = [(i, t) for t, images in enumerate(images_of) for i in images if readable[i]]
    if edges:
      bias = text.get("logit_bias")
      values |= in_batch.scores(
        image["features"],
        text["features"],
        edges=edges,
        logit_scale=text["logit_scale"][0],
        logit_bias=None if bias is None else bias[0],
        batch_size=self.valid_batch_size,
        gpus=self.valid_gpus,
        kind=self.loss_kind,
      )
      values["logit_scale"] = float(text["logit_scale"][0])
    return values

  def eval_line(self, values):
    return in_batch.line(values, batch_size=self.valid_batch_size) if "loss" in values else None

  def results(self, predictions, streams):
    """A page, `retrieval`: texts from all over the evaluation with the images that rank highest."""
    image, text = predictions["image"], predictions["text"]
    texts, rows = streams["text"], streams["image"]
    chosen = np.unique(np.linspace(0, len(texts) - 1, _PAGE_TEXTS).astype(int))
    readable = np.flatnonzero(image["valid"])
    scores = text["features"][chosen] @ image["features"][readable].T
    best = readable[np.argsort(-scores, axis=1, kind="stable")[:, :_PAGE_IMAGES]]
    return pictures.retrieval(
      "retrieval",
      [texts.texts[t] for t in chosen],
      [[rows.example(i, None)["image"] for i in ranked.tolist()] for ranked in best],
      [np.isin(ranked, texts.images_of[t]) for t, ranked in zip(chosen, best, strict=True)],
    )

  def log_line(self, values):
    return (
      "Global Steps: {step}/{steps} | Train Epoch: {epoch} [{seen}/{rows} ({percent:.0f}%)] | "
      "Loss: {loss:.6f} | Image2Text Acc: {i2t:.2f} | Text2Image Acc: {t2i:.2f} | "
      "Data Time: {data_time:.3f}s | Batch Time: {batch_time:.3f}s | LR: {lr:5f} | "
      "logit_scale: {logit_scale:.3f} | Global Batch Size: {batch_size}"
    ).format(**values, i2t=100 * values["i2t_acc"], t2i=100 * values["t2i_acc"])

  def advise(self, history):
    """Says when the loss has not left ln(batch), where all pairs look alike to the model."""
    if self.loss_kind != "softmax":
      return None
    logged = [r for r in history if "train/loss" in r]
    if len(logged) < _STUCK_ROWS or len(logged) % _STUCK_ROWS:
      return None
    last = logged[-_STUCK_ROWS:]
    chance = last[-1]["train/chance_loss"]
    away = [r["train/loss"] / r["train/chance_loss"] - 1 for r in last]
    rates = [r.get("train/lr", 0.0) for r in last]
    if rates[-1] > rates[0]:  # it is warming up
      return None
    if not (all(abs(x) <= _NEAR for x in away) and max(away) - min(away) <= _STILL):
      return None
    return (
      f"The loss sits at ln(batch) = {chance:.3f}: the model tells no pair from another. Try a "
      "lower optim.lr (a fine-tune wants about 1e-5 at small batches) with more optim.warmup; "
      "check that captions belong to their images; use task.multi_positive when captions repeat; "
      "start from trained weights; raise batch_size with accum."
    )

  def _load(self, split):
    given = {"train": self.train, "valid": self.valid, "test": self.test}
    return splits.load(given, split, hold_out=self.hold_out)


@functools.cache
def tokenizer(context_length: int) -> pairs.Tokenize:
  """`caption -> int32[context_length]`, with the caption normalised as in the original's data."""
  return functools.partial(_tokenize, ChineseBertTokenizer(), context_length)


def encode_either(model: nnx.Module, batch: Batch) -> jax.Array:
  """Unit features float32[B, E] of whichever of "image" and "tokens" the batch holds."""
  if "image" in batch:
    return losses.normalize(model.encode_image(to_float(batch["image"])))
  return losses.normalize(model.encode_text(batch["tokens"]))


@functools.cache
def frozen_model(name: str) -> Frozen:
  """A teacher, opened once."""
  return Frozen.of(name)


def to_float(image: jax.Array) -> jax.Array:
  """uint8[B, S, S, 3] pixels to the normalised float32 that the towers expect; floats are that."""
  return normalized(image, mean=images.CLIP_MEAN, std=images.CLIP_STD)


def _tokenize(encoder, context_length, caption):
  return encoder.encode(normalize_caption(caption), context_length=context_length)


def _encode(model, batch, rngs, *, mask_ratio, unmasked, freeze_batch_norm):
  """Unit features of both towers."""
  image_key, text_key = (None, None) if rngs is None else jax.random.split(rngs)
  if freeze_batch_norm:
    image_key = None
  pixels = to_float(batch["image"])

  def encode_image(mask_ratio):
    return model.encode_image(pixels, mask_ratio=mask_ratio, rngs=image_key)

  if unmasked is None or not mask_ratio:
    image = encode_image(mask_ratio)
  else:  # both are compiled, one is run
    image = jax.lax.cond(unmasked, lambda: encode_image(0.0), lambda: encode_image(mask_ratio))
  text = model.encode_text(batch["tokens"], rngs=text_key)
  return losses.normalize(image), losses.normalize(text)


def _in_chunks(encode, model, batch, *, rngs, chunks):
  """`encode(model, batch, rngs)` in parts that are recomputed in the backward pass.

  Activations of one part at a time are alive, and the features, and with them loss and gradients,
  are those of the whole batch (GradCache, arXiv 2101.06983, through rematerialisation).
  """
  if chunks == 1:
    return encode(model, batch, rngs)
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  @recomputed
  def part(rest, inputs):
    rows, index = inputs
    copy = nnx.merge(graph, params, rest)
    features = encode(copy, rows, None if rngs is None else jax.random.fold_in(rngs, index))
    return nnx.split(copy, nnx.Param, ...)[2], features

  inputs = {"image": batch["image"], "tokens": batch["tokens"]}
  parts = trees.split_batch(inputs, chunks)
  rest, features = jax.lax.scan(part, rest, (parts, jnp.arange(chunks)))
  nnx.update(model, rest)
  return trees.join_batch(features)


def check_image_size(image_size, config):
  expected = config.model.vision.image_size
  if image_size == expected:
    return []
  return [f"task.image_size: expected the model's {expected}, found {image_size}"]


def _check_batch_norm(task, config):
  """A frozen image tower must not move its running statistics either."""
  if not isinstance(config.model.vision, ResNetConfig):
    if not task.freeze_batch_norm:
      return []
    return ["task.freeze_batch_norm: expected a ResNet, found a ViT, which has no batch norm"]
  frozen = (*((pattern, 0.0) for pattern in config.optim.freeze), *config.optim.lr_scale)
  try:
    rate = trees.first_match(frozen, "visual/bn1/scale", default=1.0)
  except re.error:  # told by the checks of the optimizer
    return []
  if rate == 0.0 and not task.freeze_batch_norm:
    return ["task.freeze_batch_norm: expected True where the image tower is frozen, found False"]
  return []


def _check_teacher(task):
  if task.teacher is None:
    return []
  config = frozen_model(task.teacher).config
  if hub.family_of(config) is not cnclip_family.FAMILY:
    return [f"task.teacher: expected a Chinese-CLIP, found {hub.family_of(config).title}"]
  size = config.vision.image_size
  if size == task.image_size:
    return []
  return [f"task.teacher: expected a model of {task.image_size} pixels, found one of {size}"]
