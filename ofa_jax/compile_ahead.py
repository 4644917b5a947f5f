r"""Compiles a config's train step for devices that are not there, and says whether it fits.

  python -m ofa_jax.compile_ahead --config=configs/cnclip_vith14.py:pod --topology=v5e:16x16
  python -m ofa_jax.compile_ahead --config=... --topology=v5e:16x16,slices=2   # two TPU slices
  python -m ofa_jax.compile_ahead --config=... --topology=h100:8 --config.mesh.fsdp=8

It is the step that training runs, compiled by the compiler of those devices: memory per device by
kind, operations, collectives, and for TPUs the compiler's prediction of the step's time. No data is
read and no device is needed; TPUs need libtpu, GPUs JAX's CUDA plugin (the error says how to
install them). The exit status is 1 when the step does not fit, and the smallest change that makes
it fit is compiled too; and when the compiler crashes, which is told as such: it runs in a process
of its own.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import sys
import time

import jax
from absl import flags

from ofa_jax import cli, files, host_calls, numerics, validation
from ofa_jax import config as config_lib
from ofa_jax.ahead import apart, cost, flops, hlo, rental, savings, stopping, topology
from ofa_jax.config import Config
from ofa_jax.engine import log, sharding, step

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
    cost: the compiler's estimate of the step's time; None where it makes none, as for GPUs.
    prediction: the same in seconds, rows and a share of peak; None where there is none or the
      device's clock is not known.
    largest: the largest intermediate arrays of the step before it is compiled, with their bytes
      over all devices; the compiler may never make one of them whole.
    save: the bytes of a checkpoint, and who writes them.
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
  cost: cost.Cost | None
  prediction: cost.Prediction | None
  lower_s: float
  compile_s: float
  largest: dict[str, int]
  save: stopping.Save
  coupled: float

  @property
  def total(self) -> int:
    return sum(self.held.values()) + self.temporary


@host_calls.left_out()
def analyse(config: Config, target: topology.Topology, devices: list[jax.Device]) -> Report:
  """Compiles the config's train step for the devices; calls of the host are left out.

  Args:
    config: as for training; `task.batch_spec` stands for the data.
    target: what the devices are.
    devices: from `topology.devices`.

  Raises:
    ValueError: the config cannot run on so many devices and hosts, or cuDNN is not installed.
  """
  hosts = len({d.process_index for d in devices})
  validation.validate(config, devices=len(devices), hosts=hosts)
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
  forward = _forward(program, spec, frozen)
  held = _held(program, spec, rows)
  if frozen is not None:
    places = jax.tree.map(lambda x: x.sharding, frozen)
    held["frozen"] = sharding.bytes_per_device(frozen, places)
  memory = target.hardware.memory
  compile_begin = time.perf_counter()
  collectives, estimated = {}, None
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
    sizes = compiled.memory_analysis()
    arguments = sizes.argument_size_in_bytes
    held["padding"] = max(0, arguments - sum(held.values()))
    not_in_place = max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes)
    temporary = sizes.temp_size_in_bytes + not_in_place + sizes.generated_code_size_in_bytes
    fits = arguments + temporary <= memory
    text = compiled.as_text() or ""
    collectives, estimated = hlo.collectives(text), cost.estimate(text)
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
    cost=estimated,
    prediction=cost.predict(
      estimated,
      clock=target.hardware.clock,
      peak=target.hardware.peak,
      rows=config.batch_size / len(devices),
      model_flops=3 * forward / len(devices),
    ),
    lower_s=lowered_at - begin,
    compile_s=compiled_at - compile_begin,
    largest={a.str_short(short_dtypes=True): size for a, size in _largest(arrays)},
    save=stopping.of_state(program.abstract, program.shardings),
    coupled=coupled,
  )


def show(
  report: Report,
  *,
  target: topology.Topology,
  num_devices: int,
  steps: int | None = None,
  price: float | None = None,
) -> str:
  """The report as a table in plain text; the run's steps and a chip-hour's dollars if known."""
  peak = num_devices * target.hardware.peak
  rented = rental.rows(
    report.save,
    seconds=report.prediction.seconds if report.prediction else report.model_flops / peak,
    bound=report.prediction is None,
    steps=steps,
    chips=num_devices / target.hardware.devices_a_chip,
    price=price,
  )
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
    *_predicted(report),
    *rented,
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


def _predicted(report):
  """Rows of the table with what the compiler predicts of the time."""
  if report.cost is None:
    why = "" if report.fits else "nothing was compiled"
    return [("predicted time", why or "none: this compiler estimates no times")]
  prediction, rows = (
    report.prediction,
    [("predicted by the compiler", "not measured; what waits between devices is left out")],
  )
  if prediction is None:
    rows += [("  cycles a step", f"{report.cost.cycles:.4g}; the clock is not published")]
  else:
    rows += [
      ("  a step", f"{prediction.seconds:.4g} s ({report.cost.cycles:.4g} cycles)"),
      ("  rows a device", f"{prediction.rows_per_second:.4g} a second"),
      ("  share of peak", f"{prediction.share_of_peak:.0%} of bfloat16, of the model's operations"),
    ]
  named = (
    ("  by part", "parts"),
    ("  by pass", "passes"),
    ("  operations that lead", "operations"),
  )
  for title, field in named:
    shares = [f"{name} {share:.0%}" for name, share in getattr(report.cost, field).items()]
    rows += [(title, ", ".join(s for s in shares if not s.endswith(" 0%")))]
  if report.cost.without:
    rows += [("  without an estimate", f"{report.cost.without:,} calls of kernels")]
  return rows


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
  averages, average_places = ((x.ema, x.ema_rest) for x in (state, places))
  return {
    "parameters": sharding.bytes_per_device(state.params, places.params),
    "optimizer": sharding.bytes_per_device(state.opt, places.opt),
    "ema": sharding.bytes_per_device(averages, average_places),
    "other state": sharding.bytes_per_device(rest, rest_places),
    "batch": sharding.bytes_per_device(spec, rows),
  }


def _forward(program, spec, frozen):
  """Operations of the loss alone, of a batch that the task has prepared."""
  task, state = program.config.task, program.abstract
  key = jax.eval_shape(lambda: jax.random.key(0))

  @program.traced
  def prepare(params, rest, batch, key, step, frozen):
    model = program.model(params, rest)
    return task.prepare(model, batch, rngs=key, step=step, frozen=frozen)

  @program.traced
  def loss(params, rest, batch, key):
    # In one part: accumulation computes nothing twice in the forward pass.
    return task.loss(program.model(params, rest), batch, rngs=key)["loss"].value

  if task.prepare is not None:
    spec = jax.eval_shape(prepare, state.params, state.rest, spec, key, state.step, frozen)
  return flops.count(jax.make_jaxpr(loss)(state.params, state.rest, spec, key))


def _arrays(jaxpr):
  """Every array that the equations make, with its bytes over all devices, as often as written."""
  arrays = []
  pending = [jaxpr.jaxpr]
  while pending:
    for eqn in pending.pop().eqns:
      for value in (v.aval for v in eqn.outvars):
        if hasattr(value, "shape"):
          arrays.append((value, math.prod(value.shape) * value.dtype.itemsize))
      pending += [
        getattr(sub, "jaxpr", sub) for v in eqn.params.values() for sub in flops.jaxprs(v)
      ]
  return arrays


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


def _suggest(config, report, *, num_devices, compiled, tries):
  """Says which change makes it fit: the first of a few that were compiled and did."""
  left = savings.changes(config, report, num_devices=num_devices)
  refused = []
  for change in itertools.islice(left, tries):
    text = savings.flags(change)
    try:
      other = compiled(change)
    except CompilerCrashError:
      refused.append(f"{text}, at which the compiler crashed")
      continue
    if other.fits:
      return (
        f"It fits with {text} (compiled: {log.human_bytes(other.total)} of "
        f"{log.human_bytes(other.memory)} a device)"
      )
    refused.append(text)
  untried = next(left, None)
  if untried:
    return (
      f"It may fit with {savings.flags(untried)} (an estimate; --tries={tries + 1} compiles it)"
    )
  tried = f" (compiled without success: {'; '.join(refused)})" if refused else ""
  return f"No remat, accum or mesh.fsdp was found that fits{tried}: take more devices"


class CompilerCrashError(ValueError):
  """The compiler ended its process, which says nothing of whether the step would fit."""


def _compile(argv, change):
  """`analyse` of the command's config with a change, in a process of its own."""
  try:
    return apart.call(_analyse_there, argv, dict(change))
  except apart.ProcessEndedError as e:
    raise CompilerCrashError(
      f"The compiler crashed: {e}\nThat is a fault of the compiler and says nothing of the memory. "
      "Another --config.remat, --config.accum, --config.batch_size or number of devices is "
      "another program; in training the same crash would end the job at its first step."
    ) from e


def _analyse_there(argv, change):
  """In a process of its own, which has to read the command line again: a config need not pickle."""
  _quiet_cpu()
  config, name, *_ = _define_flags()
  flags.FLAGS(argv)
  numerics.enable(config.value.precision)
  target = topology.parse(name.value)
  devices = topology.devices(target)
  result = config.value
  if change:
    shape = config_lib.mesh_sizes(result.mesh, len(devices))
    result = savings.changed(result, change, shape=shape)
  return analyse(result, target, devices)


def _quiet_cpu():
  jax.config.update("jax_platforms", "cpu")  # the devices here have no part in it
  log.quiet_libraries()


def _define_flags():
  config = cli.define_config()
  name = flags.DEFINE_string(
    "topology",
    None,
    "What to compile for: KIND:SHAPE[,slices=N], as v5e:16x16, v5p:4x4x4, v6e:16x16, v4:4x4x4, "
    "tpu7x:4x4x4, h100:8.",
    required=True,
  )
  tries = flags.DEFINE_integer("tries", 3, "Changes to compile at most when it does not fit.")
  output = cli.define_path("output", "JSON file for the figures.")
  price = flags.DEFINE_float("price", None, "Dollars for a chip and hour: the cost is printed.")
  return config, name, tries, output, price


def main() -> None:
  """The command."""
  _quiet_cpu()
  argv = list(sys.argv)
  config, name, tries, output, price = _define_flags()

  def command():
    with contextlib.ExitStack() as held:
      if output.value is not None:
        held.enter_context(cli.sole_writer(output.value, makes_parents=False))
      work()

  def work():
    target = topology.parse(name.value)
    devices = topology.devices(target)
    data, fsdp, tensor = config_lib.mesh_sizes(config.value.mesh, len(devices))
    print(
      f"{config.value.name or 'config'}: batch {config.value.batch_size:,}, remat "
      f"{config.value.remat}, accum {config.value.accum}, for {len(devices)} x "
      f"{devices[0].device_kind} ({name.value}), data {data} x fsdp {fsdp} x tensor {tensor}",
      flush=True,
    )
    report = _compile(argv, {})
    of_run = {"steps": config.value.steps, "price": price.value}
    print(show(report, target=target, num_devices=len(devices), **of_run), flush=True)
    if output.value:
      values = {**dataclasses.asdict(report), "total": report.total, "topology": name.value}
      files.write_text(output.value, json.dumps(values, indent=2) + "\n")
    if not report.fits:
      compiled = functools.partial(_compile, argv)
      text = _suggest(
        config.value, report, num_devices=len(devices), compiled=compiled, tries=tries.value
      )
      print(text, flush=True)
      raise SystemExit(1)

  cli.run(command)


if __name__ == "__main__":
  main()
