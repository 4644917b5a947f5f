"""Changes of a config that make its step need less memory, and an estimate of which may do."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ofa_jax import config as config_lib
from ofa_jax.config import Config


class Sizes(Protocol):
  """What is known of a step that does not fit, in bytes on one device.

  Attributes:
    held: the state and the batch, by kind.
    temporary: gradients and activations.
    memory: what the device has.
    coupled: the share of the activations that accumulation leaves as they are.
  """

  held: Mapping[str, int]
  temporary: int
  memory: int
  coupled: float


def changes(config: Config, report: Sizes, *, num_devices: int) -> Iterator[dict[str, Any]]:
  """Changes that may make the step fit, values by the names of their fields, the cheapest first.

  More recomputation costs operations, accumulation smaller products, strips of logits a second
  computation of them, more fsdp communication; then come all of them together, and last a smaller
  batch, the only one that changes the result. What an estimate from the report rules out is left
  out: accumulation shrinks the activations but for `report.coupled` of them, fsdp state and
  gradients.
  """
  data, fsdp, _ = config_lib.mesh_sizes(config.mesh, num_devices)
  batch, gradients = report.held["batch"], report.held["parameters"]
  state = sum(report.held.values()) - batch
  activations = max(0, report.temporary - gradients)

  def hopeful(accum=1, wider=1, strips=1, smaller=1):
    left = (1 - report.coupled) / accum + report.coupled / strips
    of_rows = (batch + activations * left) / smaller
    return (state + gradients) / wider + of_rows < report.memory

  levels = config_lib.REMAT[config_lib.REMAT.index(config.remat) + 1 :]
  counts = (2, 4, 8, 16, 32)
  rows = math.gcd(*config_lib.stream_sizes(config).values()) // (data * fsdp)
  parts = [n for n in counts if rows % (n * config.accum) == 0]
  wider = [n for n in counts if data % n == 0]
  strips = {n: config.task.in_strips(n, rows=rows) for n in counts}
  strips = {
    n: {f"task.{k}": v for k, v in fields.items()} for n, fields in strips.items() if fields
  }
  yield from ({"remat": level} for level in levels if hopeful(accum=math.inf))
  yield from ({"accum": config.accum * n} for n in parts if hopeful(accum=n))
  yield from (fields for n, fields in strips.items() if hopeful(strips=n))
  yield from ({"mesh.fsdp": fsdp * n} for n in wider if hopeful(wider=n))
  more = {"remat": "full"} if levels else {}
  yield from ({**more, "accum": config.accum * n} for n in parts if more and hopeful(accum=n))
  for n, (k, fields) in itertools.product(parts, strips.items()):
    if hopeful(accum=n, strips=k):
      yield {**more, "accum": config.accum * n, **fields}
  for w, n in itertools.product(wider, parts):
    if hopeful(accum=n, wider=w):
      yield {**more, "accum": config.accum * n, "mesh.fsdp": fsdp * w}
  fewer = (n for n in counts if rows % n == 0 and hopeful(smaller=n))
  yield from ({"batch_size": config.batch_size // n} for n in fewer)


def changed(config: Config, change: Mapping[str, Any], *, shape: tuple[int, int, int]) -> Config:
  """The config with some fields changed, on the mesh that the devices make now.

  Args:
    config: it stays as it is.
    change: one of `changes`.
    shape: data, fsdp and tensor of its mesh.
  """
  data, fsdp, tensor = shape
  fields = {k: v for k, v in change.items() if "." not in k}
  wide = change.get("mesh.fsdp", fsdp)
  fields["mesh"] = config_lib.MeshShape(data=data * fsdp // wide, fsdp=wide, tensor=tensor)
  of_task = {k.removeprefix("task."): v for k, v in change.items() if k.startswith("task.")}
  if of_task:
    fields["task"] = dataclasses.replace(config.task, **of_task)
  return dataclasses.replace(config, **fields)


def flags(change: Mapping[str, Any]) -> str:
  """Returns the change as the command line has it."""
  return " ".join(f"--config.{name}={value}" for name, value in change.items())
