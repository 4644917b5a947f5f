"""Every task of OFA from its files to its results, by its own config with a model of no size.

Three updates on two devices, validated; gone on with after a break; evaluated again on a mesh of
another shape; and the same answers from the command that generates and from the API.
"""

import csv
import dataclasses
import functools
import json
import pathlib
import shutil

import numpy as np
import pytest

from ofa_jax import api, evaluate, generate, hub, trees
from ofa_jax.config import Config, MeshShape
from ofa_jax.data.images import IMAGENET_MEAN
from ofa_jax.data.rows import Row
from ofa_jax.data.tsv import IMAGE, BadRow, Table
from ofa_jax.engine import log
from ofa_jax.tasks.glue import PARTS
from ofa_jax.train import train
from tests.engine import test_step
from tests.ofa_task_cases import CASES, STEPS, Case, small
from tests.test_train import assert_bit_equal, final_state

pytestmark = pytest.mark.usefixtures("two_devices")


@dataclasses.dataclass(frozen=True)
class Run:
  """A case's run on two devices."""

  case: Case
  config: Config
  workdir: pathlib.Path
  metrics: dict[str, float]

  @property
  def file(self) -> pathlib.Path:
    """Its result file: of GLUE that for the server."""
    part = PARTS.get(self.case.generates)
    name = part.submission if part else "predict.json"
    return self.workdir / "results" / f"valid_{name}"

  def results(self) -> list[dict]:
    """The lines of its result file."""
    with self.file.open(encoding="utf-8") as lines:
      if self.file.suffix == ".json":
        return json.load(lines)
      return list(csv.DictReader(lines, delimiter="\t"))

  def table(self, folder: pathlib.Path) -> Table:
    """The rows of the validation as the command reads them."""
    places = self.case.columns or dict(generate.TASKS[self.case.generates].columns)
    if self.case.generates != "infilling":
      return Table(self.config.task.valid, columns=places)
    path = folder / "asked.tsv"  # the texts with their words hidden
    asked = [(line["id"], line["asked"].split('"')[1].strip()) for line in self.results()]
    path.write_text("".join(f"{number}\t{text}\n" for number, text in asked), encoding="utf-8")
    return Table([path], columns=places)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, shapes):
  """`name -> Run`, each trained once."""

  @functools.cache
  def train_once(name):
    case, folder = CASES[name], tmp_path_factory.mktemp(name)
    config = small(case, case.files(folder, shapes), MeshShape())
    workdir = folder / "run"
    return Run(case, config, workdir, train(config, str(workdir)))

  return train_once


SLOW = pytest.mark.slow  # each compiles training and evaluations twice, half a minute to a minute
ALL = pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if case.quick else SLOW) for name, case in CASES.items()]
)


@ALL
def test_trained_validated_and_gone_on_with(name, run_of, tmp_path):
  run = run_of(name)
  assert run.metrics.keys() == {f"valid/{metric}" for metric in run.case.metrics}
  assert all(np.isfinite(value) for value in run.metrics.values())
  losses = [row["train/loss"] for row in log.read_metrics(run.workdir) if "train/loss" in row]
  assert len(losses) == STEPS and np.isfinite(losses).all()
  lines = run.results()
  assert len(lines) == len(run.config.task.examples("valid"))
  assert all(tuple(line)[: len(run.case.result)] == run.case.result for line in lines)
  shutil.copytree(run.workdir, tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "checkpoints" / str(STEPS))
  assert train(run.config, str(tmp_path / "broken")) == run.metrics
  assert_bit_equal(final_state(run.workdir), final_state(tmp_path / "broken"))


@ALL
def test_generated_as_evaluated(name, run_of, tmp_path):
  """The command, file in and file out, and the API, which resizes the pictures itself."""
  run = run_of(name)
  task = run.config.evals[0].task
  colours = hub.open_model(str(run.workdir)).settings["imagenet_normalization"]
  assert colours is (task.pixel_mean == IMAGENET_MEAN)
  model, _ = api.load_from_name(str(run.workdir))
  answering = generate.TASKS[run.case.generates]
  if run.case.generates == "caption":  # a run that learnt captions says how they are searched for
    assert model.searches["caption"] == task.search
  table = run.table(tmp_path)
  choices = getattr(task, "choices", None)
  options = generate.Options(search=task.search, candidates=choices and choices.texts)
  output = tmp_path / "out.jsonl"
  generate.predict_file(model, run.case.generates, table, output=output, options=options)
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  expected = [line[run.case.result[-1]] for line in run.results()]
  assert [line[answering.result] for line in lines] == expected
  rows, images = [Row(table, i) for i in range(4)], None
  if IMAGE in table.columns:
    square = answering.square or (lambda image, size: image)
    images = [square(row.image(), model.image_size) for row in rows]
  told = {name: [row[name] for row in rows] for name in table.columns if name != IMAGE}
  answers, scores = generate.predict(model, run.case.generates, images, told, options=options)
  for answer, score, right in zip(answers, scores, expected, strict=False):
    if run.case.generates == "refcoco":
      same = right is None and score == -np.inf
      assert same or np.allclose(answer, right, rtol=1e-5)
    else:
      assert answering.tell(answer, np.ones(2)) == right


@ALL
def test_evaluated_again_on_another_mesh(name, run_of, tmp_path):
  run = run_of(name)
  config = dataclasses.replace(run.config, mesh=MeshShape(data=1, fsdp=2))
  again = evaluate.run(config, str(run.workdir), results=str(tmp_path))
  assert again == pytest.approx(run.metrics)
  assert (tmp_path / run.file.name).read_bytes() == run.file.read_bytes()


@pytest.mark.parametrize(
  ("shape", "devices"),
  [(MeshShape(), 1), pytest.param(MeshShape(data=2, fsdp=2, tensor=2), 8, marks=SLOW)],
)
@ALL
def test_one_and_eight_devices_are_two(name, shape, devices, run_of):
  run = run_of(name)
  alone = dataclasses.replace(run.config, mesh=shape, evals=())
  mesh = test_step.make_mesh(shape, devices)
  history, state = test_step.run(alone, steps=STEPS, of=STEPS, mesh=mesh)
  rows = [row for row in log.read_metrics(run.workdir) if "train/loss" in row]
  losses = [[row["train/loss"], row["train/grad_norm"]] for row in rows]
  np.testing.assert_allclose(losses, history, rtol=1e-5)
  stored = final_state(run.workdir)
  for path, x in trees.flatten(state.params).items():
    np.testing.assert_allclose(stored[f"model/params/{path}"], x, rtol=0, atol=1e-5, err_msg=path)


@ALL
def test_bad_rows_are_named(name, run_of, tmp_path):
  """A row that lacks a column, and one whose text is of another encoding."""
  run = run_of(name)
  lines = pathlib.Path(run.config.task.train[0]).read_bytes().splitlines()
  broken = b"\t".join(lines[0].split(b"\t")[:-1])
  columns = lines[1].split(b"\t")
  words = run.config.task.columns[-1]
  columns[words] = "é".encode("latin-1") + columns[words]
  path = tmp_path / "train.tsv"
  path.write_bytes(b"\n".join([broken, b"\t".join(columns), *lines[2:]]) + b"\n")
  task = dataclasses.replace(run.config.task, train=(str(path),))
  rows = task.examples("train")
  reasons = []
  for i in range(2):
    with pytest.raises(BadRow, match=r"columns separated by tabs|not UTF-8") as raised:
      rows.example(i, np.random.default_rng(0))
    reasons.append(str(raised.value))
  assert all(f"train.tsv:{i + 1}" in reason for i, reason in enumerate(reasons))
  rows.example(2, np.random.default_rng(0))
