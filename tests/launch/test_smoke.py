"""The smoke job: what it takes for a success, and the whole of it as two processes."""

import os
import re
import subprocess

import pytest

from ofa_jax.engine import log
from tests.test_processes import ROOT

SMOKE = ROOT / "launch" / "smoke.sh"

# Commands that end as TRAIN says, one status a start; "wait" is a run that is told to stop.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$STATE/calls"
if [[ $* == *ofa_jax.evaluate* ]]; then exit "$EVALUATE"; fi
n=$(grep -c ofa_jax.train "$STATE/calls")
end=$(cut -d' ' -f"$n" <<<"$TRAIN")
[[ $end == wait ]] || exit "$end"
trap 'exit 75' TERM
echo "Global Steps: 20/150 | Rows/s: 1.0 | ETA: 00:00:01"
for ((i = 0; i < 600; i++)); do sleep 0.05; done
"""


def smoke(folder, *flags, train="wait 0", evaluate="0"):
  tools = folder / "bin"
  tools.mkdir()
  (tools / "python3").write_text(PYTHON)
  (tools / "python3").chmod(0o755)
  variables = {"STATE": str(folder), "TRAIN": train, "EVALUATE": evaluate}
  result = subprocess.run(
    [SMOKE, "gs://bucket/smoke", *flags],
    env={**os.environ, **variables, "PATH": f"{tools}:{os.environ['PATH']}"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  calls = (folder / "calls").read_text().splitlines()
  return result.returncode, result.stdout + result.stderr, calls


def test_interrupted_resumed_evaluated(tmp_path):
  status, said, calls = smoke(tmp_path, "--distributed")
  assert status == 0, said
  assert "s after SIGTERM" in said and said.rstrip().endswith("PASSED")
  first, second, evaluation = calls
  assert first == second
  assert {"--workdir=gs://bucket/smoke", "--interrupted-status=75"} <= set(first.split())
  assert "--checkpoint=gs://bucket/smoke" in evaluation
  assert all("--distributed" in call for call in calls)


@pytest.mark.parametrize(
  ("train", "evaluate", "says", "commands"),
  [
    ("0", "0", "expected status 75 of an interrupted run, found 0", 1),
    ("1", "0", "expected status 75 of an interrupted run, found 1", 1),
    ("wait 1", "0", "going on ended with 1", 2),
    ("wait 0", "3", "evaluate ended with 3", 3),
  ],
)
def test_what_does_not_work_is_told(tmp_path, train, evaluate, says, commands):
  status, said, calls = smoke(tmp_path, train=train, evaluate=evaluate)
  assert status == 1
  assert says in said and "PASSED" not in said
  assert len(calls) == commands


def test_processes_that_print_nothing_wait_for_the_one_that_does(tmp_path):
  status, said, _ = smoke(tmp_path, train="75 0")
  assert status == 0, said
  assert "SIGTERM" not in said


@pytest.mark.slow  # three commands for each service: two minutes
def test_the_whole_job_in_a_bucket(bucket, digits):
  result = subprocess.run(
    [SMOKE, f"{bucket}/smoke"],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "OFA_JAX_DATA": str(digits.parent), "STEPS": "40"},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert result.stdout.rstrip().endswith("PASSED")
  told = re.search(r"saved and ended (\d+) s after SIGTERM", result.stdout)
  print(told[0])
  assert int(told[1]) < 60  # 15 where the machine does nothing else
  assert log.read_metrics(f"{bucket}/smoke")[-1]["step"] == 40
  assert {p.name for p in ROOT.glob("smoke*")} == set()


@pytest.mark.slow  # three commands of two processes each: two minutes
def test_the_whole_job_as_two_processes(digits, tmp_path):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OFA_JAX_DATA": str(digits.parent)}
  result = subprocess.run(
    [ROOT / "launch" / "local.sh", "2", SMOKE, tmp_path / "run"],
    cwd=ROOT,
    env={**environment, "STEPS": "40"},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert result.stdout.count("PASSED") == 2
  assert "s after SIGTERM" in result.stdout
  assert log.read_metrics(tmp_path / "run")[-1]["step"] == 40
