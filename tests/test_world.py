"""The quickstart's small world: six tasks learnt at once, each scored by its own metric."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import ofa_jax
from ofa_jax import cli, pictures
from ofa_jax.config import Config
from ofa_jax.data import pipeline, quickstart_world
from ofa_jax.data.tsv import Table
from ofa_jax.engine import log, sharding, step
from ofa_jax.tasks import infilling
from ofa_jax.tokenizers.special import EOS
from ofa_jax.validation import validate

ROOT = Path(__file__).parent.parent
# What the recipe is to reach; docs/gallery.md has what a run did.
GOALS = {"vqa": 0.95, "refcoco": 0.85, "snli_ve": 0.95, "exact": 0.95, "digits": 0.95}


def load(argument: str = "world") -> Config:
  return runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"](argument)


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Iterator[Config]:
  """The same of few pictures, with a small model, for three steps."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(quickstart_world, "PICTURES", {"train": 32, "valid": 8, "novel": 8})
    patch.setattr(quickstart_world, "SENTENCES", {"train": 16, "valid": 8})
    patch.setenv("OFA_JAX_DATA", str(tmp_path_factory.mktemp("data")))
    yield made_small(load())


def made_small(base: Config) -> Config:
  sizes = {"width": 32, "mlp": 64, "encoder_layers": 1, "decoder_layers": 1}
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, **sizes),
    batch_size=8,
    steps=3,
    log_every=1,
    save_every=0,
  )


def test_evaluations_have_the_names_of_their_tasks(micro):
  names = {e.called(m) for e in micro.evals for m in e.task.metrics}
  expected = {f"{split}/{name}" for split in ("valid", "novel") for name in GOALS}
  assert expected - names == {"novel/digits"}  # there are no unseen digits
  assert {"valid/infilling_exact", "valid/cider"} <= names
  assert micro.task.joined() == [
    ["caption", "vqa", "refcoco", "snli_ve", "digits"],
    ["infilling"],
  ]
  sizes = micro.task.batch_sizes(16)
  assert sizes["caption"] == 16 and all(size % 8 == 0 for size in sizes.values())


@pytest.mark.usefixtures("micro")  # its files
def test_learning_from_rewards_begins_with_a_step_that_stays():
  base, number = load(), int(load("world_scst").init.removeprefix("runs/world@"))
  saved = range(base.save_every, base.steps + 1, base.save_every)
  assert number in saved[-base.keep :]


def test_tasks_are_changed_by_flags(micro):
  argv = ["train", f"--config={ROOT / 'configs' / 'quickstart.py'}:world"]
  argv += ["--config.task.tasks.vqa.page=3", "--config.task.shares.vqa=5"]
  argv += ["--config.task.tasks.caption.train=a.tsv,b.tsv", "--config.task.multiple=4"]
  values = flags.FlagValues()
  holder = cli.define_config(flag_values=values, argv=argv)
  values(argv)
  task = holder.value.task
  assert task.tasks["vqa"].page == 3 and task.tasks["caption"].train == ("a.tsv", "b.tsv")
  assert task.batch_sizes(8)["vqa"] == 40 and task.batch_sizes(4)["digits"] == 4


@pytest.mark.slow  # six passes of an OFA to compile, 25 s; test_mixture.py trains smaller models
def test_a_few_steps_learn_every_task(micro):
  validate(micro, devices=1)
  mesh = sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
  program = step.build(micro, mesh, steps=3)
  state, update = step.init(program), step.train_step(program)
  frozen = micro.task.frozen(mesh, precision="fp32")
  with pipeline.train_batches(
    micro.task.examples("train"),
    batch_size=micro.task.batch_sizes(micro.batch_size),
    seed=0,
    start=0,
    bad=pipeline.BadRows(0.0),
  ) as batches:
    for _ in range(3):
      state, metrics = update(state, sharding.to_global(next(batches), mesh), frozen)
      assert int(metrics["bad"][0]) == 0
  for name in micro.task.tasks:
    assert np.isfinite(float(metrics[f"{name}/loss"])) and f"{name}/accuracy" in metrics


def test_pages_show_answers_and_boxes(micro, monkeypatch):
  pages = []
  monkeypatch.setattr(pictures, "page", lambda name, rows: pages.append(rows) or {name: b""})
  task = micro.task.tasks["refcoco"]
  streams = task.streams("valid")
  rows, words = streams["examples"], task.words
  sizes = np.full((8, 2), 64, np.float32)
  tokens = np.full((8, 5), EOS, np.int32)  # no boxes, but those of the first two rows
  tokens[0, :4] = rows.example(0, None)["target"][:4]
  tokens[1, :4] = [words.bin_id(i) for i in (0, 0, 31, 31)]
  predictions = {"examples": {"tokens": tokens, "size": sizes, "valid": np.arange(8) < 3}}
  assert "page" in task.results(predictions, streams)
  ((right, wrong, none),) = pages.pop()
  assert [cell.lines[0][1] for cell in (right, wrong, none)] == [
    pictures.RIGHT,
    pictures.WRONG,
    pictures.WRONG,
  ]
  assert [len(cell.boxes) for cell in (right, wrong, none)] == [2, 2, 1]
  expected, told = (np.array(box) for box, _ in right.boxes)
  np.testing.assert_allclose(told, expected, atol=180 / 32)
  vqa, streams = micro.task.tasks["vqa"], micro.task.tasks["vqa"].streams("valid")
  answers = vqa.choices.texts
  expected = [streams["examples"].row(i)["answer"].partition("|!+")[2] for i in range(2)]
  numbers = [answers.index(expected[0]), (answers.index(expected[1]) + 1) % len(answers)]
  predictions = {"examples": {"answer": np.array(numbers), "valid": np.ones(2, bool)}}
  assert "page" in vqa.results(predictions, streams)
  ((right, wrong),) = pages.pop()
  assert right.lines[1] == (expected[0], pictures.RIGHT) and len(right.lines) == 2
  assert wrong.lines[1][1] == pictures.WRONG and wrong.lines[2] == (expected[1], pictures.PLAIN)


@pytest.mark.slow  # the whole run, which takes two cores minutes
def test_the_world_is_learnt_and_every_way_to_ask_gives_the_same(tmp_path):
  run = tmp_path / "run"
  where = {**os.environ, "OFA_JAX_DATA": str(tmp_path / "data"), "JAX_PLATFORMS": "cpu"}

  def command(module, *flags):
    line = [sys.executable, "-m", f"ofa_jax.{module}", *flags]
    done = subprocess.run(line, cwd=ROOT, env=where, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

  config = "--config=configs/quickstart.py:world"
  command("train", config, f"--workdir={run}")
  learnt = [row for row in log.read_metrics(run) if "valid/vqa" in row][-1]
  for name, goal in GOALS.items():
    assert learnt[f"valid/{name}"] >= goal, name
  assert learnt["novel/vqa"] >= 0.75

  output = tmp_path / "metrics.json"
  pages = f"--results={tmp_path / 'pages'}"
  command("evaluate", config, f"--checkpoint={run}", f"--output={output}", pages)
  assert (tmp_path / "pages" / "valid_vqa_page.png").is_file()
  repeated = json.loads(output.read_text())
  for name, value in repeated.items():
    assert value == pytest.approx(learnt[name], abs=1e-6), name

  data = quickstart_world.world(tmp_path / "data")
  flags = {
    "caption": [],
    "vqa": [f"--candidates={data / 'answers.txt'}", "--columns=id:0,image:5,text:2"],
    "refcoco": [],
    "snli_ve": ["--columns=id:0,image:2,text:3"],
  }
  results = {"caption": "valid", "vqa": "valid_vqa"}
  for task, more in flags.items():
    answers = tmp_path / f"{task}.jsonl"
    table = data / f"{task}_valid.tsv"
    command(
      "generate",
      f"--model={run}",
      f"--task={task}",
      f"--input={table}",
      f"--output={answers}",
      *more,
    )
    told = [json.loads(line) for line in answers.read_text().splitlines()]
    name = results.get(task, f"valid_{task}")
    expected = json.loads((run / "results" / f"{name}_predict.json").read_text())
    for mine, theirs in zip(told, expected, strict=True):
      keys = [key for key in theirs if key in mine]
      assert keys and [mine[key] for key in keys] == [theirs[key] for key in keys], task

  model, _ = ofa_jax.load_from_name(str(run))
  table = Table([data / "digits_valid.tsv"], columns={"image": 0, "label": 2})
  classes = (data / "digits.txt").read_text().split()
  images = [table.encoded(i) for i in range(40)]
  expected = json.loads((run / "results" / "valid_digits_predict.json").read_text())[:40]
  assert model.classify(images, classes) == [row["answer"] for row in expected]
  expected = json.loads((run / "results" / "valid_infilling_predict.json").read_text())[:8]
  asked = [row["asked"].split('"')[1].strip() for row in expected]
  told = model.ask(infilling.ANSWERING, {"text": asked})
  assert told == [row["text"] for row in expected]
