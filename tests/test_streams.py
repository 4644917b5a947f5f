"""A task of two named streams: devices, parts, processes and restarts give the same numbers."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import compile_ahead, trees
from ofa_jax.ahead import savings, topology
from ofa_jax.config import Config, MeshShape, mesh_sizes
from ofa_jax.data import pipeline
from ofa_jax.engine import log, overview, sharding, step
from ofa_jax.train import train
from ofa_jax.validation import validate
from tests import two_streams
from tests.test_train import assert_bit_equal, final_state
from tests.two_streams import TwoStreams, get_config

ROOT = Path(__file__).parent.parent


def run(config: Config, *, devices=1, steps=3):
  """Metrics of the first steps and the last parameters, all of it in float64."""
  with jax.enable_x64(True):
    config = dataclasses.replace(config, precision="fp64")
    shape = mesh_sizes(config.mesh, devices)
    mesh = sharding.make_mesh(shape, devices=jax.devices()[:devices])
    program = step.build(config, mesh, steps=10)
    state = step.init(program)
    params = jax.tree.map(lambda x: x.astype(np.float64), state.params)
    state = dataclasses.replace(state, params=params, opt=program.optimizer.init(params))
    update, history = step.train_step(program), []
    with pipeline.train_batches(
      config.task.examples("train"),
      batch_size=config.task.batch_sizes(config.batch_size),
      seed=config.seed,
      start=0,
      bad=pipeline.BadRows(0.0),
    ) as batches:
      for _ in range(steps):
        state, metrics = update(state, sharding.to_global(next(batches), mesh))
        history.append({k: float(v) for k, v in metrics.items() if k != "bad"})
    return history, trees.flatten(jax.device_get(state.params)), update


def assert_equal(found, expected):
  (history, params, _), (straight, expected_params, _) = found, expected
  assert history[0].keys() == {"loss", "pairs_loss", "words_loss", "grad_norm", "lr"}
  for name in history[0]:
    np.testing.assert_allclose(
      [m[name] for m in history], [m[name] for m in straight], rtol=1e-10, err_msg=name
    )
  for path, x in params.items():
    assert x.dtype == np.float64
    np.testing.assert_allclose(x, expected_params[path], rtol=1e-10, atol=1e-12, err_msg=path)


@pytest.fixture(scope="module")
def whole():
  return run(get_config())


@pytest.mark.parametrize("accum", [2, 4])
def test_parts_of_every_stream_add_up_to_the_whole_batch(whole, accum):
  assert_equal(run(dataclasses.replace(get_config(), accum=accum)), whole)


def test_eight_devices_are_one(whole):
  shape = MeshShape(data=2, fsdp=2, tensor=2)
  config = dataclasses.replace(get_config(), mesh=shape, accum=2)
  assert_equal(run(config, devices=8), whole)


def test_the_loss_is_the_sum_of_both_means(whole):
  for metrics in whole[0]:
    both = metrics["pairs_loss"] + metrics["words_loss"] / 2
    np.testing.assert_allclose(metrics["loss"], both, rtol=1e-12)


def test_counts_are_those_of_the_very_draws_of_each_part():
  config = dataclasses.replace(get_config(), accum=4, task=TwoStreams(random_counts=True))
  history, _, _ = run(config)
  np.testing.assert_allclose([m["grad_norm"] for m in history], 1.0, rtol=1e-12)


class Cut(TwoStreams):
  """Texts are cut before the loss, which changes what is counted."""

  def prepare(self, model, batch, *, rngs, step, frozen):
    texts = batch["texts"]
    return {**batch, "texts": {**texts, "length": jnp.minimum(texts["length"], 2)}}


def test_what_is_counted_has_been_prepared(whole):
  config = dataclasses.replace(get_config(), task=Cut())
  expected = run(config)
  assert expected[0][0]["words_loss"] != whole[0][0]["words_loss"]
  assert_equal(run(dataclasses.replace(config, accum=2)), expected)


def test_counting_before_the_gradient_computes_nothing_of_the_model():
  config = dataclasses.replace(get_config(), accum=2)
  program = step.build(config, sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1]), steps=1)
  spec = config.task.batch_spec(config.batch_size)
  text = str(step.train_step(program).trace(program.abstract, spec).jaxpr)
  assert len(re.findall(r"= tanh ", text)) == 2  # one a stream, in the loss alone
  assert len(re.findall(r"= scan\[", text)) == 2  # the counts, then the parts


def test_sizes_that_do_not_fit_are_told_by_stream():
  def faults(task, **changes):
    config = dataclasses.replace(get_config(), task=task, **changes)
    with pytest.raises(ValueError) as e:
      validate(config, devices=4, hosts=2)
    return str(e.value)

  validate(get_config(), devices=4, hosts=2)
  text = faults(TwoStreams(num_texts=6))
  assert "batch size of the stream 'texts': expected a multiple of 4 (data x fsdp devices)" in text
  assert "batch_size:" not in text
  text = faults(TwoStreams(num_texts=12), accum=2)
  assert "accum: expected batch size of the stream 'texts' 12 to be a multiple of accum x" in text
  assert "stream 'texts': expected at least 1, found 0" in faults(TwoStreams(num_texts=0))

  class Reversed(TwoStreams):
    def batch_sizes(self, batch_size):
      return {"texts": 8, "pairs": batch_size}

  assert "expected the main stream first, with batch_size 16, found {'texts': 8" in faults(
    Reversed()
  )

  class Empty(TwoStreams):
    def batch_sizes(self, batch_size):
      return {}

  assert "expected the main stream first, with batch_size 16, found {}" in faults(Empty())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  folder = tmp_path_factory.mktemp("straight")
  train(get_config(), str(folder))
  return folder


def test_a_run_counts_the_epochs_of_its_main_stream_and_goes_on_bit_for_bit(straight, tmp_path):
  lines = (straight / "log.txt").read_text()
  assert "Train Epoch: 3 [16/48" in lines  # of the 40 pairs: three steps each
  assert "Global Batch Size: 16" in lines
  config = get_config()
  train(dataclasses.replace(config, steps=4), str(tmp_path))  # amid an epoch of either stream
  train(config, str(tmp_path))
  assert_bit_equal(final_state(straight), final_state(tmp_path))


def test_the_overview_has_the_rows_of_every_stream():
  config = get_config()
  program = step.build(config, sharding.make_mesh((8, 1, 1)), steps=7)
  named = dict(
    overview.rows(
      program, num_rows={"pairs": 40, "texts": 28}, steps=7, origin="somewhere", workdir="w"
    )
  )
  assert named["data"] == "pairs: 40 rows, batch 16; texts: 28 rows, batch 8"
  assert named["length"].startswith("7 steps, 2.8 epochs; ")
  assert named["weights"] == "somewhere" and named["output"].startswith("w: config.json")


def test_data_of_other_streams_than_the_sizes_is_refused_before_anything_is_built(tmp_path):
  class Lacking(TwoStreams):
    def examples(self, split):
      return {"pairs": two_streams.Pairs()}

  config = dataclasses.replace(get_config(), task=Lacking())
  with pytest.raises(ValueError, match=r"for the streams pairs, texts that .* found streams pairs"):
    train(config, str(tmp_path))
  assert not any(tmp_path.iterdir())


def test_two_processes_are_one(straight, tmp_path):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  command = [sys.executable, "-m", "ofa_jax.train", "--config=tests/two_streams.py"]
  command += [f"--workdir={tmp_path}", "--config.accum=2"]
  where = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": "2",
  }
  both = [
    subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
      env={**os.environ, **where, "JAX_PROCESS_ID": str(i)},
    )
    for i in range(2)
  ]  # fmt: skip
  outputs = [process.communicate(timeout=300)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  one, two = (log.read_metrics(folder) for folder in (straight, tmp_path))
  assert [r["step"] for r in two] == [1, 2, 3, 4, 5, 6, 7]
  for name in ("loss", "pairs_loss", "words_loss", "grad_norm"):
    values = [[r[f"train/{name}"] for r in rows] for rows in (two, one)]
    np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)


def test_compiling_ahead_takes_every_stream_and_suggests_what_divides_each():
  config = dataclasses.replace(get_config(), batch_size=64, task=TwoStreams(num_texts=16), accum=2)
  report = compile_ahead.analyse(config, topology.parse("v5e:2x4"), jax.devices())
  batch = trees.num_bytes(config.task.batch_spec(64))
  assert report.fits and report.held["batch"] == batch // 8
  config = dataclasses.replace(config, accum=1)
  large = dataclasses.replace(report, temporary=report.memory * 3 // 2, fits=False)
  shape = mesh_sizes(config.mesh, 8)
  changes = [
    savings.changed(config, change, shape=shape)
    for change in savings.changes(config, large, num_devices=8)
  ]
  assert any(changed.accum == 2 for changed in changes)
  for changed in changes:
    validate(changed, devices=8)
