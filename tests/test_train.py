"""A run from its config to its files, in one process."""

import base64
import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest

from ofa_jax import evaluate, log, trees
from ofa_jax.config import MeshShape
from ofa_jax.data import pipeline
from ofa_jax.data.pairs import PairData
from ofa_jax.train import train
from tests import tiny


def final_state(workdir):
  """All arrays of the newest checkpoint by path, as they lie on disk."""
  import orbax.checkpoint as ocp

  newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
  items = {}
  for item in ("model", "ema", "ema_rest", "train"):
    if not (newest / item).exists():
      continue
    tree = ocp.StandardCheckpointer().restore(newest / item)
    items |= {f"{item}/{path}": np.asarray(x) for path, x in trees.flatten(tree).items()}
  return items


def assert_bit_equal(a, b):
  assert a.keys() == b.keys()
  for path, x in a.items():
    np.testing.assert_array_equal(x, b[path], err_msg=path)


@pytest.fixture(scope="module")
def configs(digits, shapes):
  """`(...) -> Config` of a small run, by the family."""
  return {
    "cnclip": functools.partial(tiny.config, digits),
    "ofa": functools.partial(tiny.caption_config, shapes),
  }


@pytest.fixture(scope="module")
def runs(configs, tmp_path_factory):
  """`family -> (workdir, results)` of a finished run of six steps with evaluations."""

  @functools.cache
  def run(family):
    workdir = tmp_path_factory.mktemp(family)
    return workdir, train(configs[family](evals=True), str(workdir))

  return run


@pytest.fixture(params=["cnclip", "ofa"])
def family(request):
  return request.param


@pytest.fixture
def straight(runs):
  return runs("cnclip")


def test_files_of_a_run(straight):
  workdir, results = straight
  names = {p.name for p in workdir.iterdir()}
  files = {"config.json", "curves.png", "log.txt", "metrics.jsonl"}
  assert names == {"checkpoints", "results", *files}
  assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
  rows = log.read_metrics(workdir)
  assert [r["step"] for r in rows] == [2, 4, 6, 6]
  assert {"train/loss", "train/grad_norm", "train/lr", "train/rows_per_s"} <= rows[0].keys()
  assert rows[-1] == {"step": 6, **results}
  assert set(results) >= {"valid/t2i_r1", "valid/i2t_mean_recall", "valid/zeroshot_top1"}
  text = (workdir / "log.txt").read_text()
  assert text.count("Global Steps: ") == 3 and "Evaluation at step 6" in text
  assert json.loads((workdir / "config.json").read_text())["batch_size"] == 32


def test_evaluate_gives_the_same_numbers(configs, runs, family):
  workdir, results = runs(family)
  assert evaluate.run(configs[family](evals=True), str(workdir)) == results


def test_a_finished_run_only_evaluates(configs, runs, family):
  workdir, results = runs(family)
  before = final_state(workdir)
  assert train(configs[family](evals=True), str(workdir)) == results
  assert_bit_equal(before, final_state(workdir))
  assert [r["step"] for r in log.read_metrics(workdir)] == [2, 4, 6, 6]


def test_resumed_is_straight_bit_for_bit(configs, runs, family, tmp_path):
  workdir, results = runs(family)
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"3"}
  assert train(configs[family](evals=True), str(tmp_path / "run")) == results
  assert_bit_equal(final_state(workdir), final_state(tmp_path / "run"))
  rows = [[{k: r.get(k) for k in ("step", "train/loss", "train/grad_norm")}
           for r in log.read_metrics(d)] for d in (workdir, tmp_path / "run")]  # fmt: skip
  assert rows[0] == rows[1]


def test_generated_texts_and_pictures_are_left_beside_the_metrics(shapes, tmp_path):
  """After a run and after an evaluation alone."""
  config = tiny.caption_config(shapes, evals=True, steps=1)
  results = train(config, str(tmp_path / "run"))
  assert set(results) == {"valid/cider", "valid/bleu4", "valid/rouge_l", "valid/exact"}
  folder = tmp_path / "run" / "results"
  assert {p.name for p in folder.iterdir()} == {"valid_captions.png", "valid_predict.json"}
  found = json.loads((folder / "valid_predict.json").read_text())
  assert [row["image_id"] for row in found[:2]] == ["valid0", "valid1"] and len(found) == 400
  assert all(isinstance(row["caption"], str) for row in found)
  assert (folder / "valid_captions.png").read_bytes().startswith(b"\x89PNG")
  evaluate.run(config, str(tmp_path / "run"), results=str(tmp_path / "again"))
  for path in folder.iterdir():
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_run_goes_on_with_another_mesh_and_says_what_changed(digits, straight, tmp_path):
  workdir, _ = straight
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  train(tiny.config(digits, mesh=MeshShape(data=2, fsdp=2, tensor=2)), str(tmp_path / "run"))
  for path, x in final_state(workdir).items():
    np.testing.assert_allclose(
      final_state(tmp_path / "run")[path], x, atol=1e-5, rtol=1e-4, err_msg=path
    )
  assert (
    "config.mesh.fsdp was 1 before this start and is now 2"
    in (tmp_path / "run" / "log.txt").read_text()
  )


def test_another_run_starts_from_these_weights(digits, straight, tmp_path):
  workdir, _ = straight
  config = tiny.config(digits, init=str(workdir), steps=1)
  config.optim = dataclasses.replace(config.optim, lr=1e-12)
  train(config, str(tmp_path / "run"))
  start = final_state(workdir)
  for path, x in final_state(tmp_path / "run").items():
    if path.startswith("model/"):
      np.testing.assert_allclose(x, start[path], atol=1e-7, err_msg=path)


def test_only_what_is_declared_optional_may_be_absent_from_the_weights(digits, straight, tmp_path):
  """SigLIP starts from a model that was trained with softmax: all of it, and a fresh bias."""
  workdir = str(straight[0])
  siglip = dataclasses.replace(tiny.MODEL, logit_bias=-7.0)
  options = {"model": siglip, "task": {"loss_kind": "sigmoid"}, "init": workdir}
  config = tiny.config(digits, steps=1, ema=0.9, **options)
  config.optim = dataclasses.replace(config.optim, lr=1e-12)
  train(config, str(tmp_path / "run"))
  text = (tmp_path / "run" / "log.txt").read_text()
  assert f"Weights: of {workdir}; fresh optimizer, logit_bias\n" in text
  expected = {p: x for p, x in final_state(straight[0]).items() if p.startswith("model/")}
  found = final_state(tmp_path / "run")
  for path, x in (expected | {"model/params/logit_bias": np.float32(-7)}).items():
    np.testing.assert_allclose(found[path], x, atol=1e-7, err_msg=path)

  # Scoring a stored model invents nothing, and other parameters are never optional.
  with pytest.raises(ValueError, match=r"missing: logit_bias \(\)"):
    evaluate.run(tiny.config(digits, evals=True, **options), workdir)
  config.model = dataclasses.replace(siglip, text=dataclasses.replace(tiny.BERT, layers=3))
  with pytest.raises(ValueError, match=r"bert/blocks/\S+: expected \(3, "):
    train(config, str(tmp_path / "other"))


def test_a_checkpoint_of_another_model_is_refused_before_compiling(digits, straight, tmp_path):
  model = dataclasses.replace(tiny.MODEL, embed_dim=24)
  with pytest.raises(ValueError, match="is not of this config"):
    train(tiny.config(digits, model=model), str(straight[0]))
  with pytest.raises(ValueError, match="is not of this config"):
    train(tiny.config(digits, model=model, init=str(straight[0])), str(tmp_path / "run"))


def test_weights_that_are_not_there_are_told_before_compiling(digits, tmp_path):
  with pytest.raises(ValueError, match=r"found .ViT-B-61.*did you mean ViT-B-16"):
    train(tiny.config(digits, init="ViT-B-61"), str(tmp_path / "run"))


def test_epochs_are_whole_passes(digits, tmp_path):
  task = {"train": (PairData.of(digits, "valid"),)}
  config = tiny.config(digits, steps=None, epochs=1.0, batch_size=1024)
  config.task = dataclasses.replace(config.task, **task)
  train(config, str(tmp_path))
  assert log.read_metrics(tmp_path)[-1]["step"] == 3  # 2,160 pairs


def spoiled(digits, folder, *, every):
  """The training data with every n-th image cut short."""
  lines = (digits / "train_imgs.tsv").read_text().splitlines()
  for i in range(0, len(lines), every):
    image_id, text = lines[i].split("\t")
    png = base64.b64decode(text)
    lines[i] = f"{image_id}\t{base64.b64encode(png[: len(png) // 2]).decode()}"
  (folder / "train_imgs.tsv").write_text("\n".join(lines) + "\n")
  shutil.copy(digits / "train_texts.jsonl", folder)
  return (PairData.of(folder, "train"),)


def test_bad_images_are_skipped_counted_and_named(digits, tmp_path):
  config = tiny.config(digits, max_bad_rate=0.2)
  config.task = dataclasses.replace(config.task, train=spoiled(digits, tmp_path, every=20))
  train(config, str(tmp_path / "run"))
  text = (tmp_path / "run" / "log.txt").read_text()
  assert "Skipped a bad row: " in text and "train_imgs.tsv:" in text
  assert all(np.isfinite(r["train/loss"]) for r in log.read_metrics(tmp_path / "run"))


def test_too_many_bad_images_stop_the_run(digits, tmp_path):
  config = tiny.config(digits, max_bad_rate=0.001)
  config.task = dataclasses.replace(config.task, train=spoiled(digits, tmp_path, every=2))
  with pytest.raises(pipeline.TooManyBadRows, match=r"train_imgs.tsv:\d+"):
    train(config, str(tmp_path / "run"))


def test_diverging_runs_stop_and_say_what_to_do(digits, tmp_path, monkeypatch):
  config = tiny.config(digits, log_every=1)
  config.optim = dataclasses.replace(config.optim, max_bad_steps=2)
  real = type(config.task).loss

  def loss(self, *args, **options):
    metrics = real(self, *args, **options)
    return metrics | {"loss": metrics["loss"]._replace(total=metrics["loss"].total * np.nan)}

  monkeypatch.setattr(type(config.task), "loss", loss)
  with pytest.raises(FloatingPointError, match=r"3 steps in a row .* lower optim.lr"):
    train(config, str(tmp_path))
  assert "Skipped non-finite steps: 2" in (tmp_path / "log.txt").read_text()


def test_advice_when_the_loss_sits_at_ln_batch(digits):
  task = tiny.config(digits).task
  flat = [{"step": i, "train/loss": 3.46, "train/chance_loss": np.log(32)} for i in range(5)]
  assert "sits at ln(batch) = 3.466" in task.advise(flat)
  assert task.advise(flat[:4]) is None
  assert task.advise([*flat[:4], flat[4] | {"train/loss": 2.0}]) is None
