"""One update: the same numbers on any mesh, in any number of parts, with any rematerialisation."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax import losses, trees
from ofa_jax.config import MeshShape, Optim, mesh_sizes
from ofa_jax.data import pipeline
from ofa_jax.engine import sharding, step
from ofa_jax.tasks.base import Task
from tests import tiny

HALVES = ("^visual/", "^(bert|text_projection)")
DEVICES = jax.devices()  # all eight, also where a test gives a run two


def make_mesh(shape=None, devices=1):
  shape = shape or MeshShape()
  return sharding.make_mesh(mesh_sizes(shape, devices), devices=DEVICES[:devices])


_FRESH = {}  # compiling the initialisation takes longer than the steps of a test


def fresh(program):
  """`step.init`, compiled once per model: it does not depend on the mesh, as a test shows."""
  key = (repr(program.config.model), program.config.seed, jax.tree.structure(program.abstract))
  if key not in _FRESH:
    _FRESH[key] = jax.device_get(step.init(program))
  return jax.device_put(_FRESH[key], program.shardings)


def run(config, *, steps=5, of=10, mesh=None, change=None, seen=lambda state: None):
  """Losses, gradient norms and the last state of the first steps `of` so many; `seen` sees each."""
  program = step.build(config, mesh or make_mesh(), steps=of)
  state = fresh(program)
  seen(state)
  update = step.train_step(program)
  rows = config.task.examples("train")
  frozen = config.task.frozen(program.mesh, precision=config.precision)
  bad = pipeline.BadRows(max_rate=0.0)
  history = []
  sizes = config.task.batch_sizes(config.batch_size)
  with pipeline.train_batches(
    rows, batch_size=sizes, seed=config.seed, start=0, bad=bad
  ) as batches:
    for i in range(steps):
      batch = next(batches)
      if change is not None:
        batch = change(i, batch)
      state, metrics = update(state, sharding.to_global(batch, program.mesh), frozen)
      seen(state)
      history.append([float(metrics["loss"]), float(metrics["grad_norm"])])
  return np.array(history), state


def assert_trees_close(a, b, *, atol):
  for path, x in trees.flatten(a).items():
    np.testing.assert_allclose(trees.flatten(b)[path], x, rtol=0, atol=atol, err_msg=path)


@pytest.fixture(scope="module")
def reference(digits):
  return run(tiny.config(digits))


@pytest.mark.parametrize(
  "shape",
  [
    MeshShape(),
    # The others split in both ways too, though in fewer parts.
    pytest.param(MeshShape(data=1, fsdp=8), marks=pytest.mark.slow),
    MeshShape(data=2, fsdp=4),
    pytest.param(MeshShape(data=1, fsdp=1, tensor=8), marks=pytest.mark.slow),
    MeshShape(data=2, fsdp=2, tensor=2),
  ],
  ids=["data8", "fsdp8", "2x4", "tensor8", "2x2x2"],
)
def test_eight_devices_are_one(digits, reference, shape):
  # The layers of one mesh are gathered again in the backward pass.
  config = tiny.config(digits, mesh=shape, remat="full" if shape.fsdp == 4 else "none")
  history, state = run(config, mesh=make_mesh(shape, 8))
  np.testing.assert_allclose(history, reference[0], rtol=1e-5)
  assert_trees_close(state.params, reference[1].params, atol=1e-5)


def test_parameters_and_their_moments_are_really_split(digits):
  shape = MeshShape(data=1, fsdp=4, tensor=2)
  program = step.build(tiny.config(digits, mesh=shape), make_mesh(shape, 8), steps=1)
  state = step.init(program)
  held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  assert held < trees.num_bytes(state) / 7
  assert held == sharding.bytes_per_device(program.abstract, program.shardings)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_model_reads_whole_what_lies_split(digits, fsdp):
  shape = MeshShape(data=8 // fsdp, fsdp=fsdp)
  program = step.build(tiny.config(digits, mesh=shape), make_mesh(shape, 8), steps=1)
  model = program.model(program.abstract.params, program.abstract.rest)
  params = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
  split = [p for p in params if isinstance(p, sharding.SplitParam)]
  places = jax.tree.leaves(program.shardings.params)
  assert len(split) == sum("fsdp" in place.spec for place in places)
  assert bool(split) == (fsdp > 1)
  assert all(len(p.axes) == p.ndim and "fsdp" in p.axes for p in split)


def test_initialisation_does_not_depend_on_the_mesh(digits):
  states = []
  for shape, devices in ((MeshShape(), 1), (MeshShape(data=1, fsdp=4, tensor=2), 8)):
    config = tiny.config(digits, mesh=shape)
    states.append(step.init(step.build(config, make_mesh(shape, devices), steps=1)))
  for path, x in trees.flatten(states[0].params).items():
    np.testing.assert_array_equal(trees.flatten(states[1].params)[path], x, err_msg=path)


@pytest.mark.parametrize("accum", [2, pytest.param(4, marks=pytest.mark.slow)])  # 4 on a mesh below
def test_accumulation_is_the_whole_batch(digits, reference, accum):
  config = tiny.config(digits, accum=accum)
  history, state = run(config)
  np.testing.assert_allclose(history, reference[0], rtol=1e-5)
  assert_trees_close(state.params, reference[1].params, atol=1e-5)


def gradients(config):
  """Loss and gradients of the first batch, without the optimizer."""
  program = step.build(config, make_mesh(), steps=10)
  state = fresh(program)
  with pipeline.train_batches(
    config.task.examples("train"), batch_size=32, seed=0, start=0, bad=pipeline.BadRows()
  ) as batches:
    batch = sharding.to_global(next(batches), program.mesh)

  def loss(params):
    model = program.model(params, state.rest)
    metrics = config.task.loss(model, batch, rngs=jax.random.key(0), chunks=config.accum)
    return metrics["loss"].value

  return jax.jit(jax.value_and_grad(loss))(state.params)


def test_accumulated_contrastive_gradients_are_the_whole_batchs(digits):
  loss, grads = gradients(tiny.config(digits))
  same_loss, same_grads = gradients(tiny.config(digits, accum=4))
  np.testing.assert_allclose(same_loss, loss, rtol=1e-6)
  for path, g in trees.flatten(grads).items():
    scale = max(float(jnp.abs(g).max()), 1e-3)
    np.testing.assert_allclose(trees.flatten(same_grads)[path], g, atol=1e-5 * scale, err_msg=path)


def test_accumulation_on_a_mesh(digits, reference):
  shape = MeshShape(data=2, fsdp=2, tensor=2)
  history, _ = run(tiny.config(digits, accum=4, mesh=shape), mesh=make_mesh(shape, 8))
  np.testing.assert_allclose(history, reference[0], rtol=1e-5)


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}], ids=str)
def test_rematerialisation_and_unrolling_change_no_number(digits, reference, change):
  history, _ = run(tiny.config(digits, **change))
  np.testing.assert_allclose(history, reference[0], rtol=1e-5)


def test_running_statistics_are_those_of_the_whole_batch_on_any_mesh(digits):
  config = tiny.config(digits, model=tiny.RESNET, precision="fp64")
  with jax.enable_x64(True):
    history, state = run(config, steps=2)
    again, split = run(config, steps=2, mesh=make_mesh(devices=8))
  np.testing.assert_allclose(again, history, rtol=1e-6)  # the norm is one of float32
  assert_trees_close(split.rest, state.rest, atol=1e-7)
  assert np.any(trees.flatten(state.rest)["visual/bn1/mean"] != 0)


def test_overfits_a_batch(digits):
  config = tiny.config(digits, optim=Optim(lr=3e-3, schedule="constant", warmup=10))
  rng = np.random.default_rng(0)
  first = {}

  def same_rows_with_their_own_words(_, batch):
    if not first:
      words = rng.integers(200, 20000, (32, 12), dtype=np.int32)
      image = rng.integers(0, 256, batch["image"].shape, dtype=np.uint8)
      first.update(batch, tokens=words, image=image)
    return first

  history, _ = run(config, steps=100, change=same_rows_with_their_own_words)
  assert history[0, 0] > 3.0 and history[-1, 0] < 0.05


def spoil(which):
  def change(i, batch):
    return batch | {"weight": np.full_like(batch["weight"], np.nan)} if i in which else batch

  return change


def test_a_step_that_is_not_finite_changes_only_the_counters(digits):
  config = tiny.config(digits, ema=0.9)
  _, before = run(config, steps=2)
  _, after = run(config, steps=3, change=spoil({2}))
  for name in ("params", "opt", "ema", "rest", "ema_rest"):
    for path, x in trees.flatten(getattr(before, name)).items():
      np.testing.assert_array_equal(trees.flatten(getattr(after, name))[path], x, err_msg=path)
  assert int(after.step) == 3 and after.bad.tolist() == [1, 1]
  history, later = run(config, steps=4, change=spoil({1}))
  assert later.bad.tolist() == [1, 0] and np.isfinite(history[2:]).all()


def test_ema_is_fairseqs_of_weights_and_statistics(digits):
  """After six updates by its formula in float64: a copy until update 3, then the average."""
  config = tiny.config(digits, model=tiny.RESNET, ema=0.75, ema_start=3)
  kept = []

  def keep(state):
    kept.append(jax.device_get(trees.flatten({"params": state.params, "rest": state.rest})))

  _, state = run(config, steps=6, seen=keep)
  assert len(kept) == 7
  expected = {path: x.astype(np.float64) for path, x in kept[0].items()}
  for updates, now in enumerate(kept[1:], start=1):
    decay = 0.0 if updates < 3 else 0.75
    expected = {path: decay * e + (1 - decay) * now[path] for path, e in expected.items()}
  found = trees.flatten(dict(zip(("params", "rest"), state.evaluated, strict=True)))
  assert found.keys() == expected.keys() and any(path.startswith("rest/") for path in found)
  for path, x in expected.items():
    np.testing.assert_allclose(found[path], x, rtol=1e-6, atol=1e-7, err_msg=path)
    if not path.endswith("logit_scale"):
      assert np.any(np.abs(kept[-1][path] - x) > 1e-6), path


def test_bf16_computes_in_bf16_on_float32_parameters(digits, reference):
  history, state = run(tiny.config(digits, precision="bf16"))
  np.testing.assert_allclose(history[:, 0], reference[0][:, 0], rtol=0.02)
  assert np.any(history != reference[0])
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}


def test_masked_rows_count_for_nothing(digits):
  config = tiny.config(digits)

  def drop(_, batch):
    batch = dict(batch)
    batch["weight"] = np.where(np.arange(32) < 8, 0, batch["weight"]).astype(np.float32)
    batch["image"] = np.where(np.arange(32)[:, None, None, None] < 8, 255, batch["image"])
    return batch

  def drop_differently(i, batch):
    return {**drop(i, batch), "tokens": np.where(np.arange(32)[:, None] < 8, 7, batch["tokens"])}

  np.testing.assert_array_equal(
    run(config, steps=1, change=drop)[0], run(config, steps=1, change=drop_differently)[0]
  )


@dataclasses.dataclass(kw_only=True)
class Regression(Task):
  """A loss that is a sum over rows, unlike the contrastive one, with uneven weights."""

  task: Task
  whole_batch: ClassVar[bool] = False

  def examples(self, split):
    return self.task.examples(split)

  def loss(self, model, batch, *, rngs, chunks=1):
    assert chunks == 1
    features = model.encode_text(batch["tokens"], rngs=rngs)
    weight = (batch["image_index"] % 3).astype(jnp.float32)
    return {"loss": losses.mean(jnp.square(features - 1).mean(-1), weight)}


def test_summed_losses_accumulate_exactly(digits):
  config = tiny.config(digits, optim=Optim(lr=1e-3))
  config.task = Regression(task=config.task)
  whole, _ = run(config, steps=3)
  parts, _ = run(dataclasses.replace(config, accum=4), steps=3)
  np.testing.assert_allclose(parts, whole, rtol=1e-5)


@dataclasses.dataclass(kw_only=True)
class Prepared(Regression):
  """A task with work outside the gradient."""

  def prepare(self, model, batch, *, rngs, step, frozen):
    assert rngs is not None and frozen is None
    return {**batch, "image_index": jnp.ones_like(batch["image_index"])}


def test_prepare_runs_before_the_loss(digits):
  config = tiny.config(digits)
  config.task = Prepared(task=config.task)
  found, _ = run(config, steps=1)
  even = {"change": lambda _, b: b | {"image_index": np.ones_like(b["image_index"])}}
  config.task = Regression(task=config.task.task)
  np.testing.assert_allclose(found, run(config, steps=1, **even)[0], rtol=1e-6)


@dataclasses.dataclass(kw_only=True)
class Imitation(Regression):
  """The features are to be those that the model itself had before the step, but for a sign."""

  rows: int = 32

  def prepare(self, model, batch, *, rngs, step, frozen):
    assert len(batch["tokens"]) == self.rows
    # A number for the whole part, as schedules are, beside what is made for each row.
    return {**batch, "goal": -model.encode_text(batch["tokens"]), "share": 1 / (1 + step)}

  def loss(self, model, batch, *, rngs, chunks=1):
    features = model.encode_text(batch["tokens"], rngs=rngs)
    errors = jnp.square(features - batch["goal"]).mean(-1) * batch["share"]
    return {"loss": losses.mean(errors, (batch["image_index"] % 3).astype(jnp.float32))}


def test_parts_are_prepared_one_by_one_with_the_result_of_the_whole(digits):
  config = tiny.config(digits)
  config.task = Imitation(task=config.task)
  whole, _ = run(config, steps=3)
  parts = dataclasses.replace(config, accum=4, task=dataclasses.replace(config.task, rows=8))
  np.testing.assert_allclose(run(parts, steps=3)[0], whole, rtol=1e-5)
