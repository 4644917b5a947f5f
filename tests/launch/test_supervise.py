"""The supervisor of a run without a scheduler: what is started again, and what is not."""

import os
import signal
import subprocess
import time

import pytest

from tests.test_processes import ROOT

SCRIPT = ROOT / "launch" / "supervise.sh"
# Ends with what stands on the line of `ends` that belongs to this start.
ENDS = 'echo x >>starts; n=$(wc -l <starts); exit "$(sed -n "${n}p" ends)"'
WAITS = 'trap "exit 75" TERM; echo x >>starts; while true; do sleep 0.05; done'


def supervise(folder, *command, **environment):
  return subprocess.run(
    [SCRIPT, "run", *command],
    cwd=folder,
    env={**os.environ, "DELAY": "0", **environment},
    capture_output=True,
    text=True,
    timeout=300,
  )


def started(folder, *command):
  process = subprocess.Popen(
    [SCRIPT, "run", *command],
    cwd=folder,
    env={**os.environ, "DELAY": "0"},
    start_new_session=True,
  )
  end = time.monotonic() + 300
  while not (folder / "starts").exists():
    assert time.monotonic() < end
    time.sleep(0.02)
  return process


@pytest.mark.parametrize(
  ("ends", "starts", "status"),
  [
    ("0", 1, 0),
    ("75 75 0", 3, 0),
    ("139 134 0", 3, 0),  # the compiler or the runtime crashed
    ("1", 1, 1),  # a fault of the config
    ("75 2", 2, 2),
    ("130", 1, 130),  # Ctrl-C
  ],
)
def test_what_is_started_again(tmp_path, ends, starts, status):
  (tmp_path / "ends").write_text(ends.replace(" ", "\n") + "\n")
  assert supervise(tmp_path, "bash", "-c", ENDS).returncode == status
  assert (tmp_path / "starts").read_text().split() == ["x"] * starts
  assert (tmp_path / "run" / "status").read_text() == f"{status}\n"
  text = (tmp_path / "run" / "log.txt").read_text()
  assert f"start {starts - 1}: bash" in text  # how often it was started again


def test_a_real_signal_starts_it_again(tmp_path):
  script = "test -e starts && exit 0; touch starts; kill -KILL $$"
  assert supervise(tmp_path, "bash", "-c", script).returncode == 0
  assert "ended with 137: started again" in (tmp_path / "run" / "log.txt").read_text()


def test_commands_are_told_how_to_end_when_interrupted(tmp_path):
  command = ("bash", "-c", "echo $OFA_JAX_INTERRUPTED_STATUS")
  assert supervise(tmp_path, *command).returncode == 0
  assert "\n75\n" in (tmp_path / "run" / "log.txt").read_text()


def test_not_without_an_end(tmp_path):
  result = supervise(tmp_path, "bash", "-c", "exit 75", RESTARTS="2")
  assert result.returncode == 75
  text = (tmp_path / "run" / "log.txt").read_text()
  assert text.count("] start ") == 3
  assert "after 2 restarts" in text


def test_sigterm_goes_to_the_command_and_is_the_end(tmp_path):
  process = started(tmp_path, "bash", "-c", WAITS)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=300) == 75
  assert (tmp_path / "run" / "status").read_text() == "75\n"
  assert (tmp_path / "starts").read_text() == "x\n"


def test_sigterm_between_two_starts_is_the_end(tmp_path):
  process = subprocess.Popen(
    [SCRIPT, "run", "bash", "-c", "echo x >>starts; exit 75"],
    cwd=tmp_path,
    env={**os.environ, "DELAY": "60"},
  )
  log = tmp_path / "run" / "log.txt"
  end = time.monotonic() + 300
  while not (log.exists() and "in 60 s" in log.read_text()):
    assert time.monotonic() < end
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=300) == 75
  assert (tmp_path / "starts").read_text() == "x\n"


def test_one_supervisor_a_folder(tmp_path):
  process = started(tmp_path, "bash", "-c", WAITS)
  second = supervise(tmp_path, "true")
  assert second.returncode == 2
  assert f"found process {process.pid}" in second.stderr
  os.killpg(process.pid, signal.SIGKILL)  # its lock goes with it
  process.wait()
  assert supervise(tmp_path, "true").returncode == 0
