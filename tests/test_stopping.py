"""Told to stop at any moment, a run saves, and goes on as if nothing had been."""

import dataclasses
import os
import random
import signal
import threading
import time

import pytest

from ofa_jax import evaluate
from ofa_jax.config import Eval
from ofa_jax.engine import log, processes, watchdog
from ofa_jax.train import train
from tests import tiny
from tests.failing import Failing, Rows
from tests.test_train import assert_bit_equal, final_state

pytestmark = pytest.mark.usefixtures("two_devices")
TIMES = {"train/data_time", "train/batch_time", "train/rows_per_s"}


@pytest.fixture(autouse=True)
def nothing_ends_this_process(monkeypatch):
  """As a process of its own would, where a signal comes amid a compilation of seconds."""
  monkeypatch.setattr(watchdog, "GRACE", 3600)


@pytest.fixture(scope="module")
def config(digits):
  """A run of 12 steps, with an evaluation every fourth."""
  base = tiny.config(digits)
  values = {f.name: getattr(base.task, f.name) for f in dataclasses.fields(base.task) if f.init}
  task = Failing(**values)
  evals = (Eval(name="valid", task=task, every=4, batch_size=64),)
  return dataclasses.replace(
    base, task=task, batch_size=16, steps=12, log_every=1, save_every=6, evals=evals
  )


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
  """The workdir of a run that nothing stopped."""
  workdir = tmp_path_factory.mktemp("straight")
  train(config, str(workdir))
  return workdir


def rows(workdir):
  """`metrics.jsonl` without what the clock says."""
  return [{k: v for k, v in r.items() if k not in TIMES} for r in log.read_metrics(workdir)]


def assert_as_straight(workdir, straight):
  assert_bit_equal(final_state(workdir), final_state(straight))
  assert rows(workdir) == rows(straight)
  names = {p.name for p in straight.iterdir()}
  assert {p.name for p in workdir.iterdir()} == names  # no lock, nothing half written


def stopped_by(number, seconds, config, workdir):
  """The run with a signal after some seconds; was it stopped?"""
  timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
  before = signal.signal(number, lambda *_: None)  # it may come after the run's end
  timer.start()
  try:
    train(config, str(workdir))
  except processes.Stopped:
    return True
  finally:
    timer.cancel()
    timer.join()
    signal.signal(number, before)
  return False


def test_an_evaluation_is_left_at_the_next_batch_and_made_when_the_run_goes_on(
  config, straight, tmp_path, monkeypatch
):
  batches = 0
  run = evaluate.Evaluator._run

  def told_in_the_middle(self, stream, params, rest, number, stop, log):
    def asked():
      nonlocal batches
      batches += 1
      if batches == 3:
        signal.raise_signal(signal.SIGTERM)
      return stop()

    return run(self, stream, params, rest, number, asked, log)

  monkeypatch.setattr(evaluate.Evaluator, "_run", told_in_the_middle)
  with pytest.raises(processes.Stopped, match="saved step 4"):
    train(config, str(tmp_path))
  assert batches == 3
  assert max(r["step"] for r in rows(tmp_path)) == 4
  monkeypatch.undo()
  train(config, str(tmp_path))
  assert_as_straight(tmp_path, straight)


def test_the_last_evaluation_is_left_too(config, straight, tmp_path, monkeypatch):
  run = evaluate.Evaluator._run

  def told(self, stream, params, rest, number, stop, log):
    if len(rows(tmp_path)) == 14:  # 12 steps, 2 evaluations
      signal.raise_signal(signal.SIGINT)
    return run(self, stream, params, rest, number, stop, log)

  monkeypatch.setattr(evaluate.Evaluator, "_run", told)
  with pytest.raises(processes.Stopped, match="saved step 12"):
    train(config, str(tmp_path))
  monkeypatch.undo()
  train(config, str(tmp_path))
  assert_as_straight(tmp_path, straight)


def test_a_step_with_an_evaluation_that_is_the_last_before_the_stop(
  config, straight, tmp_path, monkeypatch
):
  line = log.Log.line

  def told(self, text, **kwargs):
    if "Global Steps: 8/" in text:
      signal.raise_signal(signal.SIGTERM)
    line(self, text, **kwargs)

  monkeypatch.setattr(log.Log, "line", told)
  with pytest.raises(processes.Stopped, match="saved step 8"):
    train(config, str(tmp_path))
  monkeypatch.undo()
  assert [r["step"] for r in rows(tmp_path)][-1] == 8
  train(config, str(tmp_path))
  assert_as_straight(tmp_path, straight)


def test_slow_evaluations_are_left_within_seconds(config, tmp_path):
  slow = dataclasses.replace(config.task, place="slow")
  evals = (Eval(name="valid", task=slow, every=1, batch_size=16),)
  config = dataclasses.replace(config, evals=evals, workers=1)
  told = []

  def tell():
    while not (tmp_path / "metrics.jsonl").exists() or not rows(tmp_path):
      time.sleep(0.05)
    time.sleep(1.0)
    told.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=tell)
  thread.start()
  with pytest.raises(processes.Stopped, match="saved step 1"):
    train(config, str(tmp_path))
  thread.join()
  assert time.monotonic() - told[0] < 20  # the evaluation would take 36 s


# Three runs of some seconds each, for every count; one is tried always.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_at_random_moments(config, straight, tmp_path, number, count):
  def stamp(name):
    return (straight / name).stat().st_mtime

  whole = stamp("curves.png") - stamp("config.json")  # drawn last, written first
  stops = 0
  for i in range(count):
    moments = [random.uniform(0, whole) for _ in range(2)]
    for seconds in moments:
      stops += stopped_by(number, seconds, config, tmp_path / f"{i}")
    train(config, str(tmp_path / f"{i}"))
    assert_as_straight(tmp_path / f"{i}", straight)
  print(f"{stops} of {2 * count} were stopped")


def test_rows_of_the_failing_task_are_the_task_s():
  class Two:
    notes = ("a note",)

    def __len__(self):
      return 2

    def example(self, i, rng):
      return i

  failing = Rows(Two(), after=1)
  assert len(failing) == 2 and failing.notes == ("a note",) and failing.example(1, None) == 1
  with pytest.raises(TypeError):
    failing.example(0, None)
