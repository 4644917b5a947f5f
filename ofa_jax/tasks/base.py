"""What a task is: data, loss, predictions and scores, in one dataclass.

`train.py` and `evaluate.py` know tasks only through the two protocols below. A new task is one
dataclass that subclasses `Task` for the defaults and is named in a config.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Union

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ofa_jax.data.protocols import Rows
from ofa_jax.losses import Mean, Sum

Predictions = Mapping[str, Mapping[str, np.ndarray]]
# By field with a leading axis of rows; of several streams, by the name of each.
Batch = Mapping[str, Union[jax.Array, "Batch"]]
Spec = dict[str, Union[jax.ShapeDtypeStruct, "Spec"]]


class Confidences(NamedTuple):
  """The probabilities of answers, and how right they are.

  Attributes:
    probabilities: float64[N, T] of each answer at each of T temperatures.
    right: float64[N] from 0 to 1, NaN where no reference is known.
    told: of each answer what is written of it besides.
  """

  probabilities: np.ndarray
  right: np.ndarray
  told: list[dict[str, Any]]


class Trains(Protocol):
  """What `train.py` needs of a task."""

  def examples(self, split: str) -> Rows | Mapping[str, Rows]:
    """Training rows, of several streams by name; ValueError for faulty files."""

  def batch_sizes(self, batch_size: int) -> int | Mapping[str, int]:
    """Rows of an update, of several streams by name; see `Task`."""

  def batch_spec(self, batch_size: int) -> Spec:
    """Shapes of a training batch, for compiling without data; of several streams by name."""

  def loss(
    self, model: nnx.Module, batch: Batch, *, rngs: jax.Array | None, chunks: int = 1
  ) -> dict[str, Mean | Sum]:
    """ "loss", which is minimised, and whatever else is worth logging, over the batch's rows."""


class Evaluates(Protocol):
  """What an `Eval` of a config needs of a task."""

  def streams(self, split: str) -> dict[str, Rows]:
    """Rows that are predicted, by name; several where inputs differ in kind.

    It is called once on every process before anything is compiled, and is the place to open and
    check whatever `score` will read (frequencies, lists of answers), so that no fault waits for
    the first evaluation.

    Raises:
      ValueError: faulty files.
    """

  def predict(
    self, model: nnx.Module, batch: Batch, *, rngs: jax.Array | None, frozen: Any
  ) -> dict[str, jax.Array]:
    """Predictions for a batch of one of the streams, one row each.

    Traced for every stream before the first training step.

    Args:
      model: as for `Trains.loss`.
      batch: the stream's fields, with "index" int32[B], the rows' numbers in the stream (-1 fills
        up), and "weight" float32[B], 0 where a row fills up or could not be read.
      rngs: the stream's PRNG key, the same for all of its batches; what is drawn for a row comes
        from its key by its number (`decode.answers.row_keys`), and so is the same on any mesh.
      frozen: what `Task.frozen` gives for evaluations.
    """

  def score(self, predictions: Predictions, streams: Mapping[str, Rows]) -> dict[str, float]:
    """Metrics from the predictions of every stream, on process 0.

    Predictions are arrays in the order of the stream's rows, with "valid" bool[N]: False where a
    row could not be read.
    """

  def results(self, predictions: Predictions, streams: Mapping[str, Rows]) -> dict[str, bytes]:
    """Files for people and other programs, by name: the predictions, a page of pictures."""

  def confidences(
    self, predictions: Predictions, streams: Mapping[str, Rows]
  ) -> Confidences | None:
    """What the model thinks of its answers, where that was asked for, and how right they are."""


@dataclasses.dataclass(kw_only=True)
class Task:
  """The defaults that most tasks keep.

  Attributes:
    whole_batch: True when the loss couples the rows of a batch (contrastive negatives): gradient
      accumulation then happens inside `loss`, in `chunks` parts; otherwise the step sums over
      parts and `chunks` is 1.
    prepare: None, or a method `(model, batch, *, rngs, step, frozen) -> batch` run outside the
      gradient (samples and rewards, a teacher's features, what changes with the int32[] `step`).
      It gets each part of an accumulated batch, with a key of its own, and the whole batch where
      the task is `whole_batch`.
    metrics: names that `score` may give, so that a mistyped one is told before training; None:
      not known beforehand.
    unit: what a row of the (main stream's) batch is, for the rate on the progress bar.
  """

  whole_batch: ClassVar[bool] = False
  prepare: ClassVar[Callable[..., Any] | None] = None
  metrics: ClassVar[tuple[str, ...] | None] = None
  unit: ClassVar[str] = "rows"

  def batch_sizes(self, batch_size: int) -> int | Mapping[str, int]:
    """Rows of an update over all devices; of a task with several streams, those of each by name.

    A task that trains on several data sets of different fields, shapes or sizes names them here,
    the main one first: that one has the `batch_size` of the config, is what an epoch and the rate
    are counted in; the others have numbers of their own. `examples` then gives rows by the same
    names, `batch_spec` shapes, and `loss` gets a batch of each; every stream goes through epochs of
    its own, in an order that the config's seed and its name give.
    """
    return batch_size

  def check(self, config: Any) -> list[str]:
    """Faults that show without reading data, one line each."""
    del config
    return []

  def frozen(
    self, mesh: jax.sharding.Mesh, *, precision: str, training: bool = True, load: bool = True
  ) -> Any:
    """Arrays that nothing trains, such as a teacher's weights. None: none.

    They are an input of the step, neither constants of its program nor in its checkpoints.

    Args:
      mesh: where they go.
      precision: that of the run.
      training: what `prepare` reads; False: what `predict` reads in evaluations.
      load: False gives ShapeDtypeStructs with shardings, for compiling without reading anything.
    """
    del mesh, precision, training, load
    return None

  def in_strips(self, num: int, *, rows: int) -> dict[str, Any]:
    """Fields of the task that make its loss smaller in memory and no other number.

    They cut what the loss computes of the whole batch at once, such as the logits between all its
    rows, into `num` times as many strips, one of which is alive at a time.

    Args:
      num: how many times as many.
      rows: of the batch, on one device.

    Returns:
      New values by the names of the fields; empty where there is nothing to cut, as by default, or
      `rows` cannot be cut so.
    """
    del num, rows
    return {}

  def results(self, predictions: Predictions, streams: Mapping[str, Rows]) -> dict[str, bytes]:
    """Contents of the files that an evaluation leaves, by name. None by default."""
    del predictions, streams
    return {}

  def confidences(
    self, predictions: Predictions, streams: Mapping[str, Rows]
  ) -> Confidences | None:
    """See `Evaluates`. None by default."""
    del predictions, streams
    return None

  def log_line(self, values: Mapping[str, float]) -> str:
    """The line of a log step.

    Args:
      values: the loss's metrics, "lr", "grad_norm", "data_time" and "batch_time" (seconds a step),
        and the position: "step", "steps", "epoch", "seen", "rows", "percent", "batch_size".
    """
    return (
      "Global Steps: {step}/{steps} | Train Epoch: {epoch} [{seen}/{rows} ({percent:.0f}%)] | "
      "Loss: {loss:.6f} | Data Time: {data_time:.3f}s | Batch Time: {batch_time:.3f}s | "
      "LR: {lr:5f} | Global Batch Size: {batch_size}"
    ).format(**values)

  def eval_line(self, values: Mapping[str, float]) -> str | None:
    """A line of its own for an evaluation, beside the one with all metrics; None: there is none.

    Args:
      values: the metrics of the evaluation, "step" and "epoch".
    """
    del values
    return None

  def model_files(self) -> dict[str, bytes]:
    """What a model needs beside its weights, by its place in the workdir, such as a tokenizer."""
    return {}

  def advise(self, history: list[dict[str, float]]) -> str | None:
    """A hint for the person at the screen, from the metrics logged so far; None: all is well."""
    del history
    return None


def spec_of(blank: Mapping[str, np.ndarray], size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch of `size` rows that are like `blank`, with their weights."""
  fields = {**blank, "weight": np.float32(1)}
  return {k: jax.ShapeDtypeStruct((size, *v.shape), v.dtype) for k, v in fields.items()}


def normalized(image: jax.Array, *, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """uint8[B, S, S, 3] pixels to the float32 that models expect; floats are that already.

  The last digit may differ from `data.images.normalize`: XLA multiplies by inverses of constants.
  """
  if image.dtype != jnp.uint8:
    return image
  pixels = image.astype(jnp.float32) / 255.0
  return (pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
