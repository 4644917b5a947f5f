"""Killed at random moments, every long command ends as if nothing had been."""

import os
import subprocess
import sys

import pytest

from tests import forked, kills


def run(job, count, folder, *number):
  done = subprocess.run(
    [sys.executable, "-m", "tests.kills", job, count, str(folder), *number],
    cwd=forked.ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert f"{job}: {count} of {count} ended as the straight run" in done.stdout


@pytest.mark.slow  # each try is a run or two of the command: 25 of each job are half an hour
@pytest.mark.parametrize("job", kills.JOBS)
def test_killed_at_random_moments(job, tmp_path):
  """OFA_JAX_KILLS is how often; 25 shows that it holds."""
  run(job, os.environ.get("OFA_JAX_KILLS", "3"), tmp_path)


@pytest.mark.slow  # the same, for what else ends a run
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("job", ["train", "train_ofa"])
def test_told_to_stop_at_random_moments(job, number, tmp_path):
  """As processes of their own, which `test_stopping` cannot see the end of."""
  run(job, os.environ.get("OFA_JAX_KILLS", "3"), tmp_path, number)
