"""Entailment, GLUE and summaries from their recipes and files to the files of their results."""

import dataclasses
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

import ofa_jax
from ofa_jax import evaluate, generate, trees
from ofa_jax.config import Eval, MeshShape
from ofa_jax.data.tsv import IMAGE, Table
from ofa_jax.engine import log
from ofa_jax.tasks.glue import PARTS
from ofa_jax.train import train
from tests import ofa_task_files, tiny
from tests.engine import test_step
from tests.test_train import assert_bit_equal, final_state

CONFIGS = Path(__file__).parent.parent / "configs"
RESULTS = {"snli_ve": "predict.json", "mnli": "MNLI-m.tsv", "gigaword": "predict.json"}


def files_of(name, folder, shapes):
  """The fields of a task that name its tiny files."""
  if name == "snli_ve":
    return ofa_task_files.snli_ve(folder, shapes)
  return (
    ofa_task_files.gigaword(folder) if name == "gigaword" else ofa_task_files.glue(name, folder)
  )


def tiny_config(name, folder, shapes):
  """The recipe of a task with a model of a few thousand parameters, for three steps."""
  file, argument = ("ofa_glue.py", name) if name in PARTS else (f"ofa_{name}.py", "base")
  recipe = runpy.run_path(str(CONFIGS / file))["get_config"](argument)
  task = dataclasses.replace(recipe.task, **files_of(name, folder, shapes))
  if name == "gigaword":
    search = dataclasses.replace(task.search, num_beams=2, max_length=6)
    task = dataclasses.replace(task, search=search, bootstrap=True)
  model = dataclasses.replace(tiny.OFA, vocab_size=task.words.vocab_size, freeze_resnet=True)
  return dataclasses.replace(
    recipe,
    model=model,
    task=task,
    init=None,
    batch_size=16,
    steps=3,
    epochs=None,
    log_every=1,
    save_every=2,
    save_every_epochs=0,
    keep=3,
    optim=dataclasses.replace(recipe.optim, lr=1e-3, eps=1e-4),
    mesh=MeshShape(data=1, fsdp=2),
    precision="fp32",
    remat="none",
    evals=(Eval(name="valid", task=task, every=2),),
  )


# More than half a minute each. Rows, loss, answers and files are compared in tests/tasks; whole
# runs of a task that chooses are, with a picture beside the text, those of test_vqa_training.py and
# of imagenet in test_ofa_tasks.py.
SLOW = {"snli_ve": pytest.mark.slow, "mnli": pytest.mark.slow}
pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(
  scope="module", params=[pytest.param(name, marks=SLOW.get(name, ())) for name in RESULTS]
)
def trained(request, tmp_path_factory, shapes):
  """Name, config, workdir and metrics of a run on two devices."""
  folder = tmp_path_factory.mktemp(request.param)
  config = tiny_config(request.param, folder, shapes)
  workdir = folder / "straight"
  return request.param, config, workdir, train(config, str(workdir))


def test_validated_with_a_file_of_results(trained):
  name, config, workdir, metrics = trained
  known = {f"valid/{metric}" for metric in config.task.metrics}
  assert set(metrics) == ({"valid/acc"} if name == "mnli" else known)
  content = (workdir / "results" / f"valid_{RESULTS[name]}").read_bytes()
  assert len(json.loads(content) if name != "mnli" else content.splitlines()[1:]) == 16
  plain = dataclasses.replace(config, mesh=MeshShape())
  assert evaluate.run(plain, str(workdir), results=str(workdir / "again")) == metrics
  assert (workdir / "again" / f"valid_{RESULTS[name]}").read_bytes() == content


def test_gone_on_with_bit_for_bit(trained, tmp_path):
  _, config, workdir, metrics = trained
  shutil.copytree(workdir, tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "checkpoints" / "3")
  assert train(config, str(tmp_path / "broken")) == metrics
  assert_bit_equal(final_state(workdir), final_state(tmp_path / "broken"))


@pytest.mark.parametrize(
  ("shape", "devices"),
  [
    (MeshShape(), 1),
    # Another minute of compiling.
    pytest.param(MeshShape(data=2, fsdp=2, tensor=2), 8, marks=pytest.mark.slow),
  ],
)
def test_one_and_eight_devices_are_two(trained, shape, devices):
  _, config, workdir, _ = trained
  alone = dataclasses.replace(config, mesh=shape, evals=())
  mesh = test_step.make_mesh(shape, devices)
  history, state = test_step.run(alone, steps=3, of=3, mesh=mesh)
  rows = [row for row in log.read_metrics(workdir) if "train/loss" in row]
  losses = [[row["train/loss"], row["train/grad_norm"]] for row in rows]
  np.testing.assert_allclose(losses, history, rtol=1e-5)
  stored = final_state(workdir)
  for path, x in trees.flatten(state.params).items():
    np.testing.assert_allclose(stored[f"model/params/{path}"], x, rtol=0, atol=1e-5, err_msg=path)


def test_the_command_and_python_answer_as_evaluations(trained, tmp_path):
  name, config, workdir, _ = trained
  content = (workdir / "results" / f"valid_{RESULTS[name]}").read_text()
  answering = generate.TASKS[name]
  if name == "mnli":
    told = [line.split("\t")[1] for line in content.splitlines()[1:]]
  else:
    told = [line[answering.result] for line in json.loads(content)]
  model, _ = ofa_jax.load_from_name(str(workdir))
  table = Table(config.task.valid, columns=answering.columns)
  options = generate.Options(search=config.task.search)
  output = tmp_path / "out.jsonl"
  assert generate.predict_file(model, name, table, output=output, options=options) == 16
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  assert [line[answering.result] for line in lines] == told
  texts = {
    column: [table.text(i, column) for i in range(16)]
    for column in answering.columns
    if column not in ("id", IMAGE)
  }
  images = None
  if IMAGE in answering.columns:
    rows = config.task.streams("valid")["examples"]
    images = [rows.row(i).image() for i in range(16)]
  answers = model.ask(answering, texts, images, search=config.task.search)
  assert [answering.tell(answer, np.ones(2)) for answer in answers] == told
