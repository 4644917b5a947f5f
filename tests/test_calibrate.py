"""A model is calibrated by one command; evaluations, the API and the command that generates use it.

The model has no size and has learnt nothing. What is right is made of its own answers: of every
second row the reference is what it says.
"""

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from flax import nnx

from ofa_jax import api, calibrate, calibrations, evaluate, generate, hub, trees
from ofa_jax.config import Config, MeshShape
from ofa_jax.data.images import IMAGENET_MEAN
from ofa_jax.data.rows import Row
from ofa_jax.data.tsv import Table
from ofa_jax.tasks import confidence
from tests import ofa_picture_files as pictures
from tests.ofa_task_cases import CASES, small

SEED, SCALE = 0, 3  # of the parameters, whose answers then differ
NAMES = {"refcoco": "refcoco/generated", "imagenet": "classify/chosen"}


@dataclasses.dataclass(frozen=True)
class Model:
  """A model, and a config whose validation it is right in half the time."""

  directory: pathlib.Path
  config: Config

  @property
  def task(self):
    return self.config.evals[0].task


@pytest.fixture(scope="module", params=NAMES)
def name(request):
  return request.param


@pytest.fixture(scope="module")
def model(name, tmp_path_factory, shapes):
  folder = tmp_path_factory.mktemp(name)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pictures, "BINS", 129)  # one in four pixels
    config = small(CASES[name], CASES[name].files(folder, shapes), MeshShape())
  if name == "refcoco":  # boxes in the picture, of four corners that differ
    first = config.task.words.bin_id(0)
    bins = (first, first + config.task.image_size // 4 + 1)
    search = {"allowed_range": bins, "no_repeat_ngram_size": 1, "num_beams": 1, "max_length": 4}
    search = dataclasses.replace(config.task.search, **search)
    # With so many bins there are few tokens of several letters, and questions are long.
    task = dataclasses.replace(config.task, search=search, source_length=80)
    config = dataclasses.replace(
      config, task=task, evals=(dataclasses.replace(config.evals[0], task=task),)
    )
  directory, task = folder / "model", config.task
  _, params, rest = trees.split(config.model.build(rngs=nnx.Rngs(SEED)))
  params = jax.tree.map(lambda x: SCALE * x, params)
  settings = {
    "image_size": task.image_size,
    "imagenet_normalization": task.pixel_mean == IMAGENET_MEAN,
  }
  words = pathlib.Path(task.tokenizer)
  hub.save_directory(directory, config.model, params, rest, settings=settings, files=words)
  said = answered(name, api.load_from_name(str(directory))[0], task)
  lines = pathlib.Path(task.valid[0]).read_text(encoding="utf-8").splitlines()
  path = folder / "half.tsv"
  rows = [line.split("\t") for line in lines]
  for number, (row, answer) in enumerate(zip(rows, said, strict=True)):
    (_make_wrong if number % 2 else _make_right)(name, row, answer)
  path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
  return Model(directory, with_files(config, path))


def answered(name, ofa, task, **options):
  """What the API says of all rows."""
  rows = [Row(table_of(name, task), i) for i in range(16)]
  images = [row.image() for row in rows]
  if name == "imagenet":
    return ofa.classify(images, task.choices.texts, **options)
  return ofa.ground(images, [row["text"] for row in rows], search=task.search, **options)


def table_of(name, task):
  """The rows of the validation, for the command."""
  case = CASES[name]
  columns = case.columns or dict(generate.TASKS[case.generates].columns)
  return Table(task.valid, columns=columns)


def _make_right(name, row, answer):
  """Makes the model's answer a row's reference, if it can be one."""
  if name == "imagenet":
    row[2] = answer
  else:
    x0, y0, x1, y1 = answer
    if 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64:
      row[3] = f"{x0},{y0},{x1},{y1}"


def _make_wrong(name, row, answer):
  """Makes a row's reference another than the model's answer."""
  if name == "imagenet":
    row[2] = "blue square" if answer == "red square" else "red square"
  else:
    row[3] = "0,0,0.5,0.5"  # smaller than the distance of two bins


def with_files(config, path, **changes):
  """The config with another validation split."""
  task = dataclasses.replace(config.evals[0].task, valid=(str(path),), **changes)
  return dataclasses.replace(config, evals=(dataclasses.replace(config.evals[0], task=task),))


def test_probabilities_are_the_same_everywhere(name, model, tmp_path, capsys):
  directory = tmp_path / "model"
  shutil.copytree(model.directory, directory)
  fits = calibrate.run(model.config, str(directory))
  (fit,) = fits.values()
  assert fits.keys() == {NAMES[name]} and fit.rows == 16 and 0 < fit.right < 1
  said = capsys.readouterr().out
  assert f"expected calibration error {fit.ece_before:.4f} before, {fit.ece_after:.4f}" in said
  assert f"{directory}/{calibrations.NAME}" in said

  metrics = evaluate.run(model.config, str(directory), results=str(tmp_path / "results"))
  assert f"temperature {fit.temperature:.3g}, fitted to 16 answers" in capsys.readouterr().err
  assert metrics.keys() == {"valid/score", "valid/ece"}
  assert metrics["valid/score"] == pytest.approx(fit.right)
  told = json.loads((tmp_path / "results" / "valid_confidence.json").read_text())
  probabilities = np.array([line["probability"] for line in told])
  assert [line["row"] for line in told] == [*range(16)]
  assert ((probabilities > 0) & (probabilities < 1)).all()

  ofa, _ = api.load_from_name(str(directory))
  assert ofa.calibrations[NAMES[name]].temperature == fit.temperature
  assert f"calibrations=['{NAMES[name]}']" in repr(ofa)
  choices = getattr(model.task, "choices", None)
  options = generate.Options(
    search=model.task.search, candidates=choices and choices.texts, probabilities=True
  )
  table, kind = table_of(name, model.task), CASES[name].generates
  output = tmp_path / "out.jsonl"
  generate.predict_file(ofa, kind, table, output=output, options=options)
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  np.testing.assert_allclose([x["probability"] for x in lines], probabilities, rtol=1e-4)
  told = answered(name, ofa, model.task, return_scores=True, return_probabilities=True)
  np.testing.assert_allclose(told[1], [line["score"] for line in lines], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(told[2], probabilities, rtol=1e-4)
  if name == "refcoco":
    check_boxes(ofa, table, options)
    check_absent(model, directory, probabilities, table, ofa, options, tmp_path)


def check_boxes(ofa, table, options):
  """Several boxes of a phrase: no two are nearly the same, and the likeliest come first."""
  rows = [Row(table, i) for i in range(len(table))]
  images, phrases = [row.image() for row in rows], [row["text"] for row in rows]
  search = dataclasses.replace(options.search, num_beams=4)
  best, scores = ofa.ground(images, phrases, search=search, any_box=True, return_scores=True)
  several = ofa.ground_all(images, phrases, search=search)
  for boxes, box, score in zip(several, best, scores, strict=True):
    assert len(boxes.boxes) == len(boxes.scores) == len(boxes.probabilities) >= 1
    (place,) = np.flatnonzero((boxes.boxes == box).all(axis=1))
    assert boxes.scores[place] >= score * 5**options.search.length_penalty - 1e-5
    assert (np.diff(boxes.probabilities) <= 0).all() and (boxes.probabilities <= 1).all()
    assert len(confidence.merged(boxes.boxes, boxes.scores)) == len(boxes.boxes)
  limit = float(np.median([boxes.probabilities[0] for boxes in several]))
  few = ofa.ground_all(images, phrases, search=search, min_probability=limit, most=1)
  expected = [int(boxes.probabilities[0] >= limit) for boxes in several]
  assert [len(boxes.boxes) for boxes in few] == expected and sum(expected) > 0
  drawn = dataclasses.replace(search, sample=True)
  once, again = (ofa.ground_all(images, phrases, search=drawn, seed=3) for _ in range(2))
  for a, b in zip(once, again, strict=True):
    np.testing.assert_array_equal(a.boxes, b.boxes)
    assert len(a.boxes) <= 4
  assert any(len(boxes.boxes) for boxes in once)


def check_absent(model, directory, probabilities, table, ofa, options, folder):
  """Boxes below a probability are not told, by any of the three."""
  rising = np.sort(probabilities)
  place = np.argmax(np.diff(rising))
  limit = float(rising[place : place + 2].mean())
  config = with_files(model.config, *model.task.valid, min_probability=limit)
  evaluate.run(config, str(directory), results=str(folder / "absent"))
  lines = json.loads((folder / "absent" / "valid_predict.json").read_text())
  told = [line["box"] is not None for line in lines]
  assert told == list(probabilities >= limit) and 0 < sum(told) < 16
  options = dataclasses.replace(options, min_probability=limit)
  output = folder / "absent.jsonl"
  generate.predict_file(ofa, "refcoco", table, output=output, options=options)
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  assert [line["box"] is not None for line in lines] == told
  assert all(line["score"] is not None and "probability" in line for line in lines)
  many = dataclasses.replace(options, most_boxes=2)
  generate.predict_file(ofa, "refcoco", table, output=folder / "many.jsonl", options=many)
  lines = [json.loads(line) for line in (folder / "many.jsonl").read_text().splitlines()]
  assert all(len(line["boxes"]) <= 2 for line in lines) and any(line["boxes"] for line in lines)
  assert all(x["probability"] >= limit for line in lines for x in line["boxes"])


def test_nothing_to_fit_to_is_told_in_one_line(name, model, tmp_path):
  if name == "refcoco":
    pytest.skip("one kind of answers is enough")
  lines = pathlib.Path(model.task.valid[0]).read_text(encoding="utf-8").splitlines()
  wrong = tmp_path / "wrong.tsv"
  wrong.write_text("".join(f"{line}\n" for line in lines[1::2]), encoding="utf-8")
  with pytest.raises(ValueError, match=r"evals\[valid\].*all 8 wrong") as raised:
    calibrate.run(with_files(model.config, wrong), str(model.directory))
  assert "\n" not in str(raised.value)
  assert not list(model.directory.rglob(calibrations.NAME))


def test_probabilities_of_a_model_that_is_not_calibrated(name, model):
  ofa, _ = api.load_from_name(str(model.directory))
  black = np.zeros((8, 8, 3), np.uint8)
  said = f"expected a calibration of {NAMES[name]}.*ofa_jax.calibrate"
  with pytest.raises(ValueError, match=said):
    if name == "imagenet":
      ofa.classify([black], ["a", "b"], return_probabilities=True)
    else:
      ofa.ground([black], ["red"], min_probability=0.5)
  if name == "refcoco":
    with pytest.raises(ValueError, match=said):
      ofa.ground_all([black], ["red"], min_probability=0.5)
    limited = with_files(model.config, *model.task.valid, min_probability=0.5)
    with pytest.raises(ValueError, match=f"task.min_probability: {said}"):
      evaluate.run(limited, str(model.directory))


def test_what_can_be_fitted_is_kept_beside_what_cannot():
  class Evaluator:
    def __init__(self, fit):
      self.found = fit

    def fit(self, params, rest):
      if isinstance(self.found, Exception):
        raise self.found
      return self.found

  loaded = types.SimpleNamespace(params=None, rest=None)
  wrong = Evaluator(ValueError("evals[valid/digits]: all 8 wrong"))
  fits, left_out = calibrate._fitted({"a/chosen": Evaluator(1.0), "b/chosen": wrong}, loaded)
  assert fits == {"a/chosen": 1.0} and left_out == ["evals[valid/digits]: all 8 wrong"]
  with pytest.raises(ValueError, match="all 8 wrong"):
    calibrate._fitted({"b/chosen": wrong}, loaded)


def test_what_cannot_be_calibrated(model):
  with pytest.raises(ValueError, match="out of valid in --evals, found vald"):
    calibrate.run(model.config, str(model.directory), only=("vald",))
  twice = dataclasses.replace(model.config.evals[0], name="again")
  config = dataclasses.replace(model.config, evals=(*model.config.evals, twice))
  with pytest.raises(ValueError, match=r"one evaluation of .*--evals=again"):
    calibrate.run(config, str(model.directory))
