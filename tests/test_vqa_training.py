"""VQA from its files to the answers for EvalAI, on any mesh, with a break."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ofa_jax import evaluate, trees
from ofa_jax.config import MeshShape
from ofa_jax.engine import log
from ofa_jax.train import train
from tests import tiny, vqa_files
from tests.compiling import QUICK
from tests.engine import test_step
from tests.test_processes import ROOT, finish, port  # noqa: F401 (a fixture)
from tests.test_train import assert_bit_equal, final_state

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(scope="module")
def questions(tmp_path_factory, shapes):
  return vqa_files.write(tmp_path_factory.mktemp("vqa"), shapes)


@pytest.fixture(scope="module")
def config(questions):
  return tiny.vqa_config(questions, evals=True, mesh=MeshShape(data=1, fsdp=2))


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
  """Workdir and metrics of a run on two devices."""
  workdir = tmp_path_factory.mktemp("straight")
  return workdir, train(config, str(workdir))


def test_validated_both_ways_with_a_file_for_evalai(config, straight):
  workdir, metrics = straight
  assert metrics.keys() == {"valid/vqa_score", "beam/vqa_score"}
  for name in ("valid", "beam"):
    lines = json.loads((workdir / "results" / f"{name}_predict.json").read_text())
    assert [line["question_id"] for line in lines] == list(range(24))
    assert {line["answer"] for line in lines} <= set(config.task.choices.texts)
  # The stored average, on another mesh, with its rows split otherwise.
  plain = dataclasses.replace(config, mesh=MeshShape(), evals=config.evals[:1])
  again = evaluate.run(plain, str(workdir), results=str(workdir / "again"))
  assert again == {"valid/vqa_score": metrics["valid/vqa_score"]}
  files = [workdir / folder / "valid_predict.json" for folder in ("results", "again")]
  assert files[0].read_bytes() == files[1].read_bytes()


def test_gone_on_with_bit_for_bit(config, straight, tmp_path):
  workdir, metrics = straight
  shutil.copytree(workdir, tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "checkpoints" / "6")
  assert train(config, str(tmp_path / "broken")) == metrics
  assert_bit_equal(final_state(workdir), final_state(tmp_path / "broken"))


# A quarter of a minute and more; among the quick ones are captions, boxes and summaries.
@pytest.mark.slow
@pytest.mark.parametrize(
  ("shape", "devices"), [(MeshShape(), 1), (MeshShape(data=2, fsdp=2, tensor=2), 8)]
)
def test_one_and_eight_devices_are_two(config, straight, shape, devices):
  alone = dataclasses.replace(config, mesh=shape, evals=())
  mesh = test_step.make_mesh(shape, devices)
  history, state = test_step.run(alone, steps=6, of=6, mesh=mesh)
  rows = [row for row in log.read_metrics(straight[0]) if "train/loss" in row]
  assert [row["step"] for row in rows] == [2, 4, 6]
  losses = [[row["train/loss"], row["train/grad_norm"]] for row in rows]
  np.testing.assert_allclose(losses, history[1::2], rtol=1e-5)
  stored = final_state(straight[0])
  for name, tree in (("model/params", state.params), ("ema", state.ema)):
    for path, x in trees.flatten(tree).items():
      np.testing.assert_allclose(stored[f"{name}/{path}"], x, rtol=0, atol=1e-5, err_msg=path)


CONFIG = """
import pathlib
from tests import tiny

def get_config():
  folder = pathlib.Path({folder!r})
  return tiny.vqa_config(folder, evals=True, precision="fp64", steps=2, log_every=1)
"""


def start(config, workdir, **environment):
  """The training command on a config file."""
  return subprocess.Popen(
    [sys.executable, "-m", "ofa_jax.train", f"--config={config}", f"--workdir={workdir}"],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    env={**os.environ, **QUICK, **environment},
  )  # fmt: skip


@pytest.mark.slow  # three processes compile training and both evaluations: about a minute
def test_two_processes_are_one(questions, tmp_path, port):  # noqa: F811
  config = tmp_path / "config.py"
  config.write_text(CONFIG.format(folder=str(questions)))
  finish(start(config, tmp_path / "one"))
  job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
  both = [start(config, tmp_path / "two", **job, JAX_PROCESS_ID=str(i)) for i in range(2)]
  outputs = [finish(process) for process in both]
  assert "on 2 host(s)" in outputs[0]
  one, two = (log.read_metrics(tmp_path / folder) for folder in ("one", "two"))
  assert len(one) == len(two) == 3 and one[-1].keys() >= {"valid/vqa_score", "beam/vqa_score"}
  for a, b in zip(one[:2], two[:2], strict=True):
    for name, rtol in (("train/loss", 1e-9), ("train/grad_norm", 1e-6)):  # that one is a float32
      np.testing.assert_allclose(b[name], a[name], rtol=rtol)
  assert one[-1] == two[-1]
  for path in (tmp_path / "one" / "results").iterdir():
    assert (tmp_path / "two" / "results" / path.name).read_bytes() == path.read_bytes()
