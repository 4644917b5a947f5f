"""Runs as users start them: killed at any moment, and on several processes."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ofa_jax.data import pipeline
from ofa_jax.engine import lock, log, processes
from ofa_jax.train import train
from tests import tiny
from tests.compiling import QUICK
from tests.test_train import assert_bit_equal, final_state

ROOT = Path(__file__).parent.parent
SMALL = (
  "--config.batch_size=16",
  "--config.steps=60",
  "--config.log_every=5",
  "--config.save_every=10",
)
MODEL = {
  "digits": (
    "--config.model.vision.layers=1",
    "--config.model.text.layers=1",
    "--config.model.text.width=32",
  ),
  "ofa": ("--config.model.width=32", "--config.model.mlp=64", "--config.task.image_size=32"),
}


def start(digits, workdir, *overrides, config="digits", quick=True, **environment):
  """The training command on the quickstart's config, made small, or on another file's.

  Not `quick`, it compiles as for users; each process of a job compiles for itself.
  """
  small = (*SMALL, *MODEL[config]) if config in MODEL else ()
  config = f"configs/quickstart.py:{config}" if config in MODEL else config
  command = [sys.executable, "-m", "ofa_jax.train", f"--config={config}", f"--workdir={workdir}"]
  return subprocess.Popen(
    [*command, *small, *overrides],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    env={
      **os.environ,
      **(QUICK if quick else {"JAX_PLATFORMS": "cpu"}),
      "OFA_JAX_DATA": str(digits.parent),
      **environment,
    },
  )  # fmt: skip


def start_cluster(digits, workdir, *overrides, port, num, config="digits"):
  """The command on several processes of one job."""
  return [
    start(
      digits,
      workdir,
      *overrides,
      config=config,
      JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
      JAX_NUM_PROCESSES=str(num),
      JAX_PROCESS_ID=str(i),
    )
    for i in range(num)
  ]


def finish(process):
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  return output


def kill_at(process, text, *, delay=0.0):
  """Kills the process as it prints a line; False when it ended before."""
  for line in process.stdout:
    if text in line:
      time.sleep(delay)
      process.send_signal(signal.SIGKILL)
      process.wait()
      return process.returncode == -signal.SIGKILL
  process.wait()
  return False


@pytest.fixture(scope="module")
def straight(digits, tmp_path_factory):
  """The workdir of a run that nothing stopped."""
  workdir = tmp_path_factory.mktemp("straight")
  finish(start(digits, workdir, "--config.evals=()"))
  return workdir


# As users compile, five starts take a minute; in one process `test_train.py` does it with both.
@pytest.mark.parametrize(
  ("config", "quick"),
  [
    ("digits", True),
    pytest.param("digits", False, marks=pytest.mark.slow),
    pytest.param("ofa", False, marks=pytest.mark.slow),
  ],
)
def test_killed_runs_end_with_the_very_parameters_of_a_straight_one(
  digits, straight, tmp_path, config, quick
):
  def begin(folder):
    return start(digits, folder, "--config.evals=()", config=config, quick=quick)

  killed = tmp_path / "killed"
  if not quick:
    straight = tmp_path / "straight"
    finish(begin(straight))
  # In the moment a save begins, then at a random one after compiling, then again with a save.
  assert kill_at(begin(killed), "Saving checkpoint at step 20")
  delay = random.uniform(0.0, 0.5)
  kill_at(begin(killed), "Compiled", delay=delay)
  if not quick:
    kill_at(begin(killed), "Saving checkpoint at step 50")
  output = finish(begin(killed))
  assert "resumed from this workdir at step" in output, f"delay {delay}"
  assert_bit_equal(final_state(straight), final_state(killed))
  losses = [[r["train/loss"] for r in log.read_metrics(f)] for f in (straight, killed)]
  assert losses[0] == losses[1]


@pytest.fixture
def port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def test_two_processes_are_one(digits, tmp_path, port):
  first_five = ("--config.steps=5", "--config.log_every=1", "--config.precision=fp64")
  finish(start(digits, tmp_path / "one", *first_five))
  both = start_cluster(digits, tmp_path / "two", *first_five, port=port, num=2)
  outputs = [finish(p) for p in both]
  assert "on 2 host(s)" in outputs[0]
  assert "Global Steps" in outputs[0] and "Global Steps" not in outputs[1]
  one, two = (log.read_metrics(tmp_path / d) for d in ("one", "two"))
  assert one[-1].keys() == two[-1].keys() >= {"step", "valid/t2i_r1", "valid/zeroshot_top1"}
  assert one[-1] == two[-1]
  one, two = one[:5], two[:5]
  for name in ("train/loss", "train/grad_norm"):
    np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=1e-9)


@pytest.mark.slow  # three processes compile an OFA's steps: minutes
def test_two_processes_sample_what_one_does(shapes, tmp_path, port):
  sampled = (
    "--config.steps=2", "--config.log_every=1", "--config.precision=fp64",
    "--config.task.search.sample=True", "--config.task.search.num_beams=1", "--config.task.page=0",
  )  # fmt: skip
  finish(start(shapes, tmp_path / "one", *sampled, config="ofa"))
  both = start_cluster(shapes, tmp_path / "two", *sampled, port=port, num=2, config="ofa")
  for process in both:
    finish(process)
  one, two = (
    (tmp_path / d / "results" / "valid_predict.json").read_bytes() for d in ("one", "two")
  )
  assert one == two
  assert len({row["caption"] for row in json.loads(one)}) > 20  # of 80, of few scenes


def wait_for(process, text):
  """Reads a process's output until a line holds the text; returns what was read."""
  seen = ""
  for line in process.stdout:
    seen += line
    if text in line:
      return seen
  raise AssertionError(f"{text!r} was never printed:\n{seen}")


def told_at(output):
  return int(re.search(r"Told to stop: saved step (\d+)", output)[1])


def test_sigterm_saves_the_step_and_the_restart_is_bit_equal(digits, straight, tmp_path):
  alone = ("--config.evals=()", "--config.save_every=1000")
  process = start(digits, tmp_path / "told", *alone)
  wait_for(process, "Global Steps: 10/")
  process.send_signal(signal.SIGTERM)
  step = told_at(finish(process))  # and the exit status is 0
  assert 10 <= step < 60
  assert [p.name for p in (tmp_path / "told" / "checkpoints").iterdir()] == [str(step)]
  output = finish(start(digits, tmp_path / "told", *alone))
  assert f"resumed from this workdir at step {step}" in output
  assert_bit_equal(final_state(straight), final_state(tmp_path / "told"))


def test_sigterm_to_one_process_stops_all_at_the_same_step(digits, tmp_path, port):
  endless = ("--config.evals=()", "--config.save_every=1000000", "--config.steps=1000000")
  both = start_cluster(digits, tmp_path, *endless, port=port, num=2)
  wait_for(both[0], "Global Steps: 10/")
  both[1].send_signal(signal.SIGTERM)
  step = told_at(finish(both[0]))
  finish(both[1])
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [str(step)]


@pytest.mark.parametrize(
  ("place", "process"),
  [
    ("data", 1),
    # Two starts each, and the same way out as the first.
    pytest.param("score", 0, marks=pytest.mark.slow),
    pytest.param("evaluate", 1, marks=pytest.mark.slow),
    pytest.param("save", 1, marks=pytest.mark.slow),
    pytest.param("save", 0, marks=pytest.mark.slow),
  ],
)
def test_an_error_of_one_process_ends_both_with_its_message(digits, tmp_path, port, place, process):
  both = start_cluster(
    digits, tmp_path, config=f"tests/failing.py:{place},{process}", port=port, num=2
  )
  outputs = [None, None]
  outputs[process], _ = both[process].communicate(timeout=300)
  ended = time.monotonic()
  outputs[1 - process], _ = both[1 - process].communicate(timeout=60)
  assert time.monotonic() - ended < 30
  assert [p.returncode for p in both] == [1, 1], outputs
  expected = "No space left on device" if place == "save" else "TypeError: the wheel has come off"
  for output in outputs:
    last = output[output.rindex("error: ") :]
    assert last.startswith(f"error: process {process} of 2: ") and expected in last
  shown = ["Traceback" in output for output in outputs]
  assert shown == [place != "save" and i == process for i in range(2)]
  assert expected in (tmp_path / "log.txt").read_text()


# Two starts; in one process tests/test_stopping.py leaves an evaluation, and the test before last
# shows that processes stop at the same step.
@pytest.mark.slow
def test_an_evaluation_of_several_processes_is_left_at_the_same_batch(digits, tmp_path, port):
  both = start_cluster(digits, tmp_path, config="tests/failing.py:slow,0", port=port, num=2)
  wait_for(both[0], "Global Steps: 2/")
  time.sleep(1)
  both[1].send_signal(signal.SIGINT)
  told = time.monotonic()
  assert told_at(finish(both[0])) == 2
  finish(both[1])
  assert time.monotonic() - told < 60  # the evaluation takes longer
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_second_run_in_a_workdir_is_refused_and_the_first_goes_on(digits, tmp_path):
  first = start(digits, tmp_path, "--config.evals=()", "--config.steps=100000")
  wait_for(first, "Global Steps: 10/")
  with pytest.raises(lock.HeldError, match=f"found process {first.pid} on"):
    train(tiny.config(digits), str(tmp_path))
  first.send_signal(signal.SIGTERM)
  told_at(finish(first))
  assert not (tmp_path / "in-use.json").exists()


class Ids:
  """Rows that are only their number."""

  notes = ()

  def __init__(self, num):
    self.num = num

  def __len__(self):
    return self.num

  def blank(self):
    return {"id": np.zeros((), np.int64)}

  def example(self, i, rng):
    return {"id": np.int64(i)}


def ids(num, *, start, stop, hosts):
  """Rows that the hosts together read in the steps from `start` to `stop`."""
  found = []
  for host in range(hosts):
    bad = pipeline.BadRows(max_rate=0.0)
    with pipeline.train_batches(
      Ids(num), batch_size=16, seed=0, start=start, host=host, hosts=hosts, bad=bad
    ) as batches:
      found += [i for _ in range(start, stop) for i in next(batches)["id"].tolist()]
  return found


# Six processes compile, each for itself; of two the one that is left does as the three do.
@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_a_killed_process_stops_the_others_and_fewer_go_on_without_losing_a_row(
  digits, tmp_path, port, before, after
):
  alone = (
    *("--config.steps=16", "--config.save_every=4", "--config.log_every=1"),
    *("--config.evals=()", "--config.precision=fp64"),
  )
  finish(start(digits, tmp_path / "straight", *alone))
  limited, workdir = (*alone, "--config.step_timeout=5"), tmp_path / "fewer"
  cluster = start_cluster(digits, workdir, *limited, port=port, num=before)
  wait_for(cluster[0], "Global Steps: 11/")
  cluster[-1].kill()
  killed = time.monotonic()
  for process in cluster[:-1]:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == processes.AGAIN
    assert "another process" in output and "Thread 0x" in output and "train.py" in output, output
  assert time.monotonic() - killed < 30
  assert "another process" in (workdir / "log.txt").read_text()

  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  if after == 1:
    cluster = [start(digits, workdir, *limited)]
  else:
    cluster = start_cluster(digits, workdir, *limited, port=port, num=after)
  output, *_ = [finish(process) for process in cluster]
  step = int(re.search(r"resumed from this workdir at step (\d+)", output)[1])
  assert step in (4, 8)
  # All of them until the kill and the fewer from the checkpoint on: every row of an epoch once ...
  num = 16 * 16
  rows = ids(num, start=0, stop=step, hosts=before) + ids(num, start=step, stop=16, hosts=after)
  assert sorted(rows) == list(range(num))
  # ... and the very losses of one process that was never stopped.
  straight, fewer = (log.read_metrics(folder) for folder in (tmp_path / "straight", workdir))
  assert [r["step"] for r in fewer] == [r["step"] for r in straight] == list(range(1, 17))
  np.testing.assert_allclose(
    [r["train/loss"] for r in fewer], [r["train/loss"] for r in straight], rtol=1e-9
  )
