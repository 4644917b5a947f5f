"""Runs on TPU VMs, with a gcloud whose workers are folders here: scripts on them really run."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch import gcloud_flags
from tests.test_processes import ROOT

HERE = Path(__file__).parent
SCRIPT = ROOT / "launch" / "tpu_vm.py"

# A `uv` that builds an empty wheel and makes the environment out of the Python that is here.
UV = f"""#!/usr/bin/env bash
echo "$WORKER $*" >>"$FAKE/uv"
case "$1 ${{2:-}}" in
  "build "*) touch "${{3#--out-dir=}}/ofa_jax-1.0-py3-none-any.whl" ;;
  "venv "*) mkdir -p venv/bin; printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' >venv/bin/python
    chmod +x venv/bin/python ;;
esac
"""
# A command that says where it is and ends with what `ends` says next, of all workers alike.
JOB = """trap 'sleep 0.2; echo saved; exit 75' TERM
n=$(cat starts 2>/dev/null || echo 0); n=$((n + 1)); echo $n >starts
echo "start $n of $(command -v python)"
end=$(sed -n "${n}p" "$FAKE/ends"); test -n "$end" && exit "$end"
while true; do sleep 0.1; done
"""


@pytest.fixture
def fake(tmp_path):
  """The folder of the fake's state."""
  tools = tmp_path / "bin"
  tools.mkdir()
  (tools / "gcloud").write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/fake_gcloud.py "$@"\n')
  (tools / "uv").write_text(UV)
  for tool in tools.iterdir():
    tool.chmod(0o755)
  (tmp_path / "ends").write_text("")
  yield tmp_path
  for pid in tmp_path.glob("worker-*/ofa_jax/run/pid"):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(int(pid.read_text()), signal.SIGKILL)


def start(fake, verb, *words, after=()):
  environment = {
    **os.environ,
    "PATH": f"{fake / 'bin'}:{os.environ['PATH']}",
    "FAKE": str(fake),
    "DELAY": "0",
    "PYTHONPATH": str(ROOT),
  }
  command = [sys.executable, SCRIPT, verb, "muge", "--zone=z", "--poll=0.05", *words]
  return subprocess.Popen(
    [*command, *(["--", *after] if after else [])],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def tpu_vm(fake, verb, *words, after=()):
  """Status, output and errors of the script."""
  process = start(fake, verb, *words, after=after)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def calls(fake, verb):
  lines = [json.loads(line) for line in (fake / "calls").read_text().splitlines()]
  return [words for words in lines if verb in words]


def wait_for(condition):
  end = time.monotonic() + 300
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.fixture
def installed(fake):
  assert tpu_vm(fake, "create", "--type=v6e-8")[0] == 0
  status, _, errors = tpu_vm(fake, "install")
  assert status == 0, errors
  return fake


@pytest.fixture(scope="module")
def module():
  spec = importlib.util.spec_from_file_location("tpu_vm", SCRIPT)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


@pytest.mark.parametrize(
  ("kind", "version"),
  [
    ("v4-8", "tpu-ubuntu2204-base"),
    ("v5litepod-256", "v2-alpha-tpuv5-lite"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-256", "v2-alpha-tpuv6e"),
  ],
)
def test_the_software_belongs_to_the_accelerator(module, kind, version):
  assert module.runtime(kind) == version


@pytest.mark.parametrize(
  ("kind", "says"), [("tpu7x-128", "GKE"), ("v5e-256", "expected KIND-SIZE"), ("v6e", "KIND-SIZE")]
)
def test_other_accelerators_are_refused(fake, kind, says):
  status, _, errors = tpu_vm(fake, "create", f"--type={kind}")
  assert (status, "Traceback" in errors) == (1, False)
  assert says in errors
  assert not (fake / "calls").exists()


def test_create_asks_for_what_was_said_and_waits(fake):
  status, out, errors = tpu_vm(
    fake,
    "create",
    *("--type=v5litepod-256", "--slices=2", "--spot", "--internal-ips", "--wait=2"),
    "--service-account=run@p.iam.gserviceaccount.com",
  )
  assert status == 0, errors
  (words,) = calls(fake, "create")
  assert "alpha" not in words
  assert {
    "--accelerator-type=v5litepod-256",
    "--runtime-version=v2-alpha-tpuv5-lite",
    "--node-count=2",
    "--spot",
    "--internal-ips",
    "--valid-until-duration=7200s",
    "--service-account=run@p.iam.gserviceaccount.com",
  } <= set(words)
  assert [line.split()[-1] for line in out.splitlines()] == [
    "WAITING_FOR_RESOURCES",
    "PROVISIONING",
    "ACTIVE",
  ]


def test_create_for_a_while(fake):
  assert tpu_vm(fake, "create", "--type=v6e-8", "--flex-start=4h")[0] == 0
  (words,) = calls(fake, "create")
  assert words[0] == "alpha"
  assert {"--provisioning-model=flex-start", "--max-run-duration=4h", "--node-id=muge"} <= set(
    words
  )


def test_a_planted_typo_is_caught(fake):
  """What the fake refuses, gcloud would."""
  text = SCRIPT.read_text()
  assert "--runtime-version" in text
  assert gcloud_flags.faults(
    ["compute", "tpus", "queued-resources", "create", "n", "--acelerator-type=v6e-8", "--spot"]
  ) == ["gcloud compute tpus queued-resources create has no --acelerator-type"]
  assert gcloud_flags.faults(["compute", "tpu", "queued-resources", "create"])


def test_a_describe_that_fails_in_passing_is_tried_again(fake):
  (fake / "failures").write_text("3")
  status, out, errors = tpu_vm(fake, "create", "--type=v6e-8")
  assert status == 0, errors
  assert out.count("try again later") == 3


def test_a_describe_that_fails_is_the_end(fake):
  (fake / "failures").write_text("1000")
  status, _, errors = tpu_vm(fake, "create", "--type=v6e-8")
  assert status == 1
  assert "describing muge, tried 5 times, failed (1)" in errors
  assert "try again later" in errors
  assert len(calls(fake, "describe")) == 5


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_ends_where_there_will_be_nothing(fake, state):
  (fake / "states").write_text(f"PROVISIONING\n{state}")
  status, _, errors = tpu_vm(fake, "create", "--type=v6e-8")
  assert status == 1
  assert f"found {state}" in errors


def test_create_waits_no_longer_than_it_was_told(fake):
  (fake / "states").write_text("WAITING_FOR_RESOURCES")
  status, _, errors = tpu_vm(fake, "create", "--type=v6e-8", "--wait=0.0001")
  assert status == 1
  assert "still WAITING_FOR_RESOURCES" in errors


def test_install_needs_no_python_of_the_image(installed):
  lines = (installed / "uv").read_text().splitlines()
  for worker in ("worker-0", "worker-1"):
    made, locked, package = [line for line in lines if line.startswith(worker)]
    assert "--python=3.12" in made
    assert "requirements-tpu.txt" in locked
    assert "--no-deps" in package and "ofa_jax-1.0-py3-none-any.whl" in package
    assert (installed / worker / "ofa_jax" / "requirements-tpu.txt").exists()


def test_install_of_a_published_package(installed):
  (installed / "uv").unlink()
  assert tpu_vm(installed, "install", "--package=ofa-jax==0.1.0")[0] == 0
  text = (installed / "uv").read_text()
  assert "ofa-jax==0.1.0" in text and "build" not in text


def test_run_before_install_says_so(fake):
  tpu_vm(fake, "create", "--type=v6e-8")
  status, _, errors = tpu_vm(fake, "run", after=["true"])
  assert status == 1
  assert "tpu_vm.py install" in errors


@pytest.mark.parametrize("passed", [1, 2])
def test_workers_that_gcloud_passes_over_are_missed(installed, passed):
  """It goes on without those that it cannot reach, and its status is 0."""
  (installed / "silent").write_text(str(passed))
  for verb in ("install", "status"):
    status, _, errors = tpu_vm(installed, verb)
    assert status == 1
    assert f"{2 - passed} of 2 workers answered" in errors
  status, _, errors = tpu_vm(installed, "run", after=["true"])
  assert f"starting failed (1): {2 - passed} of 2 workers answered" in errors


def test_run_logs_status_stop_delete(installed):
  status, _, errors = tpu_vm(installed, "run", after=["bash", "-c", JOB])
  assert status == 0, errors
  assert tpu_vm(installed, "status")[1].count(": running") == 2
  log = installed / "worker-1" / "ofa_jax" / "run" / "log.txt"
  wait_for(lambda: "start 1 of" in log.read_text())
  assert "venv/bin/python" in log.read_text()  # what was installed comes first on the PATH
  assert "start 1 of" in tpu_vm(installed, "logs", "--worker=1")[1]
  status, out, errors = tpu_vm(installed, "stop")
  assert status == 0, errors
  assert out.count(": 75") == 2
  assert "saved" in log.read_text()
  assert tpu_vm(installed, "delete")[0] == 0
  assert tpu_vm(installed, "status")[1].split() == ["muge:", "MISSING"]
  assert tpu_vm(installed, "delete")[0] == 0  # there is none any more, which is what was asked for


def test_run_starts_only_what_does_not_run(installed):
  assert tpu_vm(installed, "run", after=["bash", "-c", JOB])[0] == 0
  first = installed / "worker-0" / "ofa_jax" / "run" / "pid"
  os.killpg(int(first.read_text()), signal.SIGKILL)
  wait_for(lambda: tpu_vm(installed, "status")[1].count("vanished") == 1)
  other = (installed / "worker-1" / "ofa_jax" / "run" / "pid").read_text()
  assert tpu_vm(installed, "run", after=["bash", "-c", JOB])[0] == 0
  assert tpu_vm(installed, "status")[1].count(": running") == 2
  assert (installed / "worker-1" / "ofa_jax" / "run" / "pid").read_text() == other


def keep(fake):
  return start(fake, "keep", "--type=v6e-8", "--spot", after=["bash", "-c", JOB])


def test_keep_goes_on_after_a_preemption(fake):
  process = keep(fake)
  starts = [fake / f"worker-{i}" / "ofa_jax" / "starts" for i in range(2)]
  wait_for(lambda: all(path.exists() for path in starts))
  # The start is over when they are asked again how they are; before, it is waited for, a minute.
  wait_for(lambda: sum("not-started" in " ".join(words) for words in calls(fake, "ssh")) > 1)
  (fake / "ends").write_text("75\n0\n")  # interrupted once more, then finished
  environment = {**os.environ, "FAKE": str(fake)}
  script = (
    "import sys; sys.path.insert(0, sys.argv[1]); import fake_gcloud; fake_gcloud.take_away()"
  )
  subprocess.run([sys.executable, "-c", script, HERE], env=environment, check=True)
  out, errors = process.communicate(timeout=300)
  assert process.returncode == 0, out + errors
  assert "was taken away (1 times so far)" in out
  assert out.rstrip().endswith("finished; muge is still there: tpu_vm.py delete")
  assert len(calls(fake, "create")) == 2
  assert [path.read_text() for path in starts] == ["2\n", "2\n"]


def test_keep_does_not_repeat_a_fault(fake):
  (fake / "ends").write_text("1\n")
  out, errors = keep(fake).communicate(timeout=300)
  assert "the command ended with 1; not started again" in errors, out
  assert (fake / "worker-0" / "ofa_jax" / "starts").read_text() == "1\n"
  assert len(calls(fake, "create")) == 1


def test_keep_can_be_started_again(installed):
  """What runs goes on, and is waited for."""
  assert tpu_vm(installed, "run", after=["bash", "-c", JOB])[0] == 0
  process = keep(installed)
  wait_for(lambda: len(calls(installed, "ssh")) > 6)
  (installed / "ends").write_text("75\n0\n")
  for home in installed.glob("worker-*"):
    os.kill(int((home / "ofa_jax" / "run" / "pid").read_text()), signal.SIGTERM)
  out, errors = process.communicate(timeout=300)
  assert process.returncode == 0, out + errors
  assert len(calls(installed, "create")) == 1
  assert len(calls(installed, "scp")) == 1


def test_without_gcloud(tmp_path):
  command = [sys.executable, SCRIPT, "status", "muge", "--zone=z"]
  result = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
  assert (result.returncode, "Traceback" in result.stderr) == (1, False)
  assert "Expected gcloud on the PATH" in result.stderr


@pytest.mark.slow  # a second or two for each of the recorded commands
def test_the_record_is_what_gcloud_says():
  if shutil.which("gcloud") is None:
    pytest.skip("gcloud is not installed")
  for command, flags in gcloud_flags.recorded().items():
    own, everywhere = gcloud_flags.of_help(command)
    assert flags == own | everywhere, f"{command}: python tests/launch/gcloud_flags.py"
