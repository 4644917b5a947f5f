"""Saving and restoring a state: exact, onto any mesh, whatever is in flight."""

import dataclasses
import functools
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import checksums, trees
from ofa_jax.config import MeshShape
from ofa_jax.engine import checkpoint, step, step_name
from ofa_jax.engine.best import Best
from tests import tiny
from tests.engine.test_step import fresh, make_mesh


def program_of(digits, shape=None, devices=1, **changes):
  shape = shape or MeshShape()
  return step.build(tiny.config(digits, mesh=shape, **changes), make_mesh(shape, devices), steps=10)


def numbered(program, *, step=3):
  """A state in which every array differs."""
  leaves, structure = jax.tree.flatten(program.abstract)
  arrays = [np.full(x.shape, i, x.dtype) for i, x in enumerate(leaves)]
  state = dataclasses.replace(jax.tree.unflatten(structure, arrays), step=np.int32(step))
  return jax.device_put(state, program.shardings)


def assert_same(a, b):
  assert trees.difference(a, b) == []
  for path, x in trees.flatten(a).items():
    np.testing.assert_array_equal(trees.flatten(b)[path], x, err_msg=path)


def layout(program):
  return {"abstract": program.abstract, "shardings": program.shardings}


@pytest.mark.parametrize("ema", [None, 0.9])
def test_round_trip_onto_another_mesh(digits, tmp_path, ema):
  one = program_of(digits, ema=ema, model=tiny.RESNET)
  many = program_of(digits, MeshShape(data=1, fsdp=4, tensor=2), 8, ema=ema, model=tiny.RESNET)
  state = numbered(one)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() is None
    checkpoints.save(state)
    checkpoints.wait()
    restored = checkpoints.restore(3, **layout(many))
    assert checkpoints.has_ema(3) == (ema is not None)
  assert_same(state, restored)
  places = trees.flatten(many.shardings)
  assert all(x.sharding == places[path] for path, x in trees.flatten(restored).items())


def test_what_all_devices_hold_is_saved_without_compiling(digits, tmp_path, caplog):
  program = program_of(digits, devices=8)
  state = numbered(program)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with jax.log_compiles():
      checkpoints.save(state)
      checkpoints.wait()
    assert "Compiling" not in caplog.text
    assert_same(state, checkpoints.restore(3, **layout(program)))


def test_weights_alone_prefer_the_moving_average(digits, tmp_path):
  program = program_of(digits, ema=0.9, model=tiny.RESNET)
  state = numbered(program)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state)
  plain = program_of(digits, model=tiny.RESNET)
  at, params, rest = checkpoint.open_weights(tmp_path, **layout(plain))
  assert at == 3
  assert_same(state.ema, params)
  assert_same(state.ema_rest, rest)


def test_a_moving_average_without_statistics_is_read(digits, tmp_path):
  """As runs kept it that were made before the statistics were averaged."""
  program = program_of(digits, ema=0.9, model=tiny.RESNET)
  state = numbered(program)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(dataclasses.replace(state, ema_rest=None))
    checkpoints.wait()
    restored = checkpoints.restore(3, **layout(program))
    weights = checkpoints.restore_weights(3, **layout(program), ema=True)
  assert_same(dataclasses.replace(state, ema_rest=state.rest), restored)
  assert_same((state.ema, state.rest), weights)
  jax.jit(lambda s: s, donate_argnums=0)(restored)  # no buffer stands in it twice


def test_a_state_may_be_donated_while_it_is_being_saved(digits, tmp_path):
  program = program_of(digits)
  scramble = jax.jit(lambda s: jax.tree.map(lambda x: x + 7, s), donate_argnums=0)
  state = numbered(program)
  expected = jax.device_get(jax.tree.map(jnp.copy, state))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state)
    for _ in range(20):
      state = scramble(state)
    checkpoints.wait()
    assert_same(expected, jax.device_get(checkpoints.restore(3, **layout(program))))


def test_only_the_newest_are_kept(digits, tmp_path):
  state = fresh(program_of(digits))
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    for i in range(4):
      checkpoints.save(dataclasses.replace(state, step=jnp.int32(i)))
  names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert names >= {"2", "3"} and not names & {"0", "1"}


def test_what_a_killed_save_left_too_many_goes_when_the_run_is_opened(digits, tmp_path):
  state = fresh(program_of(digits))
  with checkpoint.Checkpoints(tmp_path, keep=4) as checkpoints:
    for i in range(4):
      checkpoints.save(at(state, i))
  best = Best("valid/loss", "min", [{"step": 1, "valid/loss": 0.0}])
  with checkpoint.Checkpoints(tmp_path, keep=2, best=best) as checkpoints:
    checkpoints.remove_surplus()
    assert checkpoints.steps() == [1, 2, 3]
    checkpoints.best = None
    checkpoints.remove_surplus()
    assert checkpoints.steps() == [2, 3]
  assert {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()} == {"2", "3"}


def at(state, step):
  return dataclasses.replace(state, step=jnp.int32(step))


def test_the_best_one_stays_beside_the_newest(digits, tmp_path):
  state = fresh(program_of(digits))
  best = Best("valid/loss", "min")
  with checkpoint.Checkpoints(tmp_path, keep=1, best=best) as checkpoints:
    for i, loss in enumerate([3.0, 1.0, 2.0, np.nan, 1.0]):
      best.add(i, {"valid/loss": loss, "valid/t2i_r1": 1.0})
      checkpoints.save(at(state, i))
      assert checkpoints.best_step() == (i if i in (0, 4) else 1)
    checkpoints.save(at(state, 5))  # not evaluated
    checkpoints.wait()
    assert checkpoints.steps() == [4, 5]
    assert checkpoints.listing() == "4, 5 (best: step 4, valid/loss 1)"


def test_the_best_is_the_last_of_equal_ones_that_are_there():
  rows = [{"step": 2, "x": 0.5}, {"step": 4, "x": 0.9}, {"step": 6, "x": 0.9}, {"step": 8}]
  best = Best("x", "max", rows)
  assert (best.of([2, 4, 6, 8]), best.of([2, 4, 8]), best.of([8])) == (6, 4, None)
  best.add(4, {"x": 0.1})  # done again
  assert best.of([2, 4]) == 2
  assert Best("x", "min", rows).of([6, 2, 4]) == 2


@pytest.fixture(scope="module")
def kept(digits, tmp_path_factory):
  """A run with steps 2, 4 and 6, of which 4 is the best."""
  workdir = tmp_path_factory.mktemp("kept")
  config = {"best_metric": "valid/x", "best_mode": "max"}
  (workdir / "config.json").write_text(json.dumps(config))
  rows = [{"step": s, "valid/x": x} for s, x in ((2, 0.1), (4, 0.9), (6, 0.5))]
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  program = program_of(digits, ema=0.9)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    for step_ in (2, 4, 6):
      checkpoints.save(jax.tree.map(lambda x, s=step_: x + s, at(fresh(program), 0)))
  return workdir


@pytest.mark.parametrize(
  ("which", "expected"), [(None, 6), ("latest", 6), ("best", 4), ("2", 2), ("04", 4)]
)
def test_any_step_is_opened(digits, kept, which, expected):
  found, params, _ = checkpoint.open_weights(kept, which=which, **layout(program_of(digits)))
  assert found == expected
  first = fresh(program_of(digits)).params["visual"]["proj"]
  np.testing.assert_array_equal(params["visual"]["proj"], first + expected)


def test_what_is_not_there_is_told_with_what_is(kept, tmp_path):
  there = r"2, 4, 6 \(best: step 4, valid/x 0.9\)"
  refused = functools.partial(pytest.raises, ValueError)
  with (
    checkpoint.open_run(str(kept)) as checkpoints,
    refused(match=rf"one of the steps kept there, {there}; found 8"),
  ):
    checkpoints.find("8")
  shutil.copytree(kept, tmp_path / "run")
  (tmp_path / "run" / "metrics.jsonl").unlink()
  with (
    checkpoint.open_run(str(tmp_path / "run")) as checkpoints,
    refused(match=r"no valid/x .*kept there: 2, 4, 6$"),
  ):
    checkpoints.find("best")
  (tmp_path / "run" / "config.json").write_text("{}")
  with (
    checkpoint.open_run(str(tmp_path / "run")) as checkpoints,
    refused(match=r"no best_metric in its config\.json"),
  ):
    checkpoints.find("best")


def test_a_run_that_fails_leaves_no_save_half_made(kept, tmp_path):
  shutil.copytree(kept, tmp_path / "run")
  half = tmp_path / "run" / "checkpoints" / "9.orbax-checkpoint-tmp"
  for read_only in (True, False):
    with (
      pytest.raises(OSError),
      checkpoint.Checkpoints(str(tmp_path / "run"), read_only=read_only) as opened,
    ):
      steps = opened.steps()
      half.mkdir(exist_ok=True)
      raise OSError(28, "No space left on device")
    assert half.exists() == read_only
  assert sorted(int(p.name) for p in half.parent.iterdir() if p.is_dir()) == steps


def test_names_of_steps(tmp_path):
  split = step_name.split_step
  assert split("runs/a@8") == ("runs/a", "8")
  assert split("runs/a@best") == ("runs/a", "best")
  assert split("runs/a/checkpoints/8") == split("runs/a/checkpoints/8/") == ("runs/a", "8")
  assert split("gs://b/a@latest") == ("gs://b/a", "latest")
  for name in ("runs/a", "me@home", "runs/a@8b", "@8", "runs/a/checkpoints", "ViT-B-16"):
    assert split(name) == (name, None)
  (tmp_path / "a@8").mkdir()
  assert split(str(tmp_path / "a@8")) == (str(tmp_path / "a@8"), None)


def largest(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(path):
  os.truncate(path, path.stat().st_size // 2)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def fill(path):
  path.write_bytes(os.urandom(path.stat().st_size))


DAMAGES = {
  "one bit": (lambda d: flip(largest(d / "ema")), r"ema/\S+ has another content"),
  "data cut": (lambda d: cut(largest(d / "model")), r"model/\S+ cannot be read|model cannot"),
  "data filled": (lambda d: fill(largest(d / "train")), r"train\S* cannot be read"),
  "moving average cut": (lambda d: cut(largest(d / "ema")), r"ema\S* cannot be read"),
  "half a copy": (lambda d: shutil.rmtree(d / "model"), "model/_METADATA is missing"),
  "no moving average": (lambda d: shutil.rmtree(d / "ema"), "ema/_METADATA is missing"),
  "no optimizer": (lambda d: shutil.rmtree(d / "train"), "train/_METADATA is missing"),
  "empty metadata": (lambda d: (d / "model/_METADATA").write_bytes(b""), "model/_METADATA cannot"),
  "no metadata": (lambda d: (d / "ema/_METADATA").unlink(), "ema/_METADATA is missing"),
  "empty manifest": (
    lambda d: (d / "model/manifest.ocdbt").write_bytes(b""),
    "model/manifest.ocdbt cannot be read",
  ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_one_is_told_once_and_the_older_whole_one_taken(
  digits, kept, tmp_path, capfd, kind
):
  damage, reason = DAMAGES[kind]
  shutil.copytree(kept, tmp_path / "run")
  newest = tmp_path / "run" / "checkpoints" / "6"
  if kind != "one bit":  # as older versions wrote them; with checksums, each is told by these
    (newest / checksums.NAME).unlink()
  damage(newest)
  program = program_of(digits, ema=0.9)
  expected = rf"step 6 is damaged: {tmp_path}/run/checkpoints/6/({reason})"
  with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
    told = []
    state = checkpoints.restore_newest(**layout(program), warn=told.append)
    assert int(state.step) == 4 and checkpoints.steps() == [2, 4]
    (text,) = told
    assert re.search(expected + r".*Going on from step 4; it stays as 6.damaged", text), text
    checkpoints.save(at(state, 6))  # done again
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 6]
  assert capfd.readouterr().err == ""


@pytest.mark.parametrize("read_only", [False, True])
def test_checksums_that_a_killed_run_did_not_get_to_are_made_up_for(
  digits, kept, tmp_path, read_only
):
  shutil.copytree(kept, tmp_path / "run")
  newest = tmp_path / "run" / "checkpoints" / "6"
  expected = json.loads((newest / checksums.NAME).read_text())
  (newest / checksums.NAME).rename(newest / f".{checksums.NAME}.123")  # killed amid their writing
  with checkpoint.Checkpoints(tmp_path / "run", read_only=read_only) as checkpoints:
    state = checkpoints.restore_newest(**layout(program_of(digits, ema=0.9)), warn=pytest.fail)
  assert int(state.step) == 6
  if read_only:
    assert not (newest / checksums.NAME).exists()
  else:
    assert json.loads((newest / checksums.NAME).read_text()) == expected
    assert not list(newest.glob(".*"))


def test_a_damaged_one_is_not_passed_over_where_it_was_asked_for(digits, kept, tmp_path):
  shutil.copytree(kept, tmp_path / "run")
  cut(largest(tmp_path / "run" / "checkpoints" / "6" / "ema"))
  with pytest.raises(ValueError, match=r"step 6 is damaged: .* Others are at 4, 2: .*/run@4$"):
    checkpoint.open_weights(tmp_path / "run", **layout(program_of(digits)))
  for step_ in (2, 4):
    cut(largest(tmp_path / "run" / "checkpoints" / str(step_) / "train"))
  with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
    with pytest.raises(ValueError, match=r"only damaged ones:(\n.*step \d is damaged.*){3}\n"):
      checkpoints.restore_newest(**layout(program_of(digits, ema=0.9)), warn=print)
    assert checkpoints.steps() == [2, 4, 6]
  # Another model is no damage: nothing older is tried.
  other = program_of(digits, ema=0.9, model=dataclasses.replace(tiny.MODEL, embed_dim=24))
  with (
    checkpoint.Checkpoints(kept) as checkpoints,
    pytest.raises(ValueError, match=r"step 6 .* is not of this config"),
  ):
    checkpoints.restore_newest(**layout(other), warn=print)


def test_another_model_is_refused_with_every_difference(digits, tmp_path):
  program = program_of(digits)
  wider = dataclasses.replace(tiny.MODEL, embed_dim=24)
  other = program_of(digits, model=wider)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(numbered(program))
    checkpoints.wait()
    with pytest.raises(ValueError) as e:
      checkpoints.restore(3, **layout(other))
  for text in ("visual/proj: expected (32, 24) float32, found (32, 16) float32",
               "text_projection: expected (32, 24)", "Use the config that wrote it"):  # fmt: skip
    assert text in str(e.value)


def test_a_moving_average_that_is_not_there_is_named(digits, tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(numbered(program_of(digits)))
    checkpoints.wait()
    with pytest.raises(ValueError, match="no ema in the checkpoint"):
      checkpoints.restore(3, **layout(program_of(digits, ema=0.9)))


def test_a_folder_without_checkpoints_is_told(digits, tmp_path):
  with pytest.raises(ValueError, match="Expected a run of"):
    checkpoint.open_weights(tmp_path, **layout(program_of(digits)))
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ValueError, match="Expected a finished checkpoint"):
    checkpoint.open_weights(tmp_path, **layout(program_of(digits)))
