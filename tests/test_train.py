"""A run from its config to its files, in one process."""

import dataclasses
import errno
import functools
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from ofa_jax import evaluate, hub, trees
from ofa_jax.config import MeshShape
from ofa_jax.engine import faults, growing, log
from ofa_jax.scoring import coco
from ofa_jax.tasks.caption import Caption
from ofa_jax.tasks.contrastive import Contrastive
from ofa_jax.tasks.zeroshot import ZeroShot
from ofa_jax.train import train
from tests import tiny

pytestmark = pytest.mark.usefixtures("two_devices")


def final_state(workdir):
  """All arrays of the newest checkpoint by path, as they lie on disk."""
  import orbax.checkpoint as ocp

  steps = [p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
  newest = max(steps, key=lambda p: int(p.name))
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


def test_a_finished_run_only_evaluates(configs, runs, family, capsys):
  workdir, results = runs(family)
  before = final_state(workdir)
  capsys.readouterr()
  assert train(configs[family](evals=True), str(workdir)) == results
  assert "Evaluation at" not in capsys.readouterr().out  # the command prints what is returned
  assert (workdir / "log.txt").read_text().count("Evaluation at step 6") == 2
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


def test_generated_texts_and_pictures_are_left_beside_the_metrics(configs, runs, drawn, tmp_path):
  """After a run, whose evaluations alone are left here, and after an evaluation alone."""
  workdir = shutil.copytree(runs("ofa")[0], tmp_path / "run")
  results = train(configs["ofa"](evals=True), str(workdir))
  assert set(results) == {"valid/cider", "valid/bleu4", "valid/rouge_l", "valid/exact"}
  folder = workdir / "results"
  assert {p.name for p in folder.iterdir()} == {"valid_captions.png", "valid_predict.json"}
  found = json.loads((folder / "valid_predict.json").read_text())
  assert [row["image_id"] for row in found[:2]] == ["valid0.png", "valid1.png"]
  assert len(found) == 80
  assert all(isinstance(row["caption"], str) for row in found)
  for path in (folder / "valid_captions.png", workdir / "curves.png"):
    with Image.open(path) as image:
      assert min(image.size) > 100
  evaluate.run(configs["ofa"](evals=True), str(workdir), results=str(tmp_path / "again"))
  for path in folder.iterdir():
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_run_goes_on_with_another_mesh_and_says_what_changed(digits, straight, tmp_path):
  workdir, _ = straight
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  train(tiny.config(digits, mesh=MeshShape(data=1, fsdp=2)), str(tmp_path / "run"))
  other_mesh = final_state(tmp_path / "run")
  for path, x in final_state(workdir).items():
    np.testing.assert_allclose(other_mesh[path], x, atol=1e-5, rtol=1e-4, err_msg=path)
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


def every_step(digits, **changes):
  """Six steps, each evaluated and saved."""
  config = tiny.config(digits, evals=True, save_every=1, keep=2, **changes)
  config.evals = tuple(dataclasses.replace(e, every=1) for e in config.evals[:1])
  return config


@pytest.fixture(scope="module")
def best_run(digits, tmp_path_factory):
  """(workdir, config) of a run that keeps its highest loss, which stands at its beginning."""
  workdir = tmp_path_factory.mktemp("best")
  config = every_step(digits, best_metric="valid/loss", best_mode="max")
  train(config, str(workdir))
  return workdir, config


def losses_of(workdir):
  return {r["step"]: r["valid/loss"] for r in log.read_metrics(workdir) if "valid/loss" in r}


def test_the_best_checkpoint_stays_is_told_and_is_opened_by_name(best_run, tmp_path):
  workdir, config = best_run
  losses = losses_of(workdir)
  assert sorted(losses) == [1, 2, 3, 4, 5, 6]
  best = max(losses, key=losses.get)
  assert best < 5, losses
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == {str(best), "5", "6"}
  text = (workdir / "log.txt").read_text()
  told = [float(x) for x in re.findall(r"Best checkpoint: step \d+, valid/loss (\S+)", text)]
  running = np.maximum.accumulate([losses[s] for s in range(1, 7)])
  np.testing.assert_allclose(told, running, rtol=1e-5)
  assert "Validation Result (epoch 1 @ 6 steps) | Valid Loss: " in text
  found = evaluate.run(config, f"{workdir}@best")
  assert found == evaluate.run(config, f"{workdir}/checkpoints/{best}")
  assert found["valid/loss"] == losses[best]
  assert evaluate.run(config, str(workdir))["valid/loss"] == losses[6]
  with pytest.raises(ValueError, match=rf"steps kept there, {best}, 5, 6 \(best: step {best}, "):
    evaluate.run(config, f"{workdir}@4000")
  # A restart knows it, and goes on keeping it.
  shutil.copytree(workdir, tmp_path / "run")
  longer = dataclasses.replace(config, steps=8)
  train(longer, str(tmp_path / "run"))
  text = (tmp_path / "run" / "log.txt").read_text()
  assert f"Checkpoints: {best}, 5, 6 (best: step {best}, valid/loss " in text
  assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {str(best), "7", "8"}


def test_a_best_metric_that_no_evaluation_reports_is_told(digits, tmp_path, monkeypatch):
  config = every_step(digits, best_metric="valid/los")
  with pytest.raises(ValueError, match=r"did you mean valid/loss"):
    train(config, str(tmp_path / "a"))
  monkeypatch.setattr(type(config.task), "metrics", None)
  with pytest.raises(ValueError, match=r"one that evals\[valid\] reports .*found 'valid/los'"):
    train(config, str(tmp_path / "b"))
  assert {p.name for p in (tmp_path / "b" / "checkpoints").iterdir()} == {"1"}


# Which model it is matters only to what is compiled.
@pytest.mark.parametrize("family", ["cnclip", pytest.param("ofa", marks=pytest.mark.slow)])
def test_another_workdir_goes_on_from_a_step_bit_for_bit(configs, runs, family, tmp_path):
  workdir, results = runs(family)
  config = configs[family](evals=True, resume=f"{workdir}@3")
  assert train(config, str(tmp_path / "run")) == results
  assert_bit_equal(final_state(workdir), final_state(tmp_path / "run"))
  text = (tmp_path / "run" / "log.txt").read_text()
  assert f"Weights: of {workdir} at step 3, its optimizer; goes on at step 3 of 6" in text


def test_optimizer_and_step_are_reset_one_by_one(digits, straight, tmp_path):
  workdir, _ = straight

  def resumed(name, steps=4, **resets):
    config = tiny.config(digits, resume=f"{workdir}@3", steps=steps, log_every=1, **resets)
    train(config, str(tmp_path / name))
    rows = [r for r in log.read_metrics(tmp_path / name) if "train/loss" in r]
    text = (tmp_path / name / "log.txt").read_text()
    return rows, final_state(tmp_path / name), text

  rows, state, text = resumed("optimizer", reset_optimizer=True)
  assert [r["step"] for r in rows] == [4]
  assert "fresh optimizer; goes on at step 3 of 4" in text
  counts = [x for path, x in state.items() if path.endswith("count")]
  assert [int(x) for x in counts] == [1]

  again, state, text = resumed("step", steps=1, reset_step=True)
  assert [r["step"] for r in again] == [1]
  assert "its optimizer; goes on at step 0, with data and schedule from their beginning" in text
  assert [int(x) for path, x in state.items() if path.endswith("count")] == [4]
  assert int(state["train/step"]) == 1

  both, state, _ = resumed("both", steps=1, reset_step=True, reset_optimizer=True)
  weights = tiny.config(digits, init=f"{workdir}@3", steps=1, log_every=1)
  train(weights, str(tmp_path / "init"))
  assert_bit_equal(state, final_state(tmp_path / "init"))
  # The first batch of the data again, or the fourth.
  assert both[0]["train/loss"] == again[0]["train/loss"] != rows[0]["train/loss"]


def test_a_moving_average_may_begin_with_another_run(digits, straight, tmp_path):
  config = tiny.config(digits, resume=str(straight[0]), steps=6, ema=0.9)
  train(config, str(tmp_path / "run"))
  import orbax.checkpoint as ocp

  ema = ocp.StandardCheckpointer().restore(tmp_path / "run" / "checkpoints" / "6" / "ema")
  expected = final_state(straight[0])
  for path, x in trees.flatten(ema).items():
    np.testing.assert_array_equal(x, expected[f"model/params/{path}"])


def test_a_damaged_newest_checkpoint_is_done_again_bit_for_bit(digits, straight, tmp_path, capfd):
  workdir, results = straight
  shutil.copytree(workdir, tmp_path / "run")
  data = max((tmp_path / "run/checkpoints/6/model").rglob("*"), key=lambda p: p.stat().st_size)
  data.write_bytes(data.read_bytes()[:5000])
  config = tiny.config(digits, evals=True)
  with pytest.raises(ValueError, match=r"step 6 is damaged: .*Others are at 3: take one with "):
    evaluate.run(config, str(tmp_path / "run"))
  assert train(config, str(tmp_path / "run")) == results
  shutil.rmtree(tmp_path / "run/checkpoints/6.damaged")
  assert_bit_equal(final_state(workdir), final_state(tmp_path / "run"))
  text = (tmp_path / "run" / "log.txt").read_text()
  warned = [line for line in text.splitlines() if "WARNING" in line and "in no font" not in line]
  assert len(warned) == 1 and "is damaged" in warned[0]
  assert re.search(r"step 6 is damaged: \S+/6/model.* Going on from step 3", text)
  assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"", b"[1]"], ids=["empty", "no object"])
def test_a_damaged_config_json_is_told_and_written_anew(digits, straight, tmp_path, content):
  workdir, results = straight
  shutil.copytree(workdir, tmp_path / "run")
  (tmp_path / "run" / "config.json").write_bytes(content)
  (tmp_path / "run" / "metrics.jsonl").open("ab").write(b'[]\n{"step"\n\xff\n{"loss": 1}\n')
  config = tiny.config(digits, evals=True)
  if content == b"":
    with pytest.raises(ValueError, match=r"config.json: .*writes it anew when started again"):
      evaluate.run(config, str(tmp_path / "run"))
  assert train(config, str(tmp_path / "run")) == results
  files = [folder / "config.json" for folder in (workdir, tmp_path / "run")]
  assert files[0].read_bytes() == files[1].read_bytes()
  assert "config.json was damaged and is written anew" in (tmp_path / "run/log.txt").read_text()
  assert log.read_metrics(tmp_path / "run") == log.read_metrics(workdir)


def test_a_full_disk_is_one_message_with_the_newest_whole_checkpoint(
  digits, straight, tmp_path, monkeypatch
):
  shutil.copytree(straight[0], tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  real, lines = growing.Growing.append, []

  def append(self, text):
    lines.append(text)
    if len(lines) > 5:
      raise OSError(errno.ENOSPC, "No space left on device", "log.txt")
    real(self, text)

  monkeypatch.setattr(growing.Growing, "append", append)
  with pytest.raises(ValueError, match=r"No space left for .*checkpoint is that of step 3\. Free"):
    train(tiny.config(digits), str(tmp_path / "run"))
  monkeypatch.undo()
  train(tiny.config(digits), str(tmp_path / "run"))
  assert_bit_equal(final_state(straight[0]), final_state(tmp_path / "run"))


def test_what_a_storage_library_says_of_a_full_disk_is_understood(tmp_path):
  def fail(text, cause=None):
    with faults.explained(str(tmp_path)):
      try:
        raise ValueError(cause or "x")
      except ValueError as error:
        raise RuntimeError(text) from error

  with pytest.raises(ValueError, match="No checkpoint was finished yet"):
    fail("RESOURCE_EXHAUSTED: Failed to write 12 bytes: No space left on device [os_error_code=28]")
  with pytest.raises(ValueError, match="No space left for"):
    fail("cannot schedule new futures after shutdown", "UNKNOWN: Disk quota exceeded")
  with pytest.raises(RuntimeError, match="Out of memory"):
    fail("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes")


def test_a_workdir_is_a_model_wherever_it_is_moved_to(shapes, tmp_path, monkeypatch):
  """The tokenizer goes with it; a run without one can be opened for its weights."""
  shutil.copytree(shapes, tmp_path / "data")
  monkeypatch.chdir(tmp_path)
  config = tiny.caption_config(tmp_path / "data", steps=1)
  config.task = dataclasses.replace(config.task, tokenizer="data/tokenizer")
  train(config, "run")
  words = config.task.words
  shutil.move("run", "elsewhere")
  shutil.rmtree("data")
  (tmp_path / "cwd").mkdir()
  monkeypatch.chdir(tmp_path / "cwd")
  source = hub.open_model("../elsewhere")
  assert source.tokenizer.symbols == words.symbols
  assert source.tokenizer.encode(" a red circle") == words.encode(" a red circle")
  shutil.rmtree("../elsewhere/tokenizer")
  source = hub.open_model("../elsewhere@1")
  params, _ = source.load()
  assert_bit_equal(
    {f"model/params/{k}": np.asarray(x) for k, x in trees.flatten(params).items()},
    {k: x for k, x in final_state(tmp_path / "elsewhere").items() if k.startswith("model/params")},
  )
  with pytest.raises(ValueError, match=r"none in \.\./elsewhere/tokenizer; put dict.txt"):
    source.tokenizer.encode("x")


def test_declared_metrics_are_those_reported(runs):
  for family in ("cnclip", "ofa"):
    _, results = runs(family)
    declared = {*Contrastive.metrics, *ZeroShot.metrics}
    if family == "ofa":
      declared = {*Caption.metrics} - {*coco.METRICS}  # which the task's `coco` asks for
    assert {name.removeprefix("valid/") for name in results} == declared
