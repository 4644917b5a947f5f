"""The report on a train step that is compiled for other devices, without data."""

import dataclasses
import functools
import json
import os
import signal
import sys

import jax
import pytest

from ofa_jax import compile_ahead, hub, trees
from ofa_jax.ahead import cost, savings, topology
from ofa_jax.config import MeshShape, mesh_sizes
from ofa_jax.engine import sharding, step
from ofa_jax.models.abstract import abstract
from tests import tiny
from tests.test_processes import ROOT

V5E = topology.parse("v5e:2x4")


@pytest.fixture(scope="module")
def config(digits):
  """A small config whose data must not be read."""
  config = tiny.config(digits)

  def refuse(*_):
    raise AssertionError("data was read")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(type(config.task), "examples", refuse)
    yield dataclasses.replace(config, mesh=MeshShape(data=2, fsdp=4), ema=0.9)


@pytest.fixture(scope="module")
def report(config):
  """Of the eight CPU devices, taken for TPUs."""
  return compile_ahead.analyse(config, V5E, jax.devices())


@pytest.mark.parametrize(
  ("text", "expected"),
  (
    ("v5e:16x16", topology.Topology(kind="v5e", shape=(16, 16))),
    ("v5p:4x4x4,slices=2", topology.Topology(kind="v5p", shape=(4, 4, 4), slices=2)),
    ("h100:8", topology.Topology(kind="h100", shape=(8,))),
  ),
)
def test_topologies(text, expected):
  assert topology.parse(text) == expected


@pytest.mark.parametrize(
  ("text", "fault"),
  (
    ("v7x:2x2", "KIND one of v4, v5e"),
    ("v5e", "KIND:SHAPE"),
    ("v5e:4x4x4", "2 positive axes"),
    ("v5p:0x4x4", "3 positive axes"),
    ("h100:8,slices=2", "slices are of TPUs"),
  ),
)
def test_faulty_topologies(text, fault):
  with pytest.raises(ValueError, match=fault):
    topology.parse(text)


def test_a_missing_compiler_is_told_with_its_installation(monkeypatch):
  from jax.experimental import topologies

  def missing(**_):
    raise RuntimeError("no libtpu.so")

  monkeypatch.setattr(topologies, "get_topology_desc", missing)
  with pytest.raises(ValueError, match=r"no libtpu.so.*pip install"):
    topology.devices(V5E)


def test_a_missing_cudnn_is_told_with_its_installation(config, monkeypatch):
  def missing(*_, **__):
    raise RuntimeError("cuDNN not found.")

  monkeypatch.setattr(type(config.task), "loss", missing)
  with pytest.raises(ValueError, match=r"cuDNN not found\. .*pip install"):
    compile_ahead.analyse(config, V5E, jax.devices())


def test_memory_is_that_of_the_state(config, report):
  mesh = sharding.make_mesh((2, 4, 1))
  program = step.build(config, mesh, steps=10)
  params = sharding.bytes_per_device(program.abstract.params, program.shardings.params)
  assert report.held["parameters"] == report.held["ema"] == params
  assert 2 * params <= report.held["optimizer"] <= 2 * params + 8
  batch = trees.num_bytes(config.task.batch_spec(config.batch_size))
  assert report.held["batch"] == batch // 8
  assert report.temporary > 0 and report.fits
  assert report.total == sum(report.held.values()) + report.temporary
  assert report.collectives and all(c.calls and c.num_bytes for c in report.collectives.values())


def test_recomputation_and_accumulation_show_in_the_operations(config, report):
  # Patches and tokens need no gradient, so that a step is a little less than 3 x forward.
  assert 0.9 * report.model_flops < report.step_flops <= report.model_flops
  again = compile_ahead.analyse(dataclasses.replace(config, remat="full"), V5E, jax.devices())
  assert again.model_flops == report.model_flops
  assert 1.1 * report.step_flops < again.step_flops < 1.34 * report.step_flops
  parts = compile_ahead.analyse(dataclasses.replace(config, accum=2), V5E, jax.devices())
  assert parts.model_flops == report.model_flops


def labelled(config, report):
  """(flags, changed config) of every change that may make a step fit."""
  shape = mesh_sizes(config.mesh, 8)
  for change in savings.changes(config, report, num_devices=8):
    yield savings.flags(change), savings.changed(config, change, shape=shape)


def test_changes_come_cheapest_first_and_hopeless_ones_not_at_all(config, report):
  gib = topology.GIB
  held = {"parameters": gib, "optimizer": 2 * gib, "batch": gib}
  full = dataclasses.replace(report, held=held, temporary=41 * gib, memory=16 * gib, fits=False)
  changes = [text for text, _ in labelled(config, full)]
  assert changes[:3] == ["--config.remat=dots", "--config.remat=full", "--config.accum=4"]
  assert changes[-1] == "--config.batch_size=8"  # what changes the result comes last
  # Logits of the whole batch do not shrink with accumulation, but in strips.
  logits = dataclasses.replace(full, temporary=31 * gib, coupled=0.9)
  changes = [text for text, _ in labelled(config, logits)]
  assert changes[0] == "--config.task.loss_chunks=4" and not any(
    text.startswith("--config.accum") and "loss_chunks" not in text for text in changes
  )
  text, changed = next(c for c in labelled(config, full) if "fsdp" in c[0])
  assert changed.mesh == MeshShape(data=1, fsdp=8) and "--config.mesh.fsdp=8" in text
  # A state that does not fit by itself: nothing that leaves it where it is.
  heavy = {"parameters": 6 * gib, "optimizer": 12 * gib, "batch": gib}
  full = dataclasses.replace(full, held=heavy, temporary=10 * gib)
  changes = [text for text, _ in labelled(config, full)]
  assert changes and all("fsdp=8" in text for text in changes)


def test_what_does_not_fit_is_refused_with_a_change_that_does(config, report, monkeypatch):
  whole = report
  less = compile_ahead.analyse(dataclasses.replace(config, remat="full"), V5E, jax.devices())
  assert less.total < whole.total
  hardware = dataclasses.replace(V5E.hardware, memory=(whole.total + less.total) // 2)
  monkeypatch.setitem(topology.KINDS, "v5e", hardware)
  refused = compile_ahead.analyse(config, V5E, jax.devices())
  assert not refused.fits
  text = compile_ahead.show(refused, target=V5E, num_devices=8)
  assert "DOES NOT FIT" in text
  assert "f32[2,32,12,64]" in text  # layers, batch, tokens, MLP: what remat does away with

  def compiled(change):
    changed = savings.changed(config, change, shape=(2, 4, 1))
    return compile_ahead.analyse(changed, V5E, jax.devices())

  suggest = functools.partial(compile_ahead._suggest, config, refused, num_devices=8)
  text = suggest(compiled=compiled, tries=3)
  assert text.startswith("It fits with --config.remat=") and "(compiled:" in text
  assert "an estimate" in suggest(compiled=compiled, tries=0)


def test_a_crash_is_no_verdict_and_the_next_change_is_tried(config, report):
  gib = topology.GIB
  held = {"parameters": gib, "optimizer": 2 * gib, "batch": gib}
  full = dataclasses.replace(report, held=held, temporary=41 * gib, memory=16 * gib, fits=False)

  def compiled(change):
    if change["remat"] == "dots":
      raise compile_ahead.CompilerCrashError("signal 11")
    return dataclasses.replace(full, fits=False)

  text = compile_ahead._suggest(config, full, num_devices=8, compiled=compiled, tries=2)
  assert text.startswith("It may fit with --config.accum=4")


def end(argv, change):
  """What the TPU's compiler does at some programs."""
  print("LLVM said something\nSTACK OVERFLOW in MakeConvWindows", file=sys.stderr, flush=True)
  os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_of_the_compiler_is_told_as_one(monkeypatch):
  monkeypatch.setattr(compile_ahead, "_analyse_there", end)
  with pytest.raises(compile_ahead.CompilerCrashError) as error:
    compile_ahead._compile(["compile_ahead"], {"accum": 2})
  text = str(error.value)
  assert text.startswith("The compiler crashed: signal 11 (SIGSEGV) ended it")
  assert "STACK OVERFLOW in MakeConvWindows" in text and "--config.remat" in text


def test_what_the_compiler_predicts_is_shown_as_a_prediction(config, report):
  assert report.cost is None and report.prediction is None  # CPUs' compiler estimates no times
  assert "none: this compiler estimates no times" in show(report)
  estimate = cost.Cost(
    cycles=3_000_000,
    parts={"linear": 0.75, "norm": 0.2499, "other": 0.0001},
    passes={"forward": 0.4, "backward": 0.6},
    operations={"checkpoint/dot_general": 0.5},
    without=3,
  )
  prediction = cost.predict(estimate, clock=1.5e9, peak=1e12, rows=8, model_flops=5 * 10**8)
  text = show(dataclasses.replace(report, cost=estimate, prediction=prediction))
  for line in (
    "predicted by the compiler not measured",
    "  a step                  0.002 s (3e+06 cycles)",
    "  rows a device           4000 a second",
    "  share of peak           25%",
    "  by part                 linear 75%, norm 25%\n",
    "  operations that lead    checkpoint/dot_general 50%",
    "  without an estimate     3 calls",
  ):
    assert line in text, text
  text = show(dataclasses.replace(report, cost=estimate, prediction=None))
  assert "3e+06; the clock is not published" in text


def show(report):
  return compile_ahead.show(report, target=V5E, num_devices=8)


def test_logits_that_are_too_large_are_cut_into_strips(config, monkeypatch):
  """The whole batch's logits are most of this step."""
  config = dataclasses.replace(config, batch_size=4096)
  whole = compile_ahead.analyse(config, V5E, jax.devices())
  assert whole.coupled == 0 and whole.fits
  hardware = dataclasses.replace(V5E.hardware, memory=whole.total * 9 // 10)
  monkeypatch.setitem(topology.KINDS, "v5e", hardware)
  refused = compile_ahead.analyse(config, V5E, jax.devices())
  assert not refused.fits and 0.5 < refused.coupled < 1
  changes = dict(labelled(config, refused))
  found = compile_ahead.analyse(changes["--config.task.loss_chunks=32"], V5E, jax.devices())
  assert found.fits


def test_published_peaks_are_found_by_the_names_that_devices_have():
  pytest.importorskip("libtpu")
  for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
    target = topology.parse(name)
    kind = topology.devices(target)[0].device_kind
    assert topology.peak(kind) == target.hardware.peak
  assert topology.peak("cpu") is None


@pytest.mark.slow  # the TPU's compiler takes half a minute
def test_the_command_for_a_tpu(digits, tmp_path):
  pytest.importorskip("libtpu")
  import subprocess

  output = tmp_path / "report.json"
  result = subprocess.run(
    [sys.executable, "-m", "ofa_jax.compile_ahead", "--config=configs/quickstart.py",
     "--topology=v5e:2x2,slices=2", f"--output={output}"],
    cwd=ROOT,
    env={**os.environ, "OFA_JAX_DATA": str(digits.parent)},
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert result.returncode == 0, result.stdout + result.stderr
  assert "8 x TPU v5 lite" in result.stdout and "FITS" in result.stdout
  assert "share of peak" in result.stdout and "linear" in result.stdout
  found = json.loads(output.read_text())
  assert found["fits"] and 0 < found["prediction"]["share_of_peak"] < 1
  assert sum(found["cost"]["parts"].values()) == pytest.approx(1)


def test_a_teacher_is_compiled_and_held(config, tmp_path):
  params, rest = (
    jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), tree)
    for tree in abstract(config.model)[1:]
  )
  hub.save_directory(tmp_path / "teacher", config.model, params, rest)
  task = dataclasses.replace(config.task, teacher=str(tmp_path / "teacher"))
  report = compile_ahead.analyse(dataclasses.replace(config, task=task), V5E, jax.devices())
  assert report.held["frozen"] == trees.num_bytes(params)  # whole on every device
