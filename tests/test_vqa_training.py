"""VQA from its files to the answers for EvalAI, on any mesh, with a break."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ofa_jax import evaluate, log
from ofa_jax.config import MeshShape
from ofa_jax.train import train
from tests import test_step, tiny, vqa_files
from tests.test_processes import ROOT, finish, port  # noqa: F401 (a fixture)
from tests.test_train import assert_bit_equal, final_state


@pytest.fixture(scope="module")
def questions(tmp_path_factory, shapes):
  return vqa_files.write(tmp_path_factory.mktemp("vqa"), shapes)


def test_trained_validated_both_ways_and_gone_on_with(questions, tmp_path):
  config = tiny.vqa_config(questions, evals=True)
  metrics = train(config, str(tmp_path / "straight"))
  assert metrics.keys() == {"valid/vqa_score", "beam/vqa_score"}
  assert all(np.isfinite(row["train/loss"]) for row in log.read_metrics(tmp_path / "straight"))
  for name in ("valid", "beam"):
    file = tmp_path / "straight" / "results" / f"{name}_predict.json"
    lines = json.loads(file.read_text())
    assert [line["question_id"] for line in lines] == list(range(24))
    assert {line["answer"] for line in lines} <= set(config.task.choices.texts)

  shutil.copytree(tmp_path / "straight", tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "checkpoints" / "6")
  assert train(config, str(tmp_path / "broken")) == metrics
  assert_bit_equal(final_state(tmp_path / "straight"), final_state(tmp_path / "broken"))

  config.mesh = MeshShape(data=2, fsdp=2, tensor=2)
  again = evaluate.run(config, str(tmp_path / "straight"), results=str(tmp_path / "again"))
  assert again == metrics
  for path in (tmp_path / "straight" / "results").iterdir():
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_eight_devices_are_one(questions):
  config = tiny.vqa_config(questions)
  history, state = test_step.run(config, steps=3)
  mesh = MeshShape(data=2, fsdp=2, tensor=2)
  split = dataclasses.replace(config, mesh=mesh)
  again, same = test_step.run(split, steps=3, mesh=test_step.make_mesh(mesh, 8))
  np.testing.assert_allclose(again, history, rtol=1e-5)
  test_step.assert_trees_close(same.params, state.params, atol=1e-5)
  test_step.assert_trees_close(same.ema, state.ema, atol=1e-5)


CONFIG = """
import pathlib
from tests import tiny

def get_config():
  folder = pathlib.Path({folder!r})
  return tiny.vqa_config(folder, evals=True, precision="fp64", steps=4, log_every=1)
"""


def start(config, workdir, **environment):
  """The training command on a config file."""
  return subprocess.Popen(
    [sys.executable, "-m", "ofa_jax.train", f"--config={config}", f"--workdir={workdir}"],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
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
  assert len(one) == len(two) == 5 and one[-1].keys() >= {"valid/vqa_score", "beam/vqa_score"}
  for a, b in zip(one[:4], two[:4], strict=True):
    for name in ("train/loss", "train/grad_norm"):
      np.testing.assert_allclose(b[name], a[name], rtol=1e-9)
  assert one[-1] == two[-1]
  for path in (tmp_path / "one" / "results").iterdir():
    assert (tmp_path / "two" / "results" / path.name).read_bytes() == path.read_bytes()
