"""Saving and restoring a state: exact, onto any mesh, whatever is in flight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import checkpoint, step, trees
from ofa_jax.config import MeshShape
from tests import tiny
from tests.test_step import fresh, make_mesh


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
