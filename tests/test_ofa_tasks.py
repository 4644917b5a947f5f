"""Every task of OFA from its files to its results, by its own config with a model of no size.

Three updates on two devices, validated; gone on with after a break; evaluated again on a mesh of
another shape; and the same answers from the command that generates and from the API.
"""

import dataclasses
import functools
import json
import pathlib
import runpy
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from ofa_jax import api, evaluate, generate, hub, trees
from ofa_jax.config import Config, MeshShape
from ofa_jax.data.images import IMAGENET_MEAN
from ofa_jax.data.rows import Row
from ofa_jax.data.tsv import IMAGE, BadRow, Table
from ofa_jax.engine import log
from ofa_jax.tokenizers.ofa import OFATokenizer
from ofa_jax.train import train
from tests import ofa_picture_files as pictures
from tests import tiny
from tests.engine import test_step
from tests.test_train import assert_bit_equal, final_state

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
STEPS = 3
pytestmark = pytest.mark.usefixtures("two_devices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A task.

  Attributes:
    config: the config's file and argument.
    files: `(folder, shapes) -> fields of the task`, writes its data.
    metrics: of the validation.
    result: keys of a line in the result file.
    generates: the command's name of the task; None: it does not generate it.
    answer: the key of the answer in the command's lines; in the result file it is the last one.
    columns: of the command's input beside the defaults.
    quick: whether it is among the quick tests; the others are of the same classes.
  """

  config: tuple[str, str]
  files: Callable[[pathlib.Path, pathlib.Path], dict[str, object]]
  metrics: tuple[str, ...]
  result: tuple[str, ...]
  generates: str | None = None
  answer: str | None = None
  columns: dict[str, int] = dataclasses.field(default_factory=dict)
  quick: bool = False


CASES = {
  "caption": Case(
    config=("ofa_caption.py", "base"),
    files=pictures.caption,
    metrics=("cider", "bleu4", "rouge_l", "exact"),
    result=("image_id", "caption"),
    generates="caption",
  ),
  "vqa": Case(
    config=("ofa_vqa.py", "base"),
    files=pictures.vqa,
    metrics=("vqa_score",),
    result=("question_id", "answer"),
    generates="vqa",
  ),
  "refcoco": Case(
    config=("ofa_refcoco.py", "refcoco+,base"),
    files=pictures.refcoco,
    metrics=("score",),
    result=("uniq_id", "box"),
    generates="refcoco",
    quick=True,
  ),
  "refcoco_chinese": Case(
    config=("ofa_refcoco.py", "refcocog,base,chinese"),
    files=pictures.refcoco_chinese,
    metrics=("score",),
    result=("uniq_id", "box"),
    generates="refcoco",
    columns={"id": 0, IMAGE: 3, "text": 1},
  ),
  "imagenet": Case(
    config=("ofa_imagenet.py", "base"),
    files=pictures.image_classify,
    metrics=("score",),
    result=("uniq_id", "answer"),
    generates="classify",
    answer="class",
    columns={IMAGE: 0},
    quick=True,
  ),
  "ocr": Case(
    config=("ofa_ocr.py", "base"),
    files=pictures.ocr,
    metrics=("acc", "ned"),
    result=("image_id", "ocr"),
    generates="ocr",
  ),
  "muge": Case(
    config=("ofa_muge.py", "base"),
    files=pictures.muge,
    metrics=("cider", "bleu4", "rouge_l", "exact"),
    result=("image_id", "caption"),
    generates="caption",
  ),
}


def small(case: Case, fields: dict[str, object], mesh: MeshShape) -> Config:
  """The config of a case with its files and a model as small as they are."""
  name, argument = case.config
  config = runpy.run_path(str(CONFIGS / name))["get_config"](argument)
  words = OFATokenizer.from_directory(fields["tokenizer"])
  search = dataclasses.replace(config.task.search, num_beams=2)
  search = dataclasses.replace(search, max_length=min(search.max_length, 8))
  fields = {**fields, "search": search}
  return dataclasses.replace(
    config,
    init=None,
    model=dataclasses.replace(
      tiny.OFA,
      vocab_size=words.vocab_size,
      num_codes=words.num_codes,
      num_bins=words.num_bins,
      freeze_resnet=True,
    ),
    task=dataclasses.replace(config.task, **fields),
    batch_size=16,
    steps=STEPS,
    epochs=None,
    log_every=1,
    save_every=2,
    save_every_epochs=0,
    keep=2,
    optim=dataclasses.replace(config.optim, lr=1e-3, eps=1e-4, warmup=1, warmup_ratio=0.0),
    precision="fp32",
    remat="none",
    mesh=mesh,
    evals=tuple(
      dataclasses.replace(e, task=dataclasses.replace(e.task, **fields), every=2, every_epochs=0)
      for e in config.evals
    ),
  )


@dataclasses.dataclass(frozen=True)
class Run:
  """A case's run on two devices."""

  case: Case
  config: Config
  workdir: pathlib.Path
  metrics: dict[str, float]

  def results(self) -> list[dict]:
    """The lines of its result file."""
    return json.loads((self.workdir / "results" / "valid_predict.json").read_text())


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
  if run.case.generates is None:
    pytest.skip("the command has no such task")
  colours = hub.open_model(str(run.workdir)).settings["imagenet_normalization"]
  assert colours is (task.pixel_mean == IMAGENET_MEAN)
  model, _ = api.load_from_name(str(run.workdir))
  answering = generate.TASKS[run.case.generates]
  if run.case.generates == "caption":  # a run that learnt captions says how they are searched for
    assert model.searches["caption"] == task.search
  table = Table(task.valid, columns=run.case.columns or dict(answering.columns))
  choices = getattr(task, "choices", None)
  options = generate.Options(search=task.search, candidates=choices and choices.texts)
  output = tmp_path / "out.jsonl"
  generate.predict_file(model, run.case.generates, table, output=output, options=options)
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  expected = [line[run.case.result[-1]] for line in run.results()]
  key = run.case.answer or run.case.result[-1]
  assert [line[key] for line in lines] == expected
  rows = [Row(table, i) for i in range(4)]
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
  stored = (tmp_path / "valid_predict.json").read_bytes()
  assert json.loads(stored) == run.results()


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=SLOW)])
@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name == "refcoco" else SLOW) for name in CASES]
)
def test_one_and_eight_devices_are_two(name, devices, run_of):
  run = run_of(name)
  alone = dataclasses.replace(run.config, evals=())
  mesh = test_step.make_mesh(devices=devices)
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
