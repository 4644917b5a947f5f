r"""Compiles a config's train step for devices that are not there, and says whether it fits.

  python -m ofa_jax.compile_ahead --config=configs/cnclip_vith14.py:pod --topology=v5e:16x16
  python -m ofa_jax.compile_ahead --config=... --topology=v5e:16x16,slices=2   # two TPU slices
  python -m ofa_jax.compile_ahead --config=... --topology=h100:8 --config.mesh.fsdp=8

It is the step that training runs, compiled by the compiler of those devices: memory per device by
kind, operations, collectives. No data is read and no device is needed; TPUs need libtpu, GPUs JAX's
CUDA plugin (the error says how to install them). The exit status is 1 when the step does not fit,
and the smallest change that makes it fit is compiled too.
"""

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Iterator

import jax
from absl import flags
from etils import epath

from ofa_jax import cli, flops, hlo, log, sharding, step, topology
from ofa_jax import config as config_lib
from ofa_jax.config import Config

_SCHEDULE = 1000  # steps of a run whose length is given in epochs: only constants depend on it
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = re.compile(r"\(?([\d.]+)([KMGT])\)? (?:exceeds available HBM|of [\d.]+[KMGT] hbm)")


@dataclasses.dataclass(kw_only=True)
class Report:
  """What compiling found out; sizes are bytes on one device.

  Attributes:
    held: parameters, optimizer, ema, other state, batch, and padding of these.
    temporary: gradients and activations; an estimate of the compiler's where nothing fits.
    memory: what the device has for a program.
    fits: whether the compiler found room.
    model_flops: 3 x forward, over all devices and without recomputation.
    step_flops: what the step computes, over all devices.
    collectives: by kind, as one device runs them in a step.
    largest: the largest intermediate arrays of the step before it is compiled, with their bytes
      over all devices; the compiler may never make one of them whole.
    coupled: where the step does not fit, the share of the bytes of its intermediate arrays that
      accumulation leaves as they are, such as the logits of a whole batch; 0 where it fits.
  """

  held: dict[str, int]
  temporary: int
  memory: int
  fits: bool
  model_flops: int
  step_flops: int
  collectives: dict[str, hlo.Collective]
  lower_s: float
  compile_s: float
  largest: dict[str, int]
  coupled: float

  @property
  def total(self) -> int:
    return sum(self.held.values()) + self.temporary


def analyse(config: Config, target: topology.Topology, devices: list[jax.Device]) -> Report:
  """Compiles the config's train step for the devices.

  Args:
    config: as for training; `task.batch_spec` stands for the data.
    target: what the devices are.
    devices: from `topology.devices`.

  Raises:
    ValueError: the config cannot run on so many devices and hosts, or cuDNN is not installed.
  """
  hosts = len({d.process_index for d in devices})
  config_lib.validate(config, devices=len(devices), hosts=hosts)
  mesh = sharding.make_mesh(config_lib.mesh_sizes(config.mesh, len(devices)), devices=devices)
  spec = config.task.batch_spec(config.batch_size)
  rows = jax.tree.map(lambda _: sharding.batch_sharding(mesh), spec)
  frozen = config.task.frozen(mesh, precision=config.precision, load=False)

  def trace(config):
    program = step.build(config, mesh, steps=config.steps or _SCHEDULE)
    state = _placed(program.abstract, program.shardings)
    return program, step.train_step(program).trace(state, _placed(spec, rows), frozen)

  begin = time.perf_counter()
  try:
    program, traced = trace(config)
    lowered = traced.lower()
  except RuntimeError as e:
    if "cuDNN" not in str(e):
      raise
    raise ValueError(f"{e} Its library is needed: {topology.INSTALL['cuda']}") from e
  lowered_at = time.perf_counter()
  forward = _forward(program, spec)
  held = _held(program, spec, rows)
  if frozen is not None:
    places = jax.tree.map(lambda x: x.sharding, frozen)
    held["frozen"] = sharding.bytes_per_device(frozen, places)
  memory = target.hardware.memory
  compile_begin = time.perf_counter()
  collectives = {}
  try:
    compiled = lowered.compile(compiler_options=target.compiler_options)
  except jax.errors.JaxRuntimeError as e:
    needed = _NEEDED.search(str(e))
    if "RESOURCE_EXHAUSTED" not in str(e) or not needed:
      raise
    # The compiler's figure holds everything, the state included.
    fits = False
    temporary = max(0, int(float(needed[1]) * _UNITS[needed[2]]) - sum(held.values()))
  else:
    found = compiled.memory_analysis()
    arguments = found.argument_size_in_bytes
    held["padding"] = max(0, arguments - sum(held.values()))
    not_in_place = max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    temporary = found.temp_size_in_bytes + not_in_place + found.generated_code_size_in_bytes
    fits = arguments + temporary <= memory
    collectives = hlo.collectives(compiled.as_text() or "")
  compiled_at = time.perf_counter()
  arrays = _arrays(traced.jaxpr)
  coupled = 0.0
  parts = 2 * config.accum
  if not fits and _rows(config) % (parts * mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
    _, again = trace(dataclasses.replace(config, accum=parts))
    coupled = _share_kept(arrays, _arrays(again.jaxpr), state=program.abstract)
  return Report(
    held=held,
    temporary=temporary,
    memory=memory,
    fits=fits,
    model_flops=3 * forward,
    step_flops=flops.count(traced.jaxpr),
    collectives=collectives,
    lower_s=lowered_at - begin,
    compile_s=compiled_at - compile_begin,
    largest={a.str_short(short_dtypes=True): size for a, size in _largest(arrays)},
    coupled=coupled,
  )


def smaller(config: Config, report: Report, *, num_devices: int) -> Iterator[tuple[str, Config]]:
  """Changes that may make the step fit, as (flags, changed config), the cheapest first.

  More recomputation costs operations, accumulation smaller products, strips of logits a second
  computation of them, more fsdp communication; then come all of them together, and last a smaller
  batch, the only one that changes the result. What an estimate from the report rules out is left
  out: accumulation shrinks the activations but for `report.coupled` of them, fsdp state and
  gradients.
  """
  data, fsdp, tensor = config_lib.mesh_sizes(config.mesh, num_devices)
  batch, gradients = report.held["batch"], report.held["parameters"]
  state = sum(report.held.values()) - batch
  activations = max(0, report.temporary - gradients)

  def hopeful(accum=1, wider=1, strips=1, smaller=1):
    left = (1 - report.coupled) / accum + report.coupled / strips
    of_rows = (batch + activations * left) / smaller
    return (state + gradients) / wider + of_rows < report.memory

  levels = config_lib.REMAT[config_lib.REMAT.index(config.remat) + 1 :]
  counts = (2, 4, 8, 16, 32)
  rows = _rows(config) // (data * fsdp)
  parts = [n for n in counts if rows % (n * config.accum) == 0]
  wider = [n for n in counts if data % n == 0]
  now = getattr(config.task, "loss_chunks", None)
  strips = [] if now is None else [n for n in counts if rows % (n * now) == 0]
  changes = [{"remat": level} for level in levels if hopeful(accum=math.inf)]
  changes += [{"accum": config.accum * n} for n in parts if hopeful(accum=n)]
  changes += [{"task.loss_chunks": now * n} for n in strips if hopeful(strips=n)]
  changes += [{"mesh.fsdp": fsdp * n} for n in wider if hopeful(wider=n)]
  more = {"remat": "full"} if levels else {}
  changes += [{**more, "accum": config.accum * n} for n in parts if more and hopeful(accum=n)]
  changes += [
    {**more, "accum": config.accum * n, "task.loss_chunks": now * k}
    for n in parts
    for k in strips
    if hopeful(accum=n, strips=k)
  ]
  changes += [
    {**more, "accum": config.accum * n, "mesh.fsdp": fsdp * w}
    for w in wider
    for n in parts
    if hopeful(accum=n, wider=w)
  ]
  fewer = [n for n in counts if rows % n == 0 and hopeful(smaller=n)]
  changes += [{"batch_size": config.batch_size // n} for n in fewer]
  for change in changes:
    yield (
      " ".join(f"--config.{name}={value}" for name, value in change.items()),
      _changed(config, change, shape=(data, fsdp, tensor)),
    )


def show(report: Report, *, target: topology.Topology, num_devices: int) -> str:
  """The report as a table in plain text."""
  peak = num_devices * target.hardware.peak
  rows = [("memory a device", "")]
  rows += [(f"  {name}", log.human_bytes(size)) for name, size in report.held.items() if size]
  rows += [
    ("  gradients, activations", log.human_bytes(report.temporary)),
    ("  all", f"{log.human_bytes(report.total)} of {log.human_bytes(report.memory)}"),
    ("operations a step", ""),
    ("  model (3 x forward)", _operations(report.model_flops)),
    ("  with recomputation", _operations(report.step_flops)),
    ("  model at peak", f"{report.model_flops / peak:.4g} s ({target.hardware.peak / 1e12:g} "
                        "TFLOP/s a device, bfloat16)"),
    ("collectives a device", "" if report.collectives else "none seen"),
    *((f"  {kind}", f"{c.calls:,} calls, {log.human_bytes(c.num_bytes)}")
      for kind, c in sorted(report.collectives.items())),
    ("compiling", f"{report.lower_s:.1f} s to trace and lower, {report.compile_s:.1f} s to "
                  "compile"),
  ]  # fmt: skip
  lines = [f"{name:26}{value}".rstrip() for name, value in rows]
  verdict = f"{100 * report.total / report.memory:.0f} % of the device's memory"
  lines.append(f"{'FITS' if report.fits else 'DOES NOT FIT'}: {verdict}")
  if not report.fits:
    lines.append("the largest arrays of the step, over all devices:")
    lines += [f"  {log.human_bytes(size):24}{name}" for name, size in report.largest.items()]
  return "\n".join(lines)


def _changed(config, change, *, shape):
  """The config with some fields changed, on the mesh that the devices make now."""
  data, fsdp, tensor = shape
  fields = {k: v for k, v in change.items() if "." not in k}
  wide = change.get("mesh.fsdp", fsdp)
  fields["mesh"] = config_lib.MeshShape(data=data * fsdp // wide, fsdp=wide, tensor=tensor)
  if "task.loss_chunks" in change:
    fields["task"] = dataclasses.replace(config.task, loss_chunks=change["task.loss_chunks"])
  return dataclasses.replace(config, **fields)


def _rows(config):
  """Rows of an update; of several streams the largest number that divides those of each."""
  return math.gcd(*config_lib.stream_sizes(config).values())


def _placed(tree, shardings):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


def _held(program, spec, rows):
  state, places = program.abstract, program.shardings
  rest = (state.rest, state.step, state.bad)
  rest_places = (places.rest, places.step, places.bad)
  return {
    "parameters": sharding.bytes_per_device(state.params, places.params),
    "optimizer": sharding.bytes_per_device(state.opt, places.opt),
    "ema": sharding.bytes_per_device(state.ema, places.ema),
    "other state": sharding.bytes_per_device(rest, rest_places),
    "batch": sharding.bytes_per_device(spec, rows),
  }


def _forward(program, spec):
  """Operations of the loss alone."""

  @program.traced
  def loss(params, rest, batch, key):
    # In one part: accumulation computes nothing twice in the forward pass.
    model = program.model(params, rest)
    return program.config.task.loss(model, batch, rngs=key)["loss"].value

  key = jax.eval_shape(lambda: jax.random.key(0))
  state = program.abstract
  return flops.count(jax.make_jaxpr(loss)(state.params, state.rest, spec, key))


def _arrays(jaxpr):
  """Every array that the equations make, with its bytes over all devices, as often as written."""
  found = []
  pending = [jaxpr.jaxpr]
  while pending:
    for eqn in pending.pop().eqns:
      for value in (v.aval for v in eqn.outvars):
        if hasattr(value, "shape"):
          found.append((value, math.prod(value.shape) * value.dtype.itemsize))
      pending += [
        getattr(sub, "jaxpr", sub) for v in eqn.params.values() for sub in flops.jaxprs(v)
      ]
  return found


def _largest(arrays, num=4):
  return sorted(dict(arrays).items(), key=lambda item: -item[1])[:num]


def _share_kept(arrays, others, *, state):
  """Share of the bytes of `arrays` that are of a shape that `others` have too.

  What has the shape of a parameter is left out: gradients are counted by themselves.
  """
  parameters = {x.shape for x in jax.tree.leaves(state)}
  kept = {value.shape for value, _ in others}
  sizes = [(value.shape in kept, size) for value, size in arrays if value.shape not in parameters]
  return sum(size for keeps, size in sizes if keeps) / max(1, sum(size for _, size in sizes))


def _operations(num):
  """36_010_000_000_000_000 -> "36.01 PFLOP"."""
  power = 0
  while num >= 1000:
    num, power = num / 1000, power + 1
  return f"{num:.4g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}FLOP"


def _suggest(config, report, *, target, devices, tries):
  """Says which change makes it fit: the first of a few that were compiled and did."""
  changes = smaller(config, report, num_devices=len(devices))
  refused = []
  for text, changed in itertools.islice(changes, tries):
    found = analyse(changed, target, devices)
    if found.fits:
      return (
        f"It fits with {text} (compiled: {log.human_bytes(found.total)} of "
        f"{log.human_bytes(found.memory)} a device)"
      )
    refused.append(text)
  untried = next(changes, None)
  if untried:
    return f"It may fit with {untried[0]} (an estimate; --tries={tries + 1} compiles it)"
  tried = f" (compiled without success: {'; '.join(refused)})" if refused else ""
  return f"No remat, accum or mesh.fsdp was found that fits{tried}: take more devices"


def main() -> None:
  """The command."""
  jax.config.update("jax_platforms", "cpu")  # the devices here have no part in it
  config = cli.define_config()
  name = flags.DEFINE_string(
    "topology",
    None,
    "What to compile for: KIND:SHAPE[,slices=N], as v5e:16x16, v5p:4x4x4, v6e:16x16, v4:4x4x4, "
    "tpu7x:4x4x4, h100:8.",
    required=True,
  )
  tries = flags.DEFINE_integer("tries", 3, "Changes to compile at most when it does not fit.")
  output = flags.DEFINE_string("output", None, "JSON file for the figures.")

  def command():
    log.quiet_libraries()
    target = topology.parse(name.value)
    devices = topology.devices(target)
    data, fsdp, tensor = config_lib.mesh_sizes(config.value.mesh, len(devices))
    print(
      f"{config.value.name or 'config'}: batch {config.value.batch_size:,}, remat "
      f"{config.value.remat}, accum {config.value.accum}, for {len(devices)} x "
      f"{devices[0].device_kind} ({name.value}), data {data} x fsdp {fsdp} x tensor {tensor}",
      flush=True,
    )
    report = analyse(config.value, target, devices)
    print(show(report, target=target, num_devices=len(devices)), flush=True)
    if output.value:
      values = {**dataclasses.asdict(report), "total": report.total, "topology": name.value}
      epath.Path(output.value).write_text(json.dumps(values, indent=2) + "\n")
    if not report.fits:
      print(
        _suggest(config.value, report, target=target, devices=devices, tries=tries.value),
        flush=True,
      )
      raise SystemExit(1)

  cli.run(command)


if __name__ == "__main__":
  main()
