"""Runs as users start them: killed at any moment, and on several processes."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ofa_jax import log
from tests.test_train import assert_bit_equal, final_state

ROOT = Path(__file__).parent.parent
SMALL = (
  "--config.batch_size=16",
  "--config.steps=60",
  "--config.log_every=5",
  "--config.save_every=10",
  "--config.model.vision.layers=1",
  "--config.model.text.layers=1",
  "--config.model.text.width=32",
)


def start(digits, workdir, *overrides, **environment):
  """The training command on the quickstart's config, made small."""
  command = [sys.executable, "-m", "ofa_jax.train", "--config=configs/quickstart.py"]
  return subprocess.Popen(
    [*command, f"--workdir={workdir}", *SMALL, *overrides],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "OFA_JAX_DATA": str(digits.parent), **environment},
  )  # fmt: skip


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


def test_killed_runs_end_with_the_very_parameters_of_a_straight_one(digits, tmp_path):
  alone = "--config.evals=()"
  finish(start(digits, tmp_path / "straight", alone))
  killed = tmp_path / "killed"
  # In the moment a save begins, then at a random one after compiling, then again with a save.
  assert kill_at(start(digits, killed, alone), "Saving checkpoint at step 20")
  delay = random.uniform(0.0, 0.5)
  kill_at(start(digits, killed, alone), "Compiled", delay=delay)
  kill_at(start(digits, killed, alone), "Saving checkpoint at step 50")
  output = finish(start(digits, killed, alone))
  assert "resumed from this workdir at step" in output, f"delay {delay}"
  assert_bit_equal(final_state(tmp_path / "straight"), final_state(killed))
  losses = [[r["train/loss"] for r in log.read_metrics(tmp_path / d)] for d in ("straight", killed)]
  assert losses[0] == losses[1]


@pytest.fixture
def port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def test_two_processes_are_one(digits, tmp_path, port):
  # The large epsilon keeps Adam from dividing gradients that are rounding noise by themselves.
  first_five = ("--config.steps=5", "--config.log_every=1", "--config.optim.eps=1e-4")
  finish(start(digits, tmp_path / "one", *first_five))
  both = [
    start(
      digits,
      tmp_path / "two",
      *first_five,
      JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]
  outputs = [finish(p) for p in both]
  assert "on 2 host(s)" in outputs[0]
  assert "Global Steps" in outputs[0] and "Global Steps" not in outputs[1]
  one, two = (log.read_metrics(tmp_path / d) for d in ("one", "two"))
  assert one[-1].keys() == two[-1].keys() >= {"step", "valid/t2i_r1", "valid/zeroshot_top1"}
  assert one[-1] == two[-1]
  one, two = one[:5], two[:5]
  for name in ("train/loss", "train/grad_norm"):
    np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=1e-5)
