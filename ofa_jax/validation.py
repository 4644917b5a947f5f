"""Every check of a config that needs no data, before anything is compiled."""

import dataclasses
import difflib
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ofa_jax.config import (
  ADAMS,
  BEST_MODES,
  LOG_PACKAGES,
  PRECISIONS,
  REMAT,
  SCHEDULES,
  Config,
  Eval,
  Optim,
  is_due,
  mesh_sizes,
  stream_sizes,
)
from ofa_jax.data import threads


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
  faults += _check_finite(config, "")
  try:
    sizes = mesh_sizes(config.mesh, devices)
    faults += _check_batch(config, sizes, hosts)
  except ValueError as e:
    faults.append(str(e))
  if hasattr(config.task, "check"):
    faults += config.task.check(config)
  if faults:
    raise ValueError("The config cannot run:\n" + "\n".join(f"  - {f}" for f in faults))


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
  if c.seed >= 2**32:  # beyond it JAX takes another, silently
    faults.append(f"seed: expected less than 2^32, found {c.seed}")
  for field, allowed in (("precision", PRECISIONS), ("remat", REMAT)):
    if getattr(c, field) not in allowed:
      faults.append(f"{field}: expected one of {', '.join(allowed)}, found {getattr(c, field)!r}")
  faults += _check_log_to(c.log_to)
  if c.ema is not None and not 0 < c.ema < 1:
    faults.append(f"ema: expected None or a decay between 0 and 1, found {c.ema}")
  if c.ema_start < 0 or (c.ema is None and c.ema_start):
    faults.append(f"ema_start: expected at least 0, and 0 without ema, found {c.ema_start}")
  if c.step_timeout is not None and c.step_timeout <= 0:
    faults.append(f"step_timeout: expected None or more than 0 seconds, found {c.step_timeout}")
  try:
    threads.number(c.workers)
  except ValueError as error:
    faults.append(str(error))
  if not 0 <= c.max_bad_rate <= 1:
    faults.append(f"max_bad_rate: expected a share between 0 and 1, found {c.max_bad_rate}")
  return faults


def _check_none(value: Any, name: str) -> list[str]:
  """Fields that are None, which the command line can make of any, and may not be."""
  faults = []
  for field, kind, inner in _inside(value):
    if inner is None and kind in (int, float, str, bool):
      faults.append(f"{name}.{field}: expected {kind.__name__}, found None, which it may not be")
    faults += _check_none(inner, f"{name}.{field}")
  return faults


def _check_finite(value: Any, prefix: str) -> list[str]:
  """Numbers that are none, or infinite."""
  faults = []
  for field, _, inner in _inside(value):
    name = f"{prefix}{field}"
    if isinstance(inner, float) and not math.isfinite(inner):
      faults.append(f"{name}: expected a finite number, found {inner}")
    faults += _check_finite(inner, f"{name}.")
  return faults


def _inside(value: Any) -> Iterator[tuple[str, Any, Any]]:
  """Name, type and value of each field of a dataclass, or of what a dictionary holds."""
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      yield field.name, field.type, getattr(value, field.name)
  elif isinstance(value, Mapping):
    for name, inner in value.items():
      yield str(name), None, inner


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
  faults = [
    f"evals[{e.name}].every_epochs: expected a finite number, found {e.every_epochs}"
    for e in c.evals
    if not math.isfinite(e.every_epochs)
  ]
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
  named = [e for e in evals if e.name == name]
  declared = [getattr(e.task, "metrics", None) for e in named]
  known = [e.called(m) for e in named for m in getattr(e.task, "metrics", None) or ()]
  if key and named and (metric in known or None in declared):
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
  for field in ("eps", "weight_decay", "warmup"):
    if getattr(o, field) < 0:
      faults.append(f"optim.{field}: expected at least 0, found {getattr(o, field)}")
  for field in ("b1", "b2"):
    if not 0 <= getattr(o, field) < 1:
      faults.append(f"optim.{field}: expected 0 <= {field} < 1, found {getattr(o, field)}")
  if o.clip_norm is not None and o.clip_norm <= 0:
    faults.append(f"optim.clip_norm: expected None or more than 0, found {o.clip_norm}")
  patterns = [*o.freeze, *o.no_decay, *(p for p, _ in o.lr_scale), *(p for p, _ in o.clamp)]
  if o.lora is not None:
    patterns += [*o.lora.matrices, *o.lora.also]
    if not o.lora.matrices or o.lora.rank < 1 or not o.lora.alpha > 0:
      faults.append(
        "optim.lora: expected patterns of matrices, a rank of at least 1 and an alpha above 0, "
        f"found {o.lora.matrices}, {o.lora.rank} and {o.lora.alpha}"
      )
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
  for name, size in evaluated:
    if size < 1:
      faults.append(f"{name}: expected None or at least 1, found {size}")
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


def _check_log_to(names: Sequence[str]) -> list[str]:
  """What keeps the writers of these names from being opened, one line each."""
  lines = []
  for name in names:
    if name not in LOG_PACKAGES:
      near = difflib.get_close_matches(name, LOG_PACKAGES, n=1)
      hint = f"; did you mean {near[0]}?" if near else ""
      lines.append(f"log_to: expected {' or '.join(LOG_PACKAGES)}, found {name!r}{hint}")
    elif importlib.util.find_spec(LOG_PACKAGES[name]) is None:
      lines.append(
        f"log_to: {name} needs the package {LOG_PACKAGES[name]}, found none; "
        f"pip install {LOG_PACKAGES[name]}"
      )
  return lines
