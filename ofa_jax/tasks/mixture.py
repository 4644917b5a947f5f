"""Several tasks of one family learnt by one model at once, as in OFA's multitask pretraining.

  Mixture(tasks={"caption": Caption(...), "vqa": VQA(...)}, shares={"caption": 1, "vqa": 2})

Every update has rows of every task, in fixed numbers: each task is a named stream of the engine
(`data/streams.py`), so that its order is a function of the step, the seed and its name.

Tasks of OFA whose pictures are of one size, or that have none, go through the model as one batch,
filled up to common lengths: one forward pass to compile and to run, and batch norm sees in training
the mixture of pictures whose statistics it keeps. Other tasks compute their losses by themselves.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from ofa_jax import losses
from ofa_jax.data.protocols import Rows
from ofa_jax.data.tsv import IMAGE
from ofa_jax.tasks import taught
from ofa_jax.tasks.base import Batch, Task
from ofa_jax.tasks.seq2seq import Seq2Seq


@dataclasses.dataclass(kw_only=True)
class Mixture(Task):
  """The weighted sum of the mean losses of several tasks.

  It is for training; each task is evaluated by an `Eval` of its own, whose `label` tells its
  metrics from those of the others.

  Attributes:
    tasks: by name, the main one first: its rows are the `batch_size` of the config, and make the
      epochs.
    shares: rows of each task in an update, in proportion; only ratios matter. None: as many as its
      training data has.
    weights: factor of each task's mean loss; None: its share of the rows of an update, so that
      every row costs alike.
    multiple: rows of a task are rounded to a multiple of this, at least one: of the devices (data x
      fsdp) x `accum`.
  """

  tasks: dict[str, Task]
  shares: dict[str, float] | None = None
  weights: dict[str, float] | None = None
  multiple: int = 8
  _num_rows: dict[str, int] | None = dataclasses.field(
    default=None, init=False, repr=False, compare=False
  )

  @property
  def tokenizer(self) -> str | None:
    """That of the tasks; None where they have none. Set, it is that of all."""
    return next(
      (task.tokenizer for task in self.tasks.values() if hasattr(task, "tokenizer")), None
    )

  @tokenizer.setter
  def tokenizer(self, folder: str) -> None:
    for task in self.tasks.values():
      if hasattr(task, "tokenizer"):
        task.tokenizer = folder

  def batch_sizes(self, batch_size: int) -> dict[str, int]:
    faults = self._check_shares()
    if faults:
      raise ValueError("; ".join(faults))
    shares = self._count() if self.shares is None else self.shares
    main, *others = self.tasks
    exact = {name: batch_size * shares[name] / shares[main] for name in others}
    turns = {name: max(1, round(size / self.multiple)) for name, size in exact.items()}
    return {main: batch_size} | {name: n * self.multiple for name, n in turns.items()}

  def examples(self, split: str) -> dict[str, Rows]:
    return {name: task.examples(split) for name, task in self.tasks.items()}

  def batch_spec(self, batch_size: int) -> dict[str, Any]:
    sizes = self.batch_sizes(batch_size)
    return {name: task.batch_spec(sizes[name]) for name, task in self.tasks.items()}

  def check(self, config: Any) -> list[str]:
    faults = self._check_tasks()
    if self.weights is not None:
      faults += self._check_each("weights", least=0)
    for name, task in self.tasks.items():
      of_task = dataclasses.replace(config, task=task)
      faults += [
        fault.replace("task.", f"task.tasks.{name}.", 1) if fault.startswith("task.") else fault
        for fault in task.check(of_task)
      ]
    return list(dict.fromkeys(faults))  # those of the model each task may tell

  def frozen(self, mesh, *, precision, training=True, load=True):
    options = {"precision": precision, "training": training, "load": load}
    return {name: task.frozen(mesh, **options) for name, task in self.tasks.items()}

  def model_files(self) -> dict[str, bytes]:
    files = [task.model_files() for task in self.tasks.values()]
    return {name: content for each in reversed(files) for name, content in each.items()}

  def prepare(self, model, batch, *, rngs, step, frozen):
    """What each task does with its rows, with a key of its own."""
    prepared = dict(batch)
    for i, (name, task) in enumerate(self.tasks.items()):
      if task.prepare is not None:
        prepared[name] = task.prepare(
          model, batch[name], rngs=_folded(rngs, i), step=step, frozen=frozen[name]
        )
    return prepared

  def loss(self, model, batch, *, rngs, chunks=1):
    """The weighted sum as "loss", and what each task gives, as "name/loss" and so on."""
    del chunks
    told = {}
    for i, names in enumerate(self.joined()):
      key = _folded(rngs, i)
      if _joins(self.tasks[names[0]]):
        told |= self._joint(model, batch, names, rngs=key)
      else:
        told |= {name: self.tasks[name].loss(model, batch[name], rngs=key) for name in names}
    weights = self._weights({name: len(batch[name]["weight"]) for name in self.tasks})
    terms = [
      losses.Mean(term.total * weights[name], term.count)
      for name in self.tasks
      for term in told[name]["loss"].terms
    ]
    metrics = {f"{name}/{key}": x for name in self.tasks for key, x in told[name].items()}
    return {"loss": losses.sum_of_means(*terms)} | metrics

  def joined(self) -> list[list[str]]:
    """The names of the tasks that go through the model together, in the order of the tasks."""
    groups = {}
    for name, task in self.tasks.items():
      kind = name
      if _joins(task):
        kind = (task.image_size, task.num_patches) if IMAGE in task.fields else None
      groups.setdefault(kind, []).append(name)
    return list(groups.values())

  def log_line(self, values):
    told = []
    for name in self.tasks:
      text = f"{name} {values[f'{name}/loss']:.4f}"
      if f"{name}/accuracy" in values:
        text += f" ({values[f'{name}/accuracy']:.1%})"
      told.append(text)
    return (
      "Global Steps: {step}/{steps} | Train Epoch: {epoch} [{seen}/{rows} ({percent:.0f}%)] | "
      "Loss: {loss:.6f} | {told} | Grad Norm: {grad_norm:.3f} | Data Time: {data_time:.3f}s | "
      "Batch Time: {batch_time:.3f}s | LR: {lr:.3e} | Global Batch Size: {batch_size}"
    ).format(told=" | ".join(told), **values)

  def _joint(
    self, model: Any, batch: Batch, names: list[str], *, rngs: jax.Array | None
  ) -> dict[str, dict[str, losses.Mean]]:
    """The metrics of tasks that go through the model together."""
    batches = [self.tasks[name].taught(batch[name]) for name in names]
    logits = taught.joint_logits(
      model,
      batches,
      blocks=[self.tasks[name].vocab_blocks for name in names],
      num_patches=self.tasks[names[0]].num_patches,
      rngs=rngs,
    )
    return {
      name: self.tasks[name].cost(own, each.targets, batch[name])
      for name, each, own in zip(names, batches, logits, strict=True)
    }

  def _weights(self, rows: Mapping[str, int]) -> Mapping[str, float]:
    if self.weights is not None:
      return self.weights
    total = sum(rows.values())
    return {name: number / total for name, number in rows.items()}

  def _check_tasks(self) -> list[str]:
    faults = [
      f"task.tasks: expected names of letters, digits and _, found {name!r}"
      for name in self.tasks
      if not name.isidentifier()
    ]
    faults += [
      f"task.tasks.{name}: expected a task whose rows are learnt one by one and have one stream, "
      f"found {type(task).__name__}; train it by itself"
      for name, task in self.tasks.items()
      if task.whole_batch or task.batch_sizes(1) != 1
    ]
    folders = {
      name: task.tokenizer for name, task in self.tasks.items() if hasattr(task, "tokenizer")
    }
    if len(set(folders.values())) > 1:
      told = ", ".join(f"{folder} of {name}" for name, folder in folders.items())
      faults.append(f"task.tasks: expected one tokenizer for all, found {told}")
    return faults

  def _check_shares(self) -> list[str]:
    """What keeps the rows of an update from being counted."""
    if not self.tasks:
      return ["task.tasks: expected some, found none"]
    if self.multiple < 1:
      return [f"task.multiple: expected at least 1, found {self.multiple}"]
    return [] if self.shares is None else self._check_each("shares", least=1e-9)

  def _check_each(self, field: str, *, least: float) -> list[str]:
    numbers = getattr(self, field)
    if numbers.keys() == self.tasks.keys() and all(least <= x < math.inf for x in numbers.values()):
      return []
    return [
      f"task.{field}: expected a number of at least {least:g} for each of "
      f"{', '.join(self.tasks)}, found {numbers}"
    ]

  def _count(self) -> dict[str, int]:
    """Rows of the training data of each task, counted once."""
    if self._num_rows is None:
      self._num_rows = {}
      for name, rows in self.examples("train").items():
        self._num_rows[name] = len(rows)
        rows.close()
    return self._num_rows


def _joins(task: Task) -> bool:
  """Whether what a task computes is what `Seq2Seq` does, so that others' rows can be beside its."""
  return isinstance(task, Seq2Seq) and type(task).loss is Seq2Seq.loss


def _folded(rngs: jax.Array | None, number: int) -> jax.Array | None:
  return None if rngs is None else jax.random.fold_in(rngs, number)
