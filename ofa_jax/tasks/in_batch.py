"""Chinese-CLIP's own validation: loss and accuracies within batches, beside recalls over the pool.

The original compares the pairs of one batch with each other and averages over the batches. Its
numbers depend on which pairs meet: they are shuffled once, in the order of torch's generator, and
the last batch is filled up from the front of the data, so that some pairs count twice.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ofa_jax import losses

SEED = 123  # the original's default --seed


def order(rows: int, *, batch_size: int, gpus: int = 1, seed: int = SEED) -> np.ndarray:
  """int64[N]: the rows of the original's validation batches, one after the other, GPU by GPU.

  N is the next multiple of what all GPUs take at once. The order is `torch.randperm(N)` of its
  sampler, which exchanges by the outputs of MT19937 and deals the places to the GPUs in turn;
  places past the last row begin again at the first. Its training has this order too, with a seed
  one higher every epoch.
  """
  step = batch_size * gpus
  size = -(-rows // step) * step
  draws = np.random.RandomState(seed).randint(0, 2**32, size=size, dtype=np.uint32)
  places = np.arange(size)
  for i in range(size - 1):
    j = i + int(draws[i]) % (size - i)
    places[i], places[j] = places[j], places[i]
  return places.reshape(-1, gpus).T.ravel() % rows


def scores(
  image: np.ndarray,
  text: np.ndarray,
  *,
  edges: Sequence[tuple[int, int]],
  logit_scale: float,
  logit_bias: float | None,
  batch_size: int,
  gpus: int,
  kind: str,
) -> dict[str, float]:
  """Returns "loss", "i2t_acc" and "t2i_acc" (fractions), means over batches of pairs.

  Args:
    image: float[I, E], unit length.
    text: float[T, E], unit length.
    edges: (row of the image, row of the text) of each pair, at least one, in file order.
    logit_scale, logit_bias: the model's.
    batch_size: pairs that are compared with each other.
    gpus: over which the original would have split them.
    kind: of the loss, see `losses.contrastive`.
  """
  pairs = np.asarray(edges)[order(len(edges), batch_size=batch_size, gpus=gpus)]
  totals: dict[str, list[np.ndarray]] = {}
  for batch in pairs.reshape(-1, batch_size, 2):
    means = _compare(
      image[batch[:, 0]],
      text[batch[:, 1]],
      np.exp(image.dtype.type(logit_scale)),
      image.dtype.type(logit_bias or 0.0),
      kind=kind,
    )
    for name, value in means.items():
      totals.setdefault(name, []).append(np.asarray(value))
  # In float32, so that the last digits of float64 do not tell one mesh from another.
  return {name: float(np.float32(np.mean(values))) for name, values in totals.items()}


@functools.partial(jax.jit, static_argnames="kind")
def _compare(image, text, scale, bias, *, kind):
  with jax.default_matmul_precision("highest"):
    means = losses.contrastive(image, text, scale=scale, bias=bias, kind=kind, ring=False)
  return {name: mean.value for name, mean in means.items()}


def line(values: dict[str, Any], *, batch_size: int) -> str:
  """The original's line for a validation; `values`: `scores`, "logit_scale", "epoch", "step"."""
  return (
    "Validation Result (epoch {epoch} @ {step} steps) | Valid Loss: {loss:.6f} | "
    "Image2Text Acc: {i2t:.2f} | Text2Image Acc: {t2i:.2f} | logit_scale: {logit_scale:.3f} | "
    "Valid Batch Size: {size}"
  ).format(**values, i2t=100 * values["i2t_acc"], t2i=100 * values["t2i_acc"], size=batch_size)
