"""Losses as pure functions of arrays, in float32.

A loss over a batch is kept as a `Mean`, the sufficient statistic (total, count): micro-batches and
hosts are combined by adding, and the division happens once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e9


class Mean(NamedTuple):
  """A weighted mean that is still open for more terms: `total / count`."""

  total: jax.Array
  count: jax.Array

  @property
  def value(self) -> jax.Array:
    return self.total / jnp.maximum(self.count, 1e-9)


def mean(values: jax.Array, weight: jax.Array | None = None) -> Mean:
  """Weighted sum and sum of weights of `values` (float[B]; weight float[B], 1 where None)."""
  values = values.astype(jnp.float32)
  weight = jnp.ones_like(values) if weight is None else weight.astype(jnp.float32)
  return Mean(jnp.sum(values * weight), jnp.sum(weight))


def normalize(features: jax.Array) -> jax.Array:
  """Rows of float[B, E] scaled to unit length, in float32; no epsilon, as in CLIP."""
  features = features.astype(jnp.float32)
  return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def contrastive(
  image: jax.Array,
  text: jax.Array,
  *,
  scale: jax.Array,
  weight: jax.Array | None = None,
  same: jax.Array | None = None,
) -> dict[str, Mean]:
  """Symmetric InfoNCE over one batch of pairs (CLIP, arXiv 2103.00020, figure 3).

  Args:
    image: float[B, E], unit length; row i belongs to text i.
    text: float[B, E], unit length.
    scale: float[], the factor of the cosines, `exp(logit_scale)`.
    weight: float[B]; rows of weight 0 are neither targets nor negatives. None: all ones.
    same: bool[B, B], True where text j is also right for image i; the targets of a row are then
      uniform over its positives (supervised contrastive, arXiv 2004.11362). None: only i = j.

  Returns:
    "loss", and the in-batch accuracies "i2t_acc" and "t2i_acc" (fractions): the highest logit of
    the row is a positive.
  """
  image, text = image.astype(jnp.float32), text.astype(jnp.float32)
  weight = jnp.ones(image.shape[0], jnp.float32) if weight is None else weight
  logits = scale.astype(jnp.float32) * (image @ text.T)
  positive = jnp.eye(image.shape[0], dtype=bool) if same is None else same
  keep = weight > 0
  i2t = _softmax_targets(logits, positive=positive, keep=keep)
  t2i = _softmax_targets(logits.T, positive=positive.T, keep=keep)
  return {
    "loss": mean((i2t[0] + t2i[0]) / 2, weight),
    "i2t_acc": mean(i2t[1], weight),
    "t2i_acc": mean(t2i[1], weight),
  }


def _softmax_targets(logits, *, positive, keep):
  """Cross entropy with uniform targets over the positives, and whether the best is one of them."""
  logits = jnp.where(keep[None, :], logits, _MASKED)
  positive = positive & keep[None, :]
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  per_row = jnp.maximum(jnp.sum(positive, axis=-1), 1)
  nll = -jnp.sum(jnp.where(positive, log_probs, 0.0), axis=-1) / per_row
  best = jnp.argmax(logits, axis=-1)
  return nll, jnp.take_along_axis(positive, best[:, None], axis=-1)[:, 0]
