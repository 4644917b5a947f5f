"""The configuration of a run: plain dataclasses, and every check that needs no data.

A config is a Python file whose `get_config(arg)` returns a `Config` built by ordinary calls; fields
are overridden on the command line, `--config.optim.lr=2e-5`. `validate` collects every fault before
anything is compiled.
"""

import dataclasses
import difflib
import fractions
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ofa_jax.engine import writers

PRECISIONS = ("bf16", "fp32", "fp64")
REMAT = ("none", "dots", "full")
SCHEDULES = ("constant", "cosine", "linear", "polynomial")
ADAMS = ("adamw", "fairseq")
BEST_MODES = ("max", "min")


@dataclasses.dataclass(kw_only=True)
class MeshShape:
  """Devices along each axis of the mesh; -1 takes all that are left.

  The batch is split over `data` x `fsdp`; parameters and optimizer state are split over `fsdp`;
  `tensor` splits heads and feature axes inside a layer.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(kw_only=True)
class Optim:
  """AdamW and its schedule; patterns are searched in parameter paths, the first match wins.

  `lr_scale` multiplies the learning rate, by one number or, for stacked layers, one a layer;
  `clamp` bounds a parameter after the update. A parameter that matches `freeze`, or whose rate is
  0, is not trained and has no optimizer state; layers of rate 0 stay bit for bit what they are. A
  parameter that matches `no_decay` has no weight decay.
  """

  lr: float = 1e-3
  adam: str = "adamw"  # "fairseq": eps outside the bias correction
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  no_decay: tuple[str, ...] = ()
  schedule: str = "cosine"
  warmup: int = 0  # steps
  warmup_ratio: float = 0.0  # share of the run's steps; above 0 it takes the place of `warmup`
  power: float = 1.0  # of the "polynomial" schedule
  end_lr: float = 0.0  # where that ends
  clip_norm: float | None = None
  freeze: tuple[str, ...] = ()
  lr_scale: tuple[tuple[str, float | tuple[float, ...]], ...] = ()
  clamp: tuple[tuple[str, tuple[float, float]], ...] = ()
  max_bad_steps: int = 20  # non-finite steps in a row before the run stops


@dataclasses.dataclass(kw_only=True)
class Eval:
  """One evaluation: `task.score` of `task.predict` over `task.streams(split)`.

  Runs every `every` steps, every `every_epochs` epochs (each is off at 0 and below), and at the
  end. Metrics are logged as `name/metric`; evaluations may share a name as long as their metrics
  differ.
  """

  name: str
  task: Any
  split: str = "valid"
  every: int = 0
  every_epochs: float = 0.0
  batch_size: int | None = None  # global; None: the training batch size


@dataclasses.dataclass(kw_only=True)
class Config:
  """Everything that a run is made of.

  Attributes:
    model: sizes, with `build(rngs, remat, unroll)`, `sharding` and `towers`, and perhaps with
      `optional`, path regexes of parameters that the weights to start from may lack.
    task: what is learnt; see `ofa_jax/tasks/base.py`.
    batch_size: rows of one update over all devices; of a task with several streams, those of its
      main one.
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
    log_every: steps between log lines; 0 and below: only at the end.
    save_every, save_every_epochs: steps and epochs between checkpoints; each is off at 0 and below.
      The end is always saved.
    keep: newest checkpoints that stay.
    best_metric: metric of an evaluation, such as "valid/cider", by which the best checkpoint stays
      beside the newest; None: none does.
    best_mode: "max", or "min" where less is better.
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
    workers: decoding threads per host; None: one a core.
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


def validate(config: Config, *, devices: int, hosts: int = 1) -> None:
  """Raises one ValueError that lists every fault of the config.

  Args:
    config: the config after command-line overrides.
    devices: devices of all hosts together.
    hosts: processes.
  """
  faults = [*_check_none(config, "config"), *_check_evals(config.evals)]
  if faults:  # the other checks compare
    raise ValueError("The config cannot run:\n" + "\n".join(f"  - {f}" for f in faults))
  faults = [*_check_run(config), *_check_saves(config), *_check_optim(config.optim)]
  try:
    sizes = mesh_sizes(config.mesh, devices)
    faults += _check_batch(config, sizes, hosts)
  except ValueError as e:
    faults.append(str(e))
  if hasattr(config.task, "check"):
    faults += config.task.check(config)
  if faults:
    raise ValueError("The config cannot run:\n" + "\n".join(f"  - {f}" for f in faults))


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


def check_best(config: Config, *, rows: int, steps: int) -> None:
  """Raises ValueError where none of the checkpoints before the end could ever be the best one."""
  if config.best_metric is None or not config.evals:
    return
  size = {"rows": rows, "batch_size": config.batch_size}
  name = config.best_metric.partition("/")[0]
  evals = [e for e in config.evals if e.name == name]
  saved = 0
  for done in range(1, steps):
    if is_due(done, steps=config.save_every, epochs=config.save_every_epochs, **size):
      saved += 1
      if any(is_due(done, steps=e.every, epochs=e.every_epochs, **size) for e in evals):
        return
  if saved:
    saves = f"save_every={config.save_every}, save_every_epochs={config.save_every_epochs:g}"
    runs = " and ".join(f"every={e.every}, every_epochs={e.every_epochs:g}" for e in evals)
    raise ValueError(
      f"best_metric: expected steps that are both saved and evaluated before the end, found none "
      f"in {steps} steps: {saves}; evals[{name}] has {runs}. Give both the same interval, or set "
      "best_metric=None."
    )


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
  return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def explain_unknown_field(config: Any, message: str) -> str | None:
  """A readable text for ml_collections' error about an override that names no field."""
  found = re.search(r"Field (\S+) not found on dataclass <class '([\w.]+)'>", message)
  if not found:
    return None
  field, owner = found[1], found[2].split(".")[-1]
  names = sorted(
    {
      f.name
      for d in _dataclasses(config)
      if type(d).__name__ == owner
      for f in dataclasses.fields(d)
    }
  )
  near = difflib.get_close_matches(field, names, n=3, cutoff=0.4)
  hint = f"; did you mean {' or '.join(near)}?" if near else ""
  return f"--config: {owner} has no field '{field}'{hint} (it has: {', '.join(names)})"


def _dataclasses(value: Any) -> Iterable[Any]:
  if dataclasses.is_dataclass(value):
    yield value
    for f in dataclasses.fields(value):
      yield from _dataclasses(getattr(value, f.name))
  elif isinstance(value, (tuple, list)):
    for v in value:
      yield from _dataclasses(v)


def _check_run(c: Config) -> list[str]:
  faults = []
  if c.steps is None and c.epochs is None:
    faults.append("expected steps or epochs, found neither")
  if c.steps is not None and c.steps < 1:
    faults.append(f"steps: expected at least 1, found {c.steps}")
  if c.epochs is not None and c.epochs <= 0:
    faults.append(f"epochs: expected more than 0, found {c.epochs}")
  for field, low in (
    ("batch_size", 1),
    ("keep", 1),
    ("accum", 1),
    ("unroll", 1),
    ("seed", 0),
  ):
    if getattr(c, field) < low:
      faults.append(f"{field}: expected at least {low}, found {getattr(c, field)}")
  for field, allowed in (("precision", PRECISIONS), ("remat", REMAT)):
    if getattr(c, field) not in allowed:
      faults.append(f"{field}: expected one of {', '.join(allowed)}, found {getattr(c, field)!r}")
  faults += writers.faults(c.log_to)
  if c.ema is not None and not 0 < c.ema < 1:
    faults.append(f"ema: expected None or a decay between 0 and 1, found {c.ema}")
  if c.ema_start < 0 or (c.ema is None and c.ema_start):
    faults.append(f"ema_start: expected at least 0, and 0 without ema, found {c.ema_start}")
  if c.step_timeout is not None and c.step_timeout <= 0:
    faults.append(f"step_timeout: expected None or more than 0 seconds, found {c.step_timeout}")
  if c.workers is not None and c.workers < 1:
    faults.append(f"workers: expected None (one a core) or at least 1, found {c.workers}")
  if not 0 <= c.max_bad_rate <= 1:
    faults.append(f"max_bad_rate: expected a share between 0 and 1, found {c.max_bad_rate}")
  return faults


def _check_none(value: Any, name: str) -> list[str]:
  """Fields that are None, which the command line can make of any, and may not be."""
  faults = []
  for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
    inner = getattr(value, field.name)
    if inner is None and field.type in (int, float, str, bool):
      kind = field.type.__name__
      faults.append(f"{name}.{field.name}: expected {kind}, found None, which it may not be")
    faults += _check_none(inner, f"{name}.{field.name}")
  return faults


def _check_evals(evals: tuple[Eval, ...]) -> list[str]:
  if not isinstance(evals, (tuple, list)):
    return [f"evals: expected a tuple of Eval, () for none, found {evals!r}"]
  return [
    f"evals: expected Eval(...) as made in a config file, found {e!r}; --config.evals[0].every=N "
    "changes one, --config.evals=() drops all"
    for e in evals
    if not isinstance(e, Eval)
  ]


def _check_saves(c: Config) -> list[str]:
  faults = []
  epochs = [("epochs", c.epochs), ("save_every_epochs", c.save_every_epochs)]
  epochs += [(f"evals[{e.name}].every_epochs", e.every_epochs) for e in c.evals]
  for name, value in epochs:
    if value is not None and not math.isfinite(value):
      faults.append(f"{name}: expected a number of epochs, found {value}")
  resets = [name for name in ("reset_optimizer", "reset_step") if getattr(c, name)]
  if resets and c.resume is None:
    faults.append(
      f"{' and '.join(resets)}: expected resume=WORKDIR with it, found None; `init` takes weights "
      "only, with a fresh optimizer from step 0"
    )
  if c.resume is not None and c.init is not None:
    faults.append(
      f"resume and init: expected one of them, found {c.resume!r} and {c.init!r}; `init` takes "
      "weights only, `resume` the optimizer and the step too"
    )
  if c.best_mode not in BEST_MODES:
    faults.append(f"best_mode: expected one of {', '.join(BEST_MODES)}, found {c.best_mode!r}")
  if c.best_metric is not None and c.evals:  # without any, there is nothing to be best at
    faults += _check_best_metric(c.best_metric, c.evals)
  return faults


def _check_best_metric(metric: str, evals: tuple[Eval, ...]) -> list[str]:
  """What shows before an evaluation has run: its name, and the metrics that its task declares."""
  name, _, key = metric.partition("/")
  found = [e for e in evals if e.name == name]
  declared = [getattr(e.task, "metrics", None) for e in found]
  known = [f"{name}/{m}" for metrics in declared for m in metrics or ()]
  if key and found and (metric in known or None in declared):
    return []
  expected = f"out of {', '.join(known)}" if known else "NAME/METRIC of one of the evals"
  names = ", ".join(sorted({e.name for e in evals})) or "none"
  near = difflib.get_close_matches(metric, known, n=1)
  hint = f"; did you mean {near[0]}?" if near else f" (evals: {names})"
  return [f"best_metric: expected one {expected}, found {metric!r}{hint}"]


def _check_optim(o: Optim) -> list[str]:
  faults = []
  if o.schedule not in SCHEDULES:
    faults.append(f"optim.schedule: expected one of {', '.join(SCHEDULES)}, found {o.schedule!r}")
  if o.adam not in ADAMS:
    faults.append(f"optim.adam: expected one of {', '.join(ADAMS)}, found {o.adam!r}")
  for field in ("lr", "power"):
    if not getattr(o, field) > 0:
      faults.append(f"optim.{field}: expected more than 0, found {getattr(o, field)}")
  if not 0 <= o.end_lr <= o.lr:
    faults.append(f"optim.end_lr: expected 0 <= end_lr <= lr, found {o.end_lr}")
  if not 0 <= o.warmup_ratio < 1:
    faults.append(f"optim.warmup_ratio: expected 0 <= ratio < 1, found {o.warmup_ratio}")
  for field in ("b1", "b2"):
    if not 0 <= getattr(o, field) < 1:
      faults.append(f"optim.{field}: expected 0 <= {field} < 1, found {getattr(o, field)}")
  if o.clip_norm is not None and o.clip_norm <= 0:
    faults.append(f"optim.clip_norm: expected None or more than 0, found {o.clip_norm}")
  patterns = [*o.freeze, *o.no_decay, *(p for p, _ in o.lr_scale), *(p for p, _ in o.clamp)]
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as e:
      faults.append(f"optim: {pattern!r} is no regular expression ({e})")
  return faults


def _check_batch(c: Config, sizes: tuple[int, int, int], hosts: int) -> list[str]:
  faults = []
  shards = sizes[0] * sizes[1]
  local = shards * sizes[2] // hosts
  if local % sizes[2]:
    faults.append(
      f"mesh.tensor: expected a divisor of the {local} devices of a host, found {sizes[2]}; "
      "hosts read whole rows"
    )
  streams = stream_sizes(c)
  main, *others = streams.items() or [(None, None)]
  if main[1] != c.batch_size:
    faults.append(
      f"task.batch_sizes: expected the main stream first, with batch_size {c.batch_size}, found "
      f"{streams}"
    )
  for name, size in others:
    if size < 1:
      faults.append(f"batch size of the stream {name!r}: expected at least 1, found {size}")
  trained = [("batch_size", c.batch_size)]
  trained += [(f"batch size of the stream {name!r}", size) for name, size in others]
  evaluated = [(f"evals[{e.name}].batch_size", e.batch_size) for e in c.evals if e.batch_size]
  for name, size in trained + evaluated:
    for divisor, what in ((shards, "data x fsdp devices"), (hosts, "hosts")):
      if size % divisor:
        near = max(divisor, round(size / divisor) * divisor)
        faults.append(
          f"{name}: expected a multiple of {divisor} ({what}), found {size}; the nearest is {near}"
        )
  for name, size in trained:
    if c.accum > 1 and size % (c.accum * shards):
      faults.append(
        f"accum: expected {name} {size} to be a multiple of accum x data x "
        f"fsdp = {c.accum} x {shards}"
      )
  return faults
