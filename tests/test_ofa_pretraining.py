"""Pretraining from tiny files to a model: restarts, devices, processes, and what it leaves."""

import dataclasses
import math
import pathlib
import runpy
import shutil

import numpy as np
import pytest

from ofa_jax import evaluate, train, trees, validate_data
from ofa_jax.config import MeshShape
from ofa_jax.engine import log
from ofa_jax.tasks.pretrain import NAMES
from tests import pretrain_files, test_streams
from tests.engine import test_step
from tests.test_lost_processes import free_port
from tests.test_processes import finish, kill_at, start, start_cluster
from tests.test_train import assert_bit_equal, final_state

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return pretrain_files.write(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
  """(config, workdir) of a straight run on two devices."""
  config, workdir = pretrain_files.config(files), tmp_path_factory.mktemp("run")
  train.train(config, str(workdir))
  return config, workdir


def test_a_run_names_every_objective_and_goes_on_bit_for_bit(run, tmp_path):
  config, workdir = run
  rows = log.read_metrics(workdir)
  assert len(rows) == config.steps
  assert {f"train/{name}/loss" for name in NAMES} <= {key for row in rows for key in row}
  assert all(math.isfinite(value) for row in rows for value in row.values())
  for row in rows:
    both = row["train/pairs_loss"] + row["train/others_loss"]
    assert row["train/loss"] == pytest.approx(both, rel=1e-6)
  text = (workdir / "log.txt").read_text()
  assert "infilling" in text and "Global Batch Size: 16" in text and "nan" not in text
  broken = shutil.copytree(workdir, tmp_path / "broken")
  shutil.rmtree(broken / "checkpoints" / str(config.steps))
  train.train(config, str(broken))  # from step 2, amid an epoch of every file
  assert "Restart 1 of this run, from step 2" in (broken / "log.txt").read_text()
  assert_bit_equal(final_state(workdir), final_state(broken))


@pytest.mark.slow  # half a minute; what all tasks have of it is tested with the quick ones
def test_one_device_is_two(run):
  config, workdir = run
  mesh = test_step.make_mesh(devices=1)
  history, state = test_step.run(config, steps=config.steps, of=config.steps, mesh=mesh)
  rows = log.read_metrics(workdir)
  losses = [[row["train/loss"], row["train/grad_norm"]] for row in rows]
  np.testing.assert_allclose(losses, history, rtol=1e-5)
  stored = final_state(workdir)
  for path, x in trees.flatten(state.params).items():
    np.testing.assert_allclose(stored[f"model/params/{path}"], x, rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.slow  # two programs, as every stream needs a row for each device
def test_eight_devices_are_one(files):
  shape, steps = MeshShape(data=2, fsdp=2, tensor=2), 3
  config = pretrain_files.config(files, fields={"multiple": 4})
  history, state = test_step.run(config, steps=steps, of=steps)
  meshed = dataclasses.replace(config, mesh=shape)
  mesh = test_step.make_mesh(shape, 8)
  eight, others = test_step.run(meshed, steps=steps, of=steps, mesh=mesh)
  np.testing.assert_allclose(eight, history, rtol=1e-5)
  test_step.assert_trees_close(others.params, state.params, atol=1e-5)


@pytest.mark.slow  # two programs in float64
def test_accumulated_parts_are_the_whole_batch(files):
  config = pretrain_files.config(files, fields={"num_patches": None})
  whole, parts = (
    test_streams.run(dataclasses.replace(config, accum=accum), steps=2) for accum in (1, 2)
  )
  for mine, others in zip(parts[0], whole[0], strict=True):
    assert mine.keys() == others.keys()
    np.testing.assert_allclose(list(mine.values()), list(others.values()), rtol=1e-8)
  for path, x in parts[1].items():
    np.testing.assert_allclose(x, whole[1][path], rtol=1e-7, atol=1e-9, err_msg=path)


def test_faulty_rows_are_named_and_counted(files, tmp_path, capsys):
  config = pretrain_files.config(files)
  broken = {"train": "vl", "detection": "detection"}
  changed = {}
  for field, name in broken.items():
    lines = (files / f"{name}.tsv").read_text().splitlines()
    columns = lines[0].split("\t")
    if field == "train":
      lines[0] = "\t".join([*columns[:-1], "captions"])
      lines[1] = "\t".join(lines[1].split("\t")[:-1])
      lines[2] = lines[2].replace(lines[2].split("\t")[4], "9,9,3,3")
    else:
      lines[0] = "\t".join([*columns[:2], "1,1,500,9,/m/0,a thing"])
    path = tmp_path / f"{name}.tsv"
    path.write_text("\n".join(lines) + "\n")
    changed[field] = (str(path),)
  task = dataclasses.replace(config.task, **changed)
  assert validate_data.validate_data(dataclasses.replace(config, task=task)) == 4
  told = capsys.readouterr()
  for text in (
    "vl.tsv:1 0: expected a type out of caption, qa, visual_grounding, found 'captions'",
    "vl.tsv:2 0: expected 8 columns separated by tabs, found 7",
    "vl.tsv:3 0: expected a box with x0 < x1 and y0 < y1, found '9,9,3,3'",
    "detection.tsv:1 0: the box '1,1,500,9' reaches outside",
  ):
    assert text in told.out
  assert "train/pairs: 72 rows checked, 3 faulty" in told.err
  assert "train/text: 24 rows checked, 0 faulty" in told.err


def test_missing_negatives_end_a_run_before_anything_is_compiled(files, tmp_path):
  config = pretrain_files.config(files, fields={"negatives": str(tmp_path / "nowhere")})
  with pytest.raises(ValueError, match=r"type2ans.json is missing; object.txt is missing; all_cap"):
    train.train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run" / "checkpoints").exists()


def small(name, argument, config, *, data):
  """A zero-shot recipe on a file beside the pretraining's, with its model."""
  recipe = runpy.run_path(str(CONFIGS / name))["get_config"](argument)
  shared = {"tokenizer": config.task.tokenizer, "image_size": 48, "source_length": 40}
  (evaluation, *_) = recipe.evals
  task = dataclasses.replace(evaluation.task, **shared, **{evaluation.split: data})
  return dataclasses.replace(
    recipe,
    init=None,
    model=config.model,
    task=task,
    evals=(dataclasses.replace(evaluation, task=task),),
    batch_size=8,
    precision="fp32",
    remat="none",
    mesh=MeshShape(),
  )


RECIPES = {
  "vqa": ("ofa_vqa.py", "base,zeroshot", "vqa_score"),
  "refcoco": ("ofa_refcoco.py", "base,zeroshot", "score"),
  "snli_ve": ("ofa_snli_ve.py", "base,zeroshot", "snli_score"),
}


@pytest.mark.parametrize(
  "task",
  [pytest.param(name, marks=() if name == "refcoco" else pytest.mark.slow) for name in RECIPES],
)
def test_the_zero_shot_recipes_evaluate_what_is_left(run, files, task):
  config, workdir = run
  name, argument, metric = RECIPES[task]
  recipe = small(name, argument, config, data=(str(files / f"{task}.tsv"),))
  found = evaluate.run(recipe, str(workdir))
  (told,) = [value for key, value in found.items() if key.endswith(f"/{metric}")]
  assert 0 <= told <= 1


def begin(files, workdir, *flags):
  """The training command on the files."""
  return start(files, workdir, *flags, config=f"tests/pretrain_files.py:{files}")


@pytest.mark.slow  # two runs of twenty updates, each a process, one of them twice
def test_killed_in_the_middle_it_ends_as_the_straight_run(files, tmp_path):
  flags = ("--config.steps=20", "--config.save_every=4")
  finish(begin(files, tmp_path / "straight", *flags))
  assert kill_at(begin(files, tmp_path / "killed", *flags), "Saving checkpoint at step 8")
  finish(begin(files, tmp_path / "killed", *flags))
  assert "Restart 1 of this run" in (tmp_path / "killed" / "log.txt").read_text()
  assert_bit_equal(final_state(tmp_path / "straight"), final_state(tmp_path / "killed"))


@pytest.mark.slow  # three processes compile for themselves
def test_two_processes_are_one(files, tmp_path):
  """Patches are drawn in both alike. In float64 a step of these convolutions takes a minute."""
  flags = ("--config.steps=3", "--config.log_every=1", "--config.save_every=0")
  flags += ("--config.batch_size=16",)
  finish(begin(files, tmp_path / "one", *flags))
  config = f"tests/pretrain_files.py:{files}"
  both = start_cluster(files, tmp_path / "two", *flags, config=config, port=free_port(), num=2)
  for process in both:
    finish(process)
  one, two = (log.read_metrics(tmp_path / name) for name in ("one", "two"))
  assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3]
  assert {f"train/{name}/loss" for name in NAMES} <= {key for row in one for key in row}
  for mine, others in zip(two, one, strict=True):
    assert mine.keys() == others.keys()
    for name in (key for key in others if key.endswith(("loss", "accuracy", "grad_norm"))):
      np.testing.assert_allclose(mine[name], others[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow  # 120 updates
def test_all_losses_fall_in_one_picture(files, tmp_path):
  finish(begin(files, tmp_path))
  rows = log.read_metrics(tmp_path)
  for name in NAMES:
    values = [row[key] for row in rows if (key := f"train/{name}/loss") in row]
    assert len(values) > 40 and np.mean(values[-8:]) < 0.8 * np.mean(values[:8]), (name, values)
  assert (tmp_path / "curves.png").stat().st_size > 20_000


def test_the_recipe_is_the_originals(monkeypatch):
  monkeypatch.setenv("OFA_JAX_DATA", "data")
  get_config = runpy.run_path(str(CONFIGS / "ofa_pretrain.py"))["get_config"]
  for size in ("base", "large"):
    config = get_config(size)
    optim, task, model = config.optim, config.task, config.model
    assert (optim.lr, optim.clip_norm, optim.weight_decay, optim.warmup_ratio) == (
      1e-4,
      5,
      0.01,
      0.01,
    )
    assert (optim.adam, optim.schedule, optim.freeze) == ("fairseq", "polynomial", ())
    assert (config.epochs, config.save_every, config.keep, config.evals) == (50, 6000, 15, ())
    assert (task.image_size, task.num_patches, task.smoothing) == (384, 196, 0.0)
    assert (task.max_words, task.max_target_words, task.box_size) == (80, 30, 512)
    assert (model.dropout, model.encoder_drop_path, model.decoder_drop_path) == (0.1, 0.1, 0.1)
    assert config.init == f"OFA-{size}" == task.tokenizer
    assert task.batch_sizes(config.batch_size) == {
      "pairs": 8,
      "text": 2,
      "image": 1,
      "detection": 1,
    }
    assert task.negatives == "data/pretrain_data/negative_sample"
    assert task.batch_spec(8)["pairs"]["image"].shape == (8, 384, 384, 3)
