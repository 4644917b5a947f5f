"""The table that a run shows before it starts."""

import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import rich.table

from ofa_jax import trees
from ofa_jax.config import stream_sizes, to_dict
from ofa_jax.engine import log, sharding, step


def table(
  program: step.Program, *, num_rows: Mapping[str | None, int], steps: int, origin: str
) -> rich.table.Table:
  """Machine, mesh, parameters per tower, memory, origin of the weights, and the whole config.

  Args:
    program: from `step.build`.
    num_rows: training rows of each stream.
    steps: updates of the whole run.
    origin: where the weights came from.
  """
  config, abstract, places = program.config, program.abstract, program.shardings
  device = jax.devices()[0]
  flat = trees.flatten(abstract.params)
  towers = {
    name: sum(int(np.prod(p.shape)) for path, p in flat.items() if trees.first_match(rule, path))
    for name, rule in ((n, ((pattern, True),)) for n, pattern in config.model.towers.items())
  }
  held = sharding.bytes_per_device(abstract, places)
  grads = sharding.bytes_per_device(abstract.params, places.params)
  rows = [
    ("devices", f"{jax.device_count()} x {device.device_kind} on {jax.process_count()} host(s); "
                f"jax {jax.__version__}, Python {platform.python_version()}"),
    ("mesh", " x ".join(f"{k} {v}" for k, v in program.mesh.shape.items())),
    ("parameters", f"{trees.count(abstract.params):,} ("
                   + ", ".join(f"{k} {v:,}" for k, v in towers.items()) + ")"),
    ("memory a device", f"{log.human_bytes(held)} parameters and optimizer + "
                        f"{log.human_bytes(grads)} gradients; activations after compiling"),
    ("weights", origin),
    ("run", "; ".join(f"{name + ': ' if name else ''}{num_rows[name]:,} rows, batch {size}"
                      for name, size in stream_sizes(config).items()) + f", {steps:,} steps"),
  ]  # fmt: skip
  values = to_dict(config)
  for evaluation in values["evals"]:
    if evaluation["task"] == values["task"]:
      evaluation["task"] = "config.task"
  sections = {k: v for k, v in values.items() if isinstance(v, (dict, list)) and v}
  rows += [(f"config.{name}", _compact(value)) for name, value in sections.items()]
  rows.append(("config", _compact({k: v for k, v in values.items() if k not in sections})))
  return log.table(config.name or "ofa_jax", rows)


def _compact(value: Any) -> str:
  """A config value on few lines, class names shortened."""
  if isinstance(value, dict):
    name = value.get("_class", "").rpartition(".")[2]
    inside = " ".join(f"{k}={_compact(v)}" for k, v in value.items() if k != "_class")
    return f"{name}({inside})" if name else inside
  if isinstance(value, list):
    return "[" + ", ".join(_compact(v) for v in value) + "]"
  return repr(value) if isinstance(value, str) else str(value)
