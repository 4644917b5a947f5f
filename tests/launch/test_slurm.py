"""launch/slurm.sbatch on a real SLURM of this machine: told to stop, stuck, at fault, in arrays."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ofa_jax import trees
from ofa_jax.engine import log
from tests.evaluation_golden import RETRIEVAL, save_model
from tests.launch import slurm_cluster
from tests.launch.test_launch import LAUNCH, ROOT, TRAIN
from tests.test_train import assert_bit_equal

# Each job starts a training or two, and SLURM takes seconds to queue one again.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
  reason = slurm_cluster.install()
  if reason:
    pytest.skip(reason)
  # In /tmp, for the path of a socket must be short.
  with (
    tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder,
    slurm_cluster.running(pathlib.Path(folder) / "one") as environment,
  ):
    yield environment


class Job:
  """A job of launch/slurm.sbatch."""

  def __init__(self, cluster, output, *command, options=(), **environment):
    self._environment = {**cluster, "JAX_PLATFORMS": "cpu", **environment}
    self._output = output
    submitted = self.run("sbatch", "--parsable", f"--output={output}", *options,
                         LAUNCH / "slurm.sbatch", *command)  # fmt: skip
    self.id = submitted.strip()

  def run(self, *command):
    done = subprocess.run(
      command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  def text(self):
    return self._output.read_text() if self._output.exists() else ""

  def shown(self):
    """What SLURM says of the job, or of each of an array."""
    return [
      dict(word.split("=", 1) for word in line.split() if "=" in word)
      for line in self.run("scontrol", "--oneliner", "show", "job", self.id).splitlines()
      if line.startswith("JobId=")  # and not one of the command's own
    ]

  def wait_for(self, text, *, within=900):
    """Waits until the output holds a text; gives when it did."""
    self._until(lambda: text in self.text(), within, f"{text!r} never came")
    return time.monotonic()

  def end(self, *, within=900):
    """Waits for the end; gives state, exit status and restarts of the job, or of each task."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    self._until(
      lambda: all(job["JobState"] in ended for job in self.shown()), within, "it does not end"
    )
    return [
      (job["JobState"], int(job["ExitCode"].partition(":")[0]), int(job["Restarts"]))
      for job in self.shown()
    ]

  def _until(self, reached, within, fault):
    for _ in range(2 * within):
      if reached():
        return
      time.sleep(0.5)
    raise AssertionError(f"{fault}: {self.shown()}\n{self.text()}")


TWO = ("--ntasks-per-node=2",)


@pytest.fixture(scope="module")
def train(cluster, digits, tmp_path_factory):
  """Submits two tasks that train the quickstart; gives the job and its workdir."""

  def submit(*overrides):
    folder = tmp_path_factory.mktemp("run")
    command = (*TRAIN, "--config.evals=()", *overrides, f"--workdir={folder / 'run'}")
    job = Job(cluster, folder / "job.log", *command, options=TWO, OFA_JAX_DATA=str(digits.parent))
    return job, folder / "run"

  return submit


@pytest.fixture(scope="module")
def straight(train):
  job, workdir = train()
  assert job.end() == [("COMPLETED", 0, 0)], job.text()
  return workdir


def losses(workdir):
  return [row["train/loss"] for row in log.read_metrics(workdir)]


def final_state(workdir):
  """All arrays of the newest checkpoint of several processes, as they lie on disk."""
  steps = [p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
  newest = max(steps, key=lambda p: int(p.name))
  items = {}
  for item in ("model", "train"):
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(newest / item).item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    tree = reader.restore(newest / item, restore_args=args)
    items |= {f"{item}/{path}": np.asarray(x) for path, x in trees.flatten(tree).items()}
  return items


def assert_as_straight(workdir, straight):
  assert_bit_equal(final_state(workdir), final_state(straight))
  assert losses(workdir) == losses(straight)


def test_told_to_stop_it_is_queued_again_and_ends_as_the_straight_run(train, straight):
  job, workdir = train()
  job.wait_for("Global Steps: 10/")
  job.run("scancel", "--signal=TERM", job.id)
  told = time.monotonic()
  took = job.wait_for("queued again") - told
  print(f"SIGTERM to the end of both tasks: {took:.1f} s")
  assert job.end() == [("COMPLETED", 0, 1)], job.text()
  step = re.search(r"Told to stop: saved step (\d+)", job.text())[1]
  assert f"Restart 1 of this run, from step {step}" in job.text()
  assert (workdir / "log.txt").read_text().count("Process 1 on ") == 2
  assert_as_straight(workdir, straight)


def test_stuck_it_is_queued_again_and_ends_as_the_straight_run(train, straight):
  job, workdir = train("--config.step_timeout=5")
  job.wait_for("Global Steps: 25/")
  # One task hangs; the other one's watchdog ends it, and srun kills the first.
  stuck = subprocess.run(["pgrep", "-f", f"ofa_jax.train.*{workdir}"], capture_output=True)
  pids = [int(pid) for pid in stuck.stdout.split() if _variable(pid, "JAX_PROCESS_ID") == "1"]
  os.kill(pids[-1], signal.SIGSTOP)
  job.wait_for("queued again (restart 1)")
  assert "no step has ended for 5 s" in job.text()
  assert job.end() == [("COMPLETED", 0, 1)], job.text()
  assert_as_straight(workdir, straight)


def _variable(pid, name):
  """Of the environment of a process that is no shell."""
  folder = pathlib.Path("/proc", pid.decode())
  if "python" not in os.path.basename(os.readlink(folder / "exe")):
    return None
  variables = dict(
    entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry
  )
  return variables.get(name)


def test_a_fault_is_not_queued_again(train):
  job, _ = train("--config.batch_size=0")
  assert job.end() == [("FAILED", 1, 0)], job.text()
  assert job.text().count("error: ") >= 1 and "batch_size" in job.text()


def test_cancelled_it_is_not_queued_again(cluster, tmp_path):
  script = 'trap "echo told; exit 75" TERM; echo ready; sleep 1000 & wait'
  job = Job(cluster, tmp_path / "job.log", "bash", "-c", script, options=TWO)
  job.wait_for("ready\nready")
  job.run("scancel", job.id)
  assert job.end()[0][::2] == ("CANCELLED", 0)
  assert "told" in job.text() and "queued again" not in job.text()


# Runs until it is told to stop; when it is started again, it finishes.
UNTIL_TOLD = """
[[ -z ${SLURM_RESTART_COUNT:-} ]] || exit 0
trap 'echo told; exit "$OFA_JAX_INTERRUPTED_STATUS"' TERM
echo ready; sleep 1000 & wait
"""


@pytest.mark.parametrize(
  ("end", "ended"),
  [
    ("kill -KILL $$", ("COMPLETED", 0, 1)),  # lost: both are started again
    ("exit 75", ("COMPLETED", 0, 1)),
    ("exit 1", ("FAILED", 1, 0)),  # the other one is killed for it, which decides nothing
  ],
)
def test_what_one_task_ends_with_decides(cluster, tmp_path, end, ended):
  script = f"""
    [[ -z ${{SLURM_RESTART_COUNT:-}} ]] || exit 0
    ((JAX_PROCESS_ID == 1)) || exec sleep 1000
    sleep 1; {end}"""
  job = Job(cluster, tmp_path / "job.log", "bash", "-c", script, options=TWO)
  assert job.end(within=100) == [ended], job.text()


def test_preempted_it_is_queued_again(cluster, tmp_path):
  job = Job(cluster, tmp_path / "job.log", "bash", "-c", UNTIL_TOLD, options=TWO)
  job.wait_for("ready\nready")
  urgent = Job(cluster, tmp_path / "urgent.log", "sleep", "1", options=(*TWO, "--partition=urgent"))
  assert urgent.end() == [("COMPLETED", 0, 0)]
  assert job.end() == [("COMPLETED", 0, 1)], job.text()
  assert job.text().count("told") == 2


def test_at_its_time_limit_it_is_queued_again(cluster, tmp_path):
  options = (*TWO, "--time=1", "--signal=TERM@30")
  job = Job(cluster, tmp_path / "job.log", "bash", "-c", UNTIL_TOLD, options=options)
  assert job.end() == [("COMPLETED", 0, 1)], job.text()
  assert job.text().count("told") == 2 and "status 75, queued again" in job.text()


def test_an_array_extracts_the_bytes_of_one_job(cluster, tmp_path):
  model = save_model(tmp_path, "vit")
  shutil.copy(RETRIEVAL / "dataset" / "test_imgs.tsv", tmp_path)
  command = [
    *(sys.executable, "-m", "ofa_jax.extract_features", f"--model={model}", "--batch-size=4"),
    *(f"--images={tmp_path / 'test_imgs.tsv'}", "--format=npy"),
    f"--texts={RETRIEVAL / 'dataset' / 'test_texts.jsonl'}",
  ]
  one = Job(cluster, tmp_path / "one.log", *command, f"--output={tmp_path / 'one'}")
  assert one.end() == [("COMPLETED", 0, 0)], one.text()
  command.append(f"--output={tmp_path / 'four'}")
  four = Job(cluster, tmp_path / "four.log", *command, "--shard=array/4", options=("--array=0-3",))
  assert four.end() == [("COMPLETED", 0, 0)] * 4, four.text()
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  subprocess.run([*command, "--shard=merge/4"], cwd=ROOT, env=environment, check=True)
  for path in (tmp_path / "one").iterdir():
    assert (tmp_path / "four" / path.name).read_bytes() == path.read_bytes()
  assert len(list((tmp_path / "four").glob("*-of-00004.npy"))) == 8


# The GPUs that JAX would take in a process.
OWN = """
import os
from ofa_jax.engine import cluster
job = cluster.read(os.environ, asked=False, tpu=False)
visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
places = range(len(visible)) if job is None or job.local_devices is None else job.local_devices
print("process", job.index if job else 0, "has", ",".join(visible[i] for i in places), flush=True)
"""


@pytest.mark.parametrize(
  ("options", "devices"),
  [
    (("--ntasks-per-node=1", "--gpus-per-node=8"), ["0,1,2,3,4,5,6,7"]),
    (("--ntasks-per-node=2", "--gpus-per-node=8"), ["0,1,2,3", "4,5,6,7"]),
    (("--ntasks-per-node=2", "--gpus-per-task=4"), ["0,1,2,3", "4,5,6,7"]),
    (("--ntasks-per-node=2", "--gpus-per-task=1"), ["0", "1"]),
  ],
)
def test_each_task_has_the_gpus_it_should_have(cluster, tmp_path, options, devices):
  job = Job(cluster, tmp_path / "job.log", sys.executable, "-c", OWN, options=options)
  assert job.end() == [("COMPLETED", 0, 0)], job.text()
  assert sorted(re.findall("process .*", job.text())) == [
    f"process {i} has {own}" for i, own in enumerate(devices)
  ]
