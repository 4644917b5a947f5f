"""The configuration of a run: plain dataclasses.

A config is a Python file whose `get_config(arg)` returns a `Config` built by ordinary calls; fields
are overridden on the command line, `--config.optim.lr=2e-5`. `validation.validate` collects every
fault before anything is compiled.
"""

import dataclasses
import difflib
import fractions
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

PRECISIONS = ("bf16", "fp32", "fp64")
REMAT = ("none", "dots", "full")
SCHEDULES = ("constant", "cosine", "linear", "polynomial")
ADAMS = ("adamw", "fairseq")
BEST_MODES = ("max", "min")
LOG_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # what `log_to` may name


@dataclasses.dataclass(kw_only=True)
class MeshShape:
  """Devices along each axis of the mesh; -1 takes all that are left.

  Attributes:
    data: rows of the batch are split over data x fsdp.
    fsdp: parameters and optimizer state are split over it, too.
    tensor: heads and feature axes inside a layer are split over it.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(kw_only=True)
class Lora:
  """Matrices that are trained by the factors of what is added to them (arXiv 2106.09685).

  Attributes:
    matrices: patterns of their paths.
    rank: of what is added.
    alpha: it is multiplied by alpha / rank.
    also: patterns of parameters that are trained as they are; all others are frozen.
  """

  matrices: tuple[str, ...]
  rank: int = 8
  alpha: float = 16.0
  also: tuple[str, ...] = ()

  @property
  def scale(self) -> float:
    """What the product of the factors is multiplied by."""
    return self.alpha / self.rank


@dataclasses.dataclass(kw_only=True)
class Optim:
  """AdamW and its schedule; patterns are searched in parameter paths, the first match wins.

  Attributes:
    lr: the highest rate of the schedule.
    adam: "adamw", or "fairseq", whose eps is outside the bias correction.
    b1, b2: decays of the moments.
    eps: added to the root of the second moment.
    weight_decay: decoupled, of what `no_decay` does not match.
    no_decay: patterns of parameters without weight decay.
    schedule: constant, cosine, linear or polynomial (fairseq's).
    warmup: steps of a linear rise to `lr`.
    warmup_ratio: the same as a share of the run's steps; above 0 it takes the place of `warmup`.
    power: of the polynomial schedule.
    end_lr: where the polynomial schedule ends.
    clip_norm: largest norm of all gradients together; None: any.
    freeze: patterns of parameters that are not trained and have no optimizer state.
    lr_scale: (pattern, factor of the rate) pairs; of stacked layers one factor, or one a layer.
      Layers of factor 0 stay bit for bit what they are.
    lora: trains some matrices by factors of low rank, and little else; None: off.
    clamp: (pattern, (low, high)) pairs: bounds of a parameter after the update.
    max_bad_steps: non-finite steps in a row, which are skipped, before the run stops.
  """

  lr: float = 1e-3
  adam: str = "adamw"
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  no_decay: tuple[str, ...] = ()
  schedule: str = "cosine"
  warmup: int = 0
  warmup_ratio: float = 0.0
  power: float = 1.0
  end_lr: float = 0.0
  clip_norm: float | None = None
  freeze: tuple[str, ...] = ()
  lr_scale: tuple[tuple[str, float | tuple[float, ...]], ...] = ()
  lora: Lora | None = None
  clamp: tuple[tuple[str, tuple[float, float]], ...] = ()
  max_bad_steps: int = 20


@dataclasses.dataclass(kw_only=True)
class Eval:
  """One evaluation: `task.score` of `task.predict` over `task.streams(split)`; all run at the end.

  Attributes:
    name: metrics are logged as `name/metric`; evaluations may share a name as long as their metrics
      differ.
    label: tells an evaluation from others of its name: its only metric is logged as `name/label`,
      one of several as `name/label_metric`, and its files are `name_label_file`. "": it has none.
    task: what is predicted and scored.
    split: of the task's data.
    every, every_epochs: steps and epochs between evaluations; each is off at 0 and below.
    batch_size: rows over all devices; None: that of training.
  """

  name: str
  task: Any
  split: str = "valid"
  every: int = 0
  every_epochs: float = 0.0
  batch_size: int | None = None
  label: str = ""

  def called(self, metric: str) -> str:
    """What a metric of the task is logged as."""
    if not self.label:
      return f"{self.name}/{metric}"
    alone = len(getattr(self.task, "metrics", None) or ()) == 1
    return f"{self.name}/{self.label}" if alone else f"{self.name}/{self.label}_{metric}"


@dataclasses.dataclass(kw_only=True)
class Config:
  """Everything that a run is made of.

  Attributes:
    model: sizes, with `build(rngs, remat, unroll)`, `sharding` and `towers`, and perhaps with
      `optional`, path regexes of parameters that the weights to start from may lack.
    task: what is learnt; see `ofa_jax/tasks/base.py`.
    batch_size: rows of one update over all devices; of a task with several streams, those of its
      main one.
    name: a title.
    steps, epochs: the length of the run; epoch N ends with update ceil(N * rows / batch_size), and
      steps win where both are given.
    init: weights to start from: a run's workdir (of which WORKDIR@STEP is one step), a model
      directory, a released name, a .pt file; None: from scratch.
    resume: another run to go on from in this workdir, as WORKDIR, WORKDIR@STEP or WORKDIR@best:
      its weights, optimizer and step. A workdir that holds checkpoints goes on from its own.
    reset_optimizer: of what is resumed leave the optimizer behind (the original's
      --reset-optimizer).
    reset_step: of what is resumed leave the step behind, so that data and schedule begin anew (the
      original's --reset-data-offset).
    seed: of everything random.
    log_every: steps between log lines; 0 and below: only at the end.
    save_every, save_every_epochs: steps and epochs between checkpoints; each is off at 0 and below.
      The end is always saved.
    keep: newest checkpoints that stay.
    best_metric: metric of an evaluation, such as "valid/cider", by which the best checkpoint stays
      beside the newest; None: none does.
    best_mode: "max", or "min" where less is better.
    evals: evaluations, each an `Eval`.
    optim: the optimizer, an `Optim`.
    mesh: the devices, a `MeshShape`.
    precision: what is computed in on float32 parameters: bf16, fp32 in full, or fp64 (not on TPUs).
    remat: what the backward pass recomputes: what is cheap and large, all but matrix products, or
      whole layers.
    unroll: layers per iteration of the scan over layers; more is slower to compile, and on CPUs
      slower to run.
    accum: chunks in which one update is computed, with the result of the whole batch.
    ema: decay of the exponential moving average of the parameters and of BatchNorm's statistics,
      which is then what is evaluated; None: off.
    ema_start: updates until which the average is a copy (fairseq's --ema-start-update).
    log_to: where metrics go beside `metrics.jsonl`: "tensorboard", "wandb".
    max_bad_rate: share of undecodable rows above which the run stops.
    workers: decoding threads per host, 1,024 at most; None: one a core.
    step_timeout: seconds without the end of a step after which a process shows where it stands and
      exits; ten times as long for the first step, evaluations and saves. None: no limit.
  """

  model: Any
  task: Any
  batch_size: int
  name: str = ""
  steps: int | None = None
  epochs: float | None = None
  init: str | None = None
  resume: str | None = None
  reset_optimizer: bool = False
  reset_step: bool = False
  seed: int = 0
  log_every: int = 50
  save_every: int = 1000
  save_every_epochs: float = 0.0
  keep: int = 3
  best_metric: str | None = None
  best_mode: str = "max"
  log_to: tuple[str, ...] = ()
  evals: tuple[Eval, ...] = ()
  optim: Optim = dataclasses.field(default_factory=Optim)
  mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
  precision: str = "bf16"
  remat: str = "none"
  unroll: int = 1
  accum: int = 1
  ema: float | None = None
  ema_start: int = 0
  max_bad_rate: float = 0.01
  workers: int | None = None
  step_timeout: float | None = None


def epoch_end(epoch: float, *, rows: int, batch_size: int) -> int:
  """The update that ends so many passes over the data: ceil(epoch * rows / batch_size)."""
  return math.ceil(fractions.Fraction(str(epoch)) * rows / batch_size)


def is_due(done: int, *, steps: int, epochs: float, rows: int, batch_size: int) -> bool:
  """Whether something falls on an update, counted from 1.

  Args:
    done: the update.
    steps, epochs: the intervals; each is off at 0 and below.
    rows, batch_size: of the training data.
  """
  if steps > 0 and done % steps == 0:
    return True
  if epochs <= 0:
    return False
  interval = fractions.Fraction(str(epochs)) * rows / batch_size
  times = done // interval  # the last one that ended with or before this update
  return times > 0 and math.ceil(times * interval) == done


def stream_sizes(config: Config) -> dict[str | None, int]:
  """Rows of an update by stream, the main one first; where there is one, its name is None."""
  sizes = config.task.batch_sizes(config.batch_size)
  return dict(sizes) if isinstance(sizes, Mapping) else {None: sizes}


def mesh_sizes(shape: MeshShape, devices: int) -> tuple[int, int, int]:
  """(data, fsdp, tensor) with the -1 filled in; ValueError when they do not make `devices`."""
  sizes = [shape.data, shape.fsdp, shape.tensor]
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise ValueError(f"mesh: expected positive sizes and at most one -1, found {shape}")
  known = 1
  for size in sizes:
    known *= size if size > 0 else 1
  if -1 in sizes and devices % known == 0:
    sizes[sizes.index(-1)] = devices // known
  if sizes[0] * sizes[1] * sizes[2] != devices:
    raise ValueError(
      f"mesh: expected data x fsdp x tensor = {devices} devices, found {shape}; "
      f"set one axis to -1 or choose divisors of {devices}"
    )
  return tuple(sizes)


def to_dict(value: Any) -> Any:
  """A config as JSON-able data, with the class of every dataclass under "_class"."""
  if dataclasses.is_dataclass(value):
    fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
    return {"_class": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
  if isinstance(value, dict):
    return {str(k): to_dict(v) for k, v in value.items()}
  if isinstance(value, (tuple, list)):
    return [to_dict(v) for v in value]
  if callable(value) and hasattr(value, "__qualname__"):
    return f"{value.__module__}.{value.__qualname__}"
  return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def explain_unknown_field(config: Any, message: str) -> str | None:
  """A readable text for ml_collections' error about an override that names no field."""
  parts = re.search(r"Field (\S+) not found on dataclass <class '([\w.]+)'>", message)
  if not parts:
    return None
  field, owner = parts[1], parts[2].split(".")[-1]
  paths = list(_fields(config))
  names = sorted({path.rpartition(".")[2] for path, holder in paths if holder == owner})
  places = [path for path, _ in paths if path.rpartition(".")[2] == field]
  near = difflib.get_close_matches(field, names, n=3, cutoff=0.4)
  if not places and not difflib.get_close_matches(field, names, n=1, cutoff=0.7):
    every = {path.rpartition(".")[2] for path, _ in paths}
    other = difflib.get_close_matches(field, every, n=1, cutoff=0.8)
    places = [path for path, _ in paths if path.rpartition(".")[2] in other]
  near = [f"--config.{path}" for path in places[:3]] or near
  hint = f"; did you mean {' or '.join(near)}?" if near else ""
  return f"--config: {owner} has no field '{field}'{hint} (it has: {', '.join(names)})"


def _fields(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
  """(path, name of the class that has it) of every field of a config and of what is in it."""
  if dataclasses.is_dataclass(value):
    for f in dataclasses.fields(value):
      inner = f"{path}.{f.name}" if path else f.name
      yield inner, type(value).__name__
      yield from _fields(getattr(value, f.name), inner)
  elif isinstance(value, Mapping):
    for key, v in value.items():
      yield from _fields(v, f"{path}.{key}")
  elif isinstance(value, (tuple, list)):
    for i, v in enumerate(value):
      yield from _fields(v, f"{path}[{i}]")
