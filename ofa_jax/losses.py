"""Losses as pure functions of arrays, in float32 (of float64 arrays, in that).

A loss over a batch is kept as a `Mean`, the sufficient statistic (total, count): micro-batches and
hosts are combined by adding, and the division happens once. A `Sum` is several of them, for losses
that are normalised apart.

The contrastive losses are written for a block of rows against a block of columns, and blocks are
merged: the whole matrix is one block, `chunks` cut it into strips, and on a mesh the columns travel
from device to device in a ring (as in SigLIP, arXiv 2303.15343, section 3.3), so that nowhere more
than (batch / devices)^2 / chunks logits exist. The result is the same.

The loss of sequences is OFA's cross entropy with everything that its recipes add to it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ofa_jax import losses_vocabulary as vocabulary
from ofa_jax.losses_vocabulary import InBlocks
from ofa_jax.numerics import widened
from ofa_jax.tokenizers.special import NUM_SPECIAL, PAD
from ofa_jax.trees import BATCH_AXES

LOSSES = ("softmax", "sigmoid")
_MASKED = -1e9


class Mean(NamedTuple):
  """A weighted mean that is still open for more terms: `total / count`."""

  total: jax.Array
  count: jax.Array

  @property
  def value(self) -> jax.Array:
    return self.total / jnp.maximum(self.count, 1e-9)

  @property
  def terms(self) -> tuple["Mean", ...]:
    """The means whose sum it is, as of a `Sum`."""
    return (self,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
  """A sum of means, each over what it counts itself, that are still open for more terms."""

  terms: tuple[Mean, ...]

  @property
  def value(self) -> jax.Array:
    return sum(term.value for term in self.terms)


class Teacher(NamedTuple):
  """Features float[B, F] of another model, of unit length, and the factor of their cosines."""

  image: jax.Array
  text: jax.Array
  scale: jax.Array


def mean(values: jax.Array, weight: jax.Array | None = None) -> Mean:
  """Weighted sum and sum of weights of `values` (float[B]; weight float[B], 1 where None)."""
  values = widened(values)
  weight = jnp.ones_like(values) if weight is None else widened(weight)
  return Mean(jnp.sum(values * weight), jnp.sum(weight))


def normalize(features: jax.Array) -> jax.Array:
  """Rows of float[B, E] scaled to unit length, in at least float32; no epsilon, as in CLIP."""
  features = widened(features)
  return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


@jax.named_scope("loss")
def contrastive(
  image: jax.Array,
  text: jax.Array,
  *,
  scale: jax.Array,
  weight: jax.Array | None = None,
  labels: jax.Array | None = None,
  kind: str = "softmax",
  bias: jax.Array | None = None,
  teacher: Teacher | None = None,
  chunks: int = 1,
  gather: bool = True,
  ring: bool = True,
) -> dict[str, Mean]:
  """The loss of one batch of pairs, every image against every text.

  Args:
    image: float[B, E], unit length; row i belongs to text i.
    text: float[B, E], unit length.
    scale: float[], the factor of the cosines, `exp(logit_scale)`.
    weight: float[B]; rows of weight 0 are neither targets nor negatives. None: all ones.
    labels: int32[B, N]; text j is also right for image i where they agree in any of the N. The
      targets of a row are then uniform over its positives (supervised contrastive, arXiv
      2004.11362). None: only i = j.
    kind: "softmax", symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3), or "sigmoid", every pair
      a binary decision (SigLIP, arXiv 2303.15343, algorithm 1).
    bias: float[], added to the logits. None: 0.
    teacher: adds "distill_logits", the cross entropy of the softmax over the student's logits under
      that over the teacher's, in both directions (as open_clip's distillation).
    chunks: strips of rows in which a block is computed, and computed again for the gradient.
    gather: False has only the pairs of each device (the original's --skip-aggregate).
    ring: on several devices the texts pass by in a ring; False leaves the split to the compiler.

  Returns:
    "loss", and the in-batch accuracies "i2t_acc" and "t2i_acc" (fractions): the highest logit of
    the row is a positive.

  Raises:
    ValueError: an unknown kind; rows that chunks or devices do not divide.
  """
  if kind not in LOSSES:
    raise ValueError(f"Expected a loss out of {', '.join(LOSSES)}, found {kind!r}")
  rows = jnp.arange(image.shape[0], dtype=jnp.int32)
  side = {
    "weight": jnp.ones(image.shape[0]) if weight is None else weight,
    "labels": rows[:, None] if labels is None else labels,
  }
  shared = {"scale": scale, "bias": jnp.zeros(()) if bias is None else bias}
  images, texts = side | {"x": widened(image)}, side | {"x": widened(text)}
  if teacher is not None:
    images["teacher"] = widened(teacher.image)
    texts["teacher"] = widened(teacher.text)
    shared["teacher_scale"] = teacher.scale
  shared = jax.tree.map(widened, shared)
  # Softmax does not mind where zero is; at the pair's own logit no digits are lost to its size.
  own = shared["scale"] * jnp.sum(images["x"] * texts["x"], axis=-1) + shared["bias"]
  images["own"] = texts["own"] = jax.lax.stop_gradient(own)

  block = functools.partial(_strips, chunks=chunks, kind=kind)
  shards = _num_shards() if ring or not gather else 1
  local = image.shape[0] // shards
  if image.shape[0] % shards or local % chunks:
    raise ValueError(
      f"Expected a batch in multiples of {shards} devices x {chunks} chunks, found {len(image)}; "
      "change batch_size, accum or loss_chunks"
    )
  if shards > 1:
    block = functools.partial(_ring, block=block, hops=shards - 1 if gather else 0)
    batch = P(BATCH_AXES)
    block = jax.shard_map(block, in_specs=(batch, batch, P()), out_specs=batch)
  i2t, t2i = block(images, texts, shared)
  metrics = {
    "loss": mean((_per_row(i2t, kind=kind) + _per_row(t2i, kind=kind)) / 2, weight),
    "i2t_acc": mean(i2t.hit, weight),
    "t2i_acc": mean(t2i.hit, weight),
  }
  if teacher is not None:
    soft = (i2t.norm - i2t.expected + t2i.norm - t2i.expected) / 2
    metrics["distill_logits"] = mean(soft, weight)
  return metrics


def distill_features(
  student: jax.Array, teacher: jax.Array, *, weight: jax.Array | None = None
) -> Mean:
  """1 - the mean cosine between a student's and a teacher's features (Chinese-CLIP's distillation).

  Args:
    student: float[B, E]; resized to the teacher's width by linear interpolation where they differ.
    teacher: float[B, F].
    weight: float[B]; None: all ones.
  """
  student = resize_features(widened(student), teacher.shape[-1])
  cosine = jnp.sum(normalize(student) * normalize(teacher), axis=-1)
  return mean(1 - cosine, weight)


def resize_features(x: jax.Array, width: int) -> jax.Array:
  """float[B, E] to float[B, width], linear along E: torch's interpolate, align_corners=False.

  Feature d is taken at (d + 0.5) * E / width - 0.5, not below 0; nothing is averaged where the
  width shrinks, unlike `jax.image.resize`.
  """
  size = x.shape[-1]
  if size == width:
    return x
  at = jnp.maximum((jnp.arange(width) + 0.5) * (size / width) - 0.5, 0.0)
  low = jnp.floor(at).astype(jnp.int32)
  share = at - low
  return x[:, low] * (1 - share) + x[:, jnp.minimum(low + 1, size - 1)] * share


@jax.named_scope("loss")
def label_smoothed(
  logits: jax.Array | InBlocks,
  targets: jax.Array,
  *,
  smoothing: float = 0.0,
  pad: int = PAD,
  conf: jax.Array | None = None,
  mask: jax.Array | None = None,
  allowed_range: tuple[int, int] | None = None,
  ignore_prefix: int = 0,
  ignore: int | None = None,
  drop_worst: float = 0.0,
  dropping: jax.Array | bool = True,
  drop_best: float = 0.0,
  dropping_best: jax.Array | bool = True,
  log_end: float | None = None,
  rdrop: float | None = None,
  sentence_avg: bool = False,
) -> dict[str, Mean]:
  """OFA's losses of sequences, `adjust_label_smoothed_{cross_entropy,encouraging_loss}`.

  A token of target y costs (1 - s - s_i) * -lp[y] + s_i * -(sum of lp over the allowed ids), where
  s_i = s / (allowed ids - 1).

  Args:
    logits: float[B, T, V]. In blocks the loss and its gradient are the same; `log_end` and `rdrop`
      need them as a whole.
    targets: int32[B, T]; `pad` costs nothing.
    smoothing: s.
    pad: the id of padding.
    conf: float[B], the weight of each row; it multiplies the log-probabilities. None: all ones.
    mask: bool[B, T, V], True where an id may follow; others have no probability. Where the target
      is `pad` it is not looked at.
    allowed_range: (first, end): only these ids and the special ones have a probability.
    ignore_prefix: positions at the front that cost nothing.
    ignore: an id that costs nothing as a target (the original's --ignore-eos).
    drop_worst: share of the tokens, those that cost most, that is left out. The tokens of all
      devices are ranked together, whatever the mesh; the original ranks those of each device.
      With accumulation the tokens of each part are ranked, as in the original.
    dropping: bool[], whether `drop_worst` is at work.
    drop_best: share of those left, which cost least, that is left out too; the original has the
      option and never hands it on to this function.
    dropping_best: bool[], whether `drop_best` is at work.
    log_end: adds the encouraging loss (arXiv 2110.06537), log(1 - p) of each target's probability
      p, above `log_end` the line that touches it there (1: none). None: the cross entropy alone.
    rdrop: weight of the divergence between rows 2i and 2i + 1, which are one example under two
      dropouts (R-Drop, arXiv 2106.14448); their tokens are ranked by the first and left out
      together. With a mask the original's divergence is NaN; here it is that of the allowed ids;
      its encouraging loss compares different tokens, which it has sorted. None: rows are examples.
    sentence_avg: the count of the loss is the rows with a target, not the tokens kept.

  Returns:
    "loss", and over the tokens kept "nll", the loss without smoothing, and "accuracy", the share
    whose likeliest id is the target (fractions).

  Raises:
    ValueError: `log_end` or `rdrop` with logits in blocks.
  """
  if isinstance(logits, InBlocks) and (log_end is not None or rdrop is not None):
    raise ValueError("Expected whole logits with log_end or rdrop, found them in blocks")
  if ignore is not None:
    targets = jnp.where(targets == ignore, pad, targets)
  targets = jnp.where(jnp.arange(targets.shape[1]) < ignore_prefix, pad, targets)
  keep = targets != pad
  # A row of the mask without any allowed id is one without a target: all allowed, it stays finite.
  allowed = None if mask is None else mask | ~keep[..., None]
  if allowed_range is not None:
    ids = np.arange(logits.shape[-1])
    inside = (ids < NUM_SPECIAL) | ((ids >= allowed_range[0]) & (ids < allowed_range[1]))
    allowed = inside if allowed is None else allowed & inside
  sentences = jnp.sum(jnp.any(keep, axis=1), dtype=jnp.float32)

  nll, loss, hit, lprobs = vocabulary.costs(
    logits, targets, conf=conf, allowed=allowed, smoothing=smoothing
  )
  copies = 1 if rdrop is None else 2
  pairs = lambda x: x.reshape(-1, copies, *x.shape[1:])  # noqa: E731
  for share, at_work, sign in ((drop_worst, dropping, 1), (drop_best, dropping_best, -1)):
    if share:
      few = vocabulary.cheapest(sign * pairs(loss)[:, 0], pairs(keep)[:, 0], share=1 - share)
      keep &= jnp.repeat(few, copies, axis=0) | ~jnp.asarray(at_work)
  if log_end is not None:
    loss += vocabulary.bonus(lprobs, targets, allowed, smoothing=smoothing, log_end=log_end)
  if rdrop is not None:
    p, q = pairs(lprobs)[:, 0], pairs(lprobs)[:, 1]
    divergence = jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1) / 2
    loss += jnp.repeat(rdrop / 2 * divergence, 2, axis=0)
  tokens = jnp.sum(keep, dtype=jnp.float32)
  total = lambda x: jnp.sum(jnp.where(keep, x, 0.0))  # noqa: E731
  count = sentences if sentence_avg else tokens
  accuracy = mean(hit, keep)
  return {"loss": Mean(total(loss), count), "nll": Mean(total(nll), tokens), "accuracy": accuracy}


def sum_of_means(*losses: Mean | Sum) -> Sum:
  """Several losses in one, each the mean over its own tokens, as OFA's pretraining adds them.

  With accumulation each is the mean over its tokens in all parts. A mean of weight w in the sum is
  `Mean(w * total, count)`.
  """
  return Sum(tuple(term for loss in losses for term in loss.terms))


class _Side(NamedTuple):
  """What a row's loss needs of all its columns, float32[b] each; merged block by block.

  The logits are those minus the row's own, that of its pair.
  """

  norm: jax.Array  # logarithm of the sum of the logits' exponentials
  positive: jax.Array  # sum of the positives' logits
  count: jax.Array  # positives
  pairs: jax.Array | None  # sum of the binary losses ("sigmoid")
  best: jax.Array  # the highest logit
  hit: jax.Array  # 1 where that is a positive
  teacher_norm: jax.Array | None = None
  expected: jax.Array | None = None  # mean logit under the softmax of the teacher's


def _per_row(side: _Side, *, kind: str) -> jax.Array:
  if kind == "sigmoid":
    return side.pairs
  return side.norm - side.positive / jnp.maximum(side.count, 1.0)


def _merge(a: _Side, b: _Side) -> _Side:
  """The sides of two disjoint sets of columns as that of their union."""
  norm, expected = None, None
  if a.expected is not None:
    norm = jnp.logaddexp(a.teacher_norm, b.teacher_norm)
    expected = jnp.exp(a.teacher_norm - norm) * a.expected
    expected += jnp.exp(b.teacher_norm - norm) * b.expected
  return _Side(
    norm=jnp.logaddexp(a.norm, b.norm),
    positive=a.positive + b.positive,
    count=a.count + b.count,
    pairs=None if a.pairs is None else a.pairs + b.pairs,
    best=jnp.maximum(a.best, b.best),
    hit=jnp.where(b.best > a.best, b.hit, a.hit),
    teacher_norm=norm,
    expected=expected,
  )


def _block(rows: dict, columns: dict, shared: dict, *, kind: str) -> tuple[_Side, _Side]:
  """Both sides of the logits of some images (rows) against some texts (columns)."""
  logits = shared["scale"] * (rows["x"] @ columns["x"].T) + shared["bias"]
  # Each of the labels by itself: no array of rows x columns x labels.
  labels = zip(rows["labels"].T, columns["labels"].T, strict=True)
  positive = functools.reduce(jnp.logical_or, (a[:, None] == b[None, :] for a, b in labels))
  keep = rows["weight"][:, None] > 0, columns["weight"][None, :] > 0
  pairs = jax.nn.softplus(jnp.where(positive, -logits, logits)) if kind == "sigmoid" else None
  soft = None
  if "teacher" in rows:
    soft = shared["teacher_scale"] * (rows["teacher"] @ columns["teacher"].T)

  def side(axis, keep, own):
    shifted = logits - own
    seen = jnp.where(keep, shifted, _MASKED)
    right = positive & keep
    best = jnp.argmax(seen, axis=axis, keepdims=True)
    hidden = None if soft is None else jnp.where(keep, soft, _MASKED)
    return _Side(
      norm=jax.nn.logsumexp(seen, axis=axis),
      positive=jnp.sum(jnp.where(right, shifted, 0.0), axis=axis),
      count=jnp.sum(right, axis=axis, dtype=jnp.float32),
      pairs=None if pairs is None else jnp.sum(jnp.where(keep, pairs, 0.0), axis=axis),
      best=jax.lax.stop_gradient(jnp.max(seen, axis=axis)),
      hit=jnp.take_along_axis(right, best, axis=axis).squeeze(axis).astype(jnp.float32),
      teacher_norm=None if soft is None else jax.nn.logsumexp(hidden, axis=axis),
      expected=None if soft is None else jnp.sum(jax.nn.softmax(hidden, axis) * seen, axis=axis),
    )

  return side(1, keep[1], rows["own"][:, None]), side(0, keep[0], columns["own"][None, :])


def _strips(rows, columns, shared, *, chunks, kind):
  """`_block` in strips of rows whose logits do not outlive their strip, also in the gradient."""
  block = functools.partial(_block, kind=kind)
  if chunks == 1:
    return block(rows, columns, shared)
  block = jax.checkpoint(block)
  strips = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), rows)
  first = jax.tree.map(lambda x: x[0], strips)
  others = jax.tree.map(lambda x: x[1:], strips)
  side, below = block(first, columns, shared)

  def body(below, strip):
    side, more = block(strip, columns, shared)
    return _merge(below, more), side

  below, sides = jax.lax.scan(body, below, others)
  join = lambda a, b: jnp.concatenate([a, b.reshape(-1)])  # noqa: E731
  return jax.tree.map(join, side, sides), below


def _ring(rows, columns, shared, *, block: Callable, hops: int):
  """A device's rows against the columns of all devices, which pass by with what they gathered."""
  block = jax.checkpoint(block)
  size = jax.lax.axis_size(BATCH_AXES)
  onward = functools.partial(
    jax.lax.ppermute, axis_name=BATCH_AXES, perm=[(i, (i + 1) % size) for i in range(size)]
  )
  mine, theirs = block(rows, columns, shared)
  if not hops:
    return mine, theirs

  def body(carry, _):
    columns, mine, theirs = carry
    columns, theirs = onward((columns, theirs))
    more, below = block(rows, columns, shared)
    return (columns, _merge(mine, more), _merge(theirs, below)), None

  (_, mine, theirs), _ = jax.lax.scan(body, (columns, mine, theirs), length=hops)
  return mine, onward(theirs)


def _num_shards() -> int:
  """Devices that split the batch under the current mesh; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[name] for name in BATCH_AXES if name in mesh.auto_axes)
