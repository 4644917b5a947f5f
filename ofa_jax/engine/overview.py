"""What a run shows of itself before it starts."""

import dataclasses
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ofa_jax import trees
from ofa_jax.config import Config, Optim, stream_sizes
from ofa_jax.engine import log, sharding, step
from ofa_jax.engine import optim as optim_lib

_LONG_TO_COMPILE = 15.0  # seconds, from which on the compilation cache is worth a hint
_MOST = 3  # files that are named
_MOST_PATHS = 8  # parameters that are
_ADAMS = {"adamw": "AdamW", "fairseq": "fairseq's Adam"}


def rows(
  program: step.Program,
  *,
  num_rows: Mapping[str | None, int],
  steps: int,
  origin: str,
  workdir: str | os.PathLike,
) -> list[tuple[str, str]]:
  """What a person wants to know of a run, as names and texts; the whole config is in config.json.

  Args:
    program: from `step.build`.
    num_rows: training rows of each stream.
    steps: updates of the whole run.
    origin: where the weights came from.
    workdir: folder of the run.
  """
  config, abstract, places = program.config, program.abstract, program.shardings
  device = jax.devices()[0]
  held = sharding.bytes_per_device(abstract, places)
  grads = sharding.bytes_per_device(abstract.params, places.params)
  mesh = " x ".join(f"{k} {v}" for k, v in program.mesh.shape.items())
  parts = f"; accumulated over {config.accum} parts" if config.accum > 1 else ""
  precision = {"bf16": "bf16, on float32 parameters", "fp64": "fp64, on float32 parameters"}
  recomputed = "" if config.remat == "none" else f"; remat {config.remat}"
  named = [
    ("model", f"{_title(config.model)}, {_parameters(config, abstract.params)}"),
    ("weights", origin),
    *_trained(config, abstract.params),
    ("data", _data(config, num_rows)),
    ("length", _length(config, next(iter(num_rows.values())), steps) + parts),
    ("optimizer", _optimizer(config)),
    ("evaluations", "; ".join(_evaluations(config)) or "none"),
    ("precision", precision.get(config.precision, config.precision) + recomputed),
    ("devices", f"{jax.device_count()} x {device.device_kind} on {jax.process_count()} host(s), "
                f"mesh {mesh}; jax {jax.__version__}, Python {platform.python_version()}"),
    ("memory", f"{log.human_bytes(held)} parameters and optimizer + {log.human_bytes(grads)} "
               "gradients a device; activations after compiling"),
    ("output", f"{workdir}: config.json (every field of this run), log.txt, metrics.jsonl, "
               "curves.png, checkpoints/, results/"),
  ]  # fmt: skip
  return named


def advice(config: Config, *, backend: str) -> list[str]:
  """What would be faster on these devices; the config is left as it is."""
  if config.precision != "bf16" or backend != "cpu":
    return []
  return [
    "precision=bf16 is for accelerators: on a CPU it took 1.4 to 2.5 times as long as "
    "--config.precision=fp32"
  ]


def after_compiling(seconds: float, *, cache: str | None) -> list[str]:
  """How the next start compiles in less time, where this one took long and nothing is kept."""
  if seconds < _LONG_TO_COMPILE or cache:
    return []
  return [
    "With JAX_COMPILATION_CACHE_DIR=FOLDER in the environment, the next start takes what is "
    "compiled from that folder, in seconds"
  ]


def _title(model: Any) -> str:
  name = getattr(model, "name", "")
  return f"{type(model).__name__.removesuffix('Config')}{' ' + name if name else ''}"


def _parameters(config: Config, params: trees.Tree) -> str:
  flat = trees.flatten(params)
  towers = {
    name: sum(int(np.prod(p.shape)) for path, p in flat.items() if trees.first_match(rule, path))
    for name, rule in ((n, ((pattern, True),)) for n, pattern in config.model.towers.items())
  }
  inside = ", ".join(f"{k} {v:,}" for k, v in towers.items() if v)
  return f"{trees.count(params):,} parameters" + (f" ({inside})" if inside else "")


def _trained(config: Config, params: trees.Tree) -> list[tuple[str, str]]:
  """What is trained, where not all is."""
  numbers, every = optim_lib.trained(config.optim, params), trees.count(params)
  total = sum(numbers.values())
  if total == every:
    return []
  paths = list(numbers)
  more = f", ... {len(paths) - _MOST_PATHS} more" if len(paths) > _MOST_PATHS else ""
  named = ", ".join(paths[:_MOST_PATHS]) + more
  return [("trained", f"{total:,} numbers, {total / every:.3%} of the parameters: {named}")]


def _data(config: Config, num_rows: Mapping[str | None, int]) -> str:
  unit = getattr(config.task, "unit", "rows")
  files = list(dict.fromkeys(_files(getattr(config.task, "train", ()))))
  more = f" and {len(files) - _MOST} more" if len(files) > _MOST else ""
  named = f" of {', '.join(files[:_MOST])}{more}" if files else ""
  return "; ".join(
    f"{name}: {num_rows[name]:,} rows, batch {size:,}"
    if name
    else f"{num_rows[name]:,} {unit}{named}, batch {size:,}"
    for name, size in stream_sizes(config).items()
  )


def _files(value: Any) -> Iterator[str]:
  """The first file of every source, with the folder that it is in."""
  if isinstance(value, (str, os.PathLike)):
    yield str(pathlib.PurePath(*pathlib.PurePath(value).parts[-2:]))
  elif isinstance(value, (tuple, list)):
    for part in value:
      yield from _files(part)
  elif dataclasses.is_dataclass(value):
    yield from _files(getattr(value, "images", ()))


def _length(config: Config, rows: int, steps: int) -> str:
  epochs = steps * config.batch_size / rows
  saves = [f"{config.save_every:,} steps"] if config.save_every > 0 else []
  saves += [f"{config.save_every_epochs:g} epochs"] if config.save_every_epochs > 0 else []
  return (
    f"{steps:,} steps, {epochs:.4g} epochs; a checkpoint every {' and '.join(saves)}, the newest "
    f"{config.keep} stay"
    if saves
    else f"{steps:,} steps, {epochs:.4g} epochs; a checkpoint at the end"
  )


def _optimizer(config: Config) -> str:
  o: Optim = config.optim
  warmup = f"{o.warmup_ratio:.0%}" if o.warmup_ratio > 0 else f"{o.warmup:,} steps"
  warmed = f" after {warmup} of warm-up" if o.warmup or o.warmup_ratio > 0 else ""
  parts = [f"{_ADAMS.get(o.adam, o.adam)}, lr {o.lr:g}, {o.schedule}{warmed}"]
  parts += [f"weight decay {o.weight_decay:g}"] if o.weight_decay else []
  parts += [f"gradients clipped at {o.clip_norm:g}"] if o.clip_norm else []
  parts += [f"frozen: {' '.join(o.freeze)}"] if o.freeze else []
  if o.lora is not None:
    parts += [f"LoRA of rank {o.lora.rank}, alpha {o.lora.alpha:g}: {' '.join(o.lora.matrices)}"]
  parts += [f"{len(o.lr_scale)} lr_scale patterns"] if o.lr_scale else []
  parts += [f"moving average {config.ema:g}"] if config.ema is not None else []
  return ", ".join(parts)


def _evaluations(config: Config) -> Iterator[str]:
  for e in config.evals:
    times = [f"every {e.every:,} steps"] if e.every > 0 else []
    times += [f"every {e.every_epochs:g} epochs"] if e.every_epochs > 0 else []
    yield f"{e.name} ({type(e.task).__name__}, {e.split}) {' and '.join(times) or 'at the end'}"
