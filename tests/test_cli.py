"""What a person did ends as one message, whatever it was; help is complete."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from ofa_jax.config import Config, Optim
from tests import forked

ROOT = Path(__file__).parent.parent
QUICK = "--config=configs/quickstart.py"


@dataclasses.dataclass
class Case:
  """A command, what its message says, and its environment."""

  command: list[str]
  texts: tuple[str, ...]
  environment: dict[str, str | None] = dataclasses.field(default_factory=dict)
  files: dict[str, str] = dataclasses.field(default_factory=dict)
  status: int = 1


JOB = dict.fromkeys(("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
CASES = {
  "mistyped config": Case(
    ["train", "--config=configs/quickstrat.py", "--workdir=w"],
    ("no file configs/quickstrat.py. Did you mean configs/quickstart.py?",),
  ),
  "config in no folder": Case(
    ["train", "--config=nowhere/nope.py", "--workdir=w"], ("no folder nowhere",)
  ),
  "no config": Case(["train", "--workdir=w"], ("Expected --config=FILE.py, found none",)),
  "no config to evaluate": Case(
    ["evaluate", "--checkpoint=w"], ("Expected --config=FILE.py, found none",)
  ),
  "no workdir": Case(["train", QUICK], ("Expected --workdir=VALUE, found none",)),
  "unknown flag": Case(["train", QUICK, "--workdri=w"], ("workdri", "workdir", "--help")),
  "unknown field": Case(
    ["train", QUICK, "--config.optim.lrr=1", "--workdir=w"], ("did you mean lr",)
  ),
  "unfinished config": Case(
    ["train", "--config={tmp}/c.py", "--workdir=w"],
    ("c.py, line 2",),
    files={"c.py": "def get_config():\n  return Config(\n"},
  ),
  "config with a wrong name": Case(
    ["train", "--config={tmp}/c.py", "--workdir=w"],
    ("c.py, line 2: return Confg(): NameError", "Confg"),
    files={"c.py": "def get_config():\n  return Confg()\n"},
  ),
  "config with a wrong value": Case(
    ["train", "--config={tmp}/c.py", "--workdir=w"],
    ("c.py, line 2: raise ValueError('no such size'): no such size",),
    files={"c.py": "def get_config():\n  raise ValueError('no such size')\n"},
  ),
  "config without its data": Case(
    ["train", "--config={tmp}/c.py", "--workdir=w"],
    ("No such file or directory: missing.tsv",),
    files={"c.py": "def get_config():\n  return open('missing.tsv')\n"},
  ),
  "stack of the TPU's compiler": Case(  # even a config that looks for devices comes after it
    ["train", "--config={tmp}/c.py", "--workdir=w"],
    ("--fibers_default_thread_stack_size=1048576",),
    {"TPU_LIBRARY_PATH": "/lib/libtpu.so"},
    files={
      "c.py": "import os\ndef get_config():\n  raise ValueError(os.environ['LIBTPU_INIT_ARGS'])\n"
    },
  ),
  "evals=None": Case(
    ["train", QUICK, "--config.evals=None", "--workdir={tmp}/w"], ("evals: expected Eval(...)",)
  ),
  "workdir in a file": Case(
    ["train", QUICK, "--workdir=/dev/null/x"], ("is a file, not a folder",)
  ),
  "workdir too long": Case(
    ["train", QUICK, f"--workdir={{tmp}}/{'x' * 300}"], ("File name too long",)
  ),
  "no home for ~": Case(
    ["extract_features", "--model=M", "--texts=t.jsonl", "--output=~nobody-here/feats"],
    ("home directory for the ~ of ~nobody-here/feats",),
  ),
  "no number of processes": Case(
    ["train", QUICK, "--workdir=w"],
    ("JAX_NUM_PROCESSES is not set", "JAX_PROCESS_ID=x is no number"),
    {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_PROCESS_ID": "x"},
  ),
  "process without a job": Case(
    ["train", QUICK, "--workdir=w"],
    ("JAX_COORDINATOR_ADDRESS is not set", "JAX_PROCESS_ID is not set"),
    {"JAX_NUM_PROCESSES": "2"},
  ),
  "process number too high": Case(
    ["train", QUICK, "--workdir=w"],
    ("JAX_PROCESS_ID=2 is not below JAX_NUM_PROCESSES=2", "has no port"),
    {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
  ),
  "nobody else comes": Case(
    ["train", QUICK, "--workdir=w", "--start-timeout=1"],
    ("at localhost:1 as process 1 of 2 within --start-timeout=1 s",),
    {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
    status=75,
  ),
  "no job": Case(
    ["train", QUICK, "--workdir=w", "--distributed"],
    ("no TPU and none of JAX_COORDINATOR_ADDRESS, SLURM_JOB_ID", "Leave --distributed out"),
  ),
  "status that is none": Case(
    ["train", QUICK, "--workdir=w"],
    ("from 0 to 255 in OFA_JAX_INTERRUPTED_STATUS, found 'again'",),
    {"OFA_JAX_INTERRUPTED_STATUS": "again"},
  ),
  "no share": Case(
    ["extract_features", "--model=M", "--texts=t.jsonl", "--output=w", "--max-bad-rate=nan"],
    ("--max-bad-rate=nan: expected a share between 0 and 1",),
  ),
  "more than all": Case(
    ["generate", "--model=M", "--task=caption", "--input=t.tsv", "--max-bad-rate=1.5"],
    ("--max-bad-rate=1.5: expected a share between 0 and 1",),
  ),
  "a threshold for texts": Case(
    ["generate", "--model=M", "--task=caption", "--image=x.png", "--min-probability=0.5"],
    ("Expected --min-probability with --task=refcoco, found caption",),
  ),
  "a beam for pictures": Case(
    ["generate", "--model=M", "--task=image", "--text=x", "--output=w", "--num-beams=5"],
    ("Expected --num-beams with another task, found --task=image",),
  ),
  "nothing to calibrate": Case(
    ["calibrate", QUICK, "--checkpoint=w"],
    ("Expected a config with an evaluation of an OFA's answers, found Contrastive",),
  ),
  "no model": Case(["generate", "--task=caption"], ("Expected --model=VALUE, found none",)),
  "help": Case(
    ["train", "--help"],
    ("--workdir=", "--config=", "--interrupted-status=", "--start-timeout=")
    + tuple(
      f"--config.{field.name}"
      for field in dataclasses.fields(Config)
      if field.name not in ("model", "task", "evals")
    )
    + tuple(f"--config.optim.{field.name}=" for field in dataclasses.fields(Optim))
    + ("--config.mesh.fsdp=", "--config.evals[0].every="),
    status=0,
  ),
  "help of generate": Case(
    ["generate", "-h"],
    ("--precision=bf16|fp32|fp64", "--num-beams=", "\n      What to do.\n"),
    status=0,
  ),
  "help of extract_features": Case(
    ["extract_features", "--help"], ("--precision=", "--images=", "--max-bad-rate="), status=0
  ),
  "help of zeroshot": Case(["zeroshot", "--help"], ("--precision=", "--label-file="), status=0),
  "help of compile_ahead": Case(
    ["compile_ahead", "--help"], ("--topology=", "--config.optim.lr=", "--tries="), status=0
  ),
  "help of retrieve": Case(["retrieve", "-h"], ("retrieve topk", "retrieve to-tr"), status=0),
  "help of retrieve topk": Case(
    ["retrieve", "topk", "--help"], ("--image-feats=", "--top-k="), status=0
  ),
  "help of retrieve recall": Case(["retrieve", "recall", "-h"], ("--annotations=",), status=0),
  "help of a config": Case(
    ["train", QUICK, "--help"],
    (
      "--config.batch_size=128",
      "--config.model.vision.width=128",
      "--config.task.multi_positive=True",
      "--config.evals[1].every=50",
    ),
    status=0,
  ),
  "nothing to serve": Case(["serve"], ("Expected --model=VALUE, found none",)),
  "help of serve": Case(
    ["serve", "-h"], ("--model=", "--host=", "--max-batch=", "--image-feats="), status=0
  ),
  "help of calibrate": Case(["calibrate", "-h"], ("--checkpoint=", "--evals="), status=0),
  "help of evaluate": Case(
    ["evaluate", "--config=x", "--help"], ("--checkpoint=", "--config="), status=0
  ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  """Status and output of every case."""
  listed = []
  for case in CASES.values():
    folder = tmp_path_factory.mktemp("case")
    for name, content in case.files.items():
      (folder / name).write_text(content)
    command = [part.replace("{tmp}", str(folder)) for part in case.command]
    listed.append({"command": command, "environment": {**JOB, **case.environment}})
  return dict(zip(CASES, forked.run(listed), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_one_message_without_a_traceback(outcomes, name):
  status, output = outcomes[name]
  assert status == CASES[name].status, output
  for text in CASES[name].texts:
    assert text in output
  assert "Traceback" not in output
  if status:
    assert output.startswith("error: ") and len(output.splitlines()) <= 3, output
  assert not (ROOT / "w").exists()


def test_help_begins_with_what_must_be_given(outcomes):
  _, output = outcomes["help"]
  places = [output.index(f"  --{name}=") for name in ("config", "workdir", "interrupted-status")]
  assert places == sorted(places)


def test_ctrl_c_ends_a_command_with_one_line():
  script = (
    "import os, signal, time\nfrom ofa_jax import cli\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
    "with cli.readable('the same command goes on where it stopped'):\n"
    "  os.kill(os.getpid(), signal.SIGINT)\n  time.sleep(60)\n  raise AssertionError\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, cwd=ROOT
  )
  expected = "Interrupted; the same command goes on where it stopped\n"
  assert (result.returncode, result.stderr) == (130, expected)


def test_a_run_that_was_stopped_ends_without_the_interpreter_s_clearing_away():
  """Amid a compilation that would be a segmentation fault."""
  script = (
    "import atexit, os, sys\nfrom absl import flags\nfrom ofa_jax import cli\n"
    "from ofa_jax.engine import processes\n"
    "cli.define_interrupted_status()\nflags.FLAGS(['x', '--interrupted-status=75'])\n"
    "atexit.register(os.abort)\nprint('said')\n"
    "with cli.readable():\n  raise processes.Stopped('saved')\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, cwd=ROOT
  )
  assert (result.returncode, result.stdout, result.stderr) == (75, "said\n", "")


def test_every_field_of_the_config_is_explained(outcomes):
  _, output = outcomes["help"]
  for line, after in zip(output.splitlines(), [*output.splitlines()[1:], ""], strict=True):
    if line.startswith("  --"):
      assert after.startswith("      "), line


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.name)
def test_tools_have_help(tool):
  result = subprocess.run(
    [sys.executable, tool, "--help"], capture_output=True, text=True, timeout=100, cwd=ROOT
  )
  assert result.returncode == 0, result.stderr
  assert "usage:" in result.stdout or "What must be given:" in result.stdout
