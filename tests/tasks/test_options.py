"""The options of contrastive training in real updates: SigLIP, teachers, locked towers, FLIP."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax import hub, losses, trees
from ofa_jax.config import MeshShape, Optim
from ofa_jax.data import pipeline
from ofa_jax.engine import sharding, step
from ofa_jax.models import cnclip
from ofa_jax.models.abstract import abstract
from ofa_jax.models.cnclip import layer_rates
from ofa_jax.tasks.contrastive import to_float
from ofa_jax.validation import validate
from tests import tiny
from tests.engine import test_step


def make(config, mesh=None):
  mesh = mesh or sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
  return step.build(config, mesh, steps=10)


def batches(config, mesh, *, steps):
  with pipeline.train_batches(
    config.task.examples("train"), batch_size=32, seed=0, start=0, bad=pipeline.BadRows()
  ) as rows:
    return [sharding.to_global(next(rows), mesh) for _ in range(steps)]


def run(config, *, steps=2, mesh=None):
  """States before and after some updates, with the losses."""
  program = make(config, mesh)
  state = test_step.fresh(program)
  before = jax.device_get(state)
  update = step.train_step(program)
  frozen = config.task.frozen(program.mesh, precision=config.precision)
  history = []
  for batch in batches(config, program.mesh, steps=steps):
    state, metrics = update(state, batch, frozen)
    history.append(jax.device_get(metrics))
  return before, jax.device_get(state), history


def moved(before, after):
  before, after = trees.flatten(before), trees.flatten(after)
  return {path: np.any(after[path] != x) for path, x in before.items()}


SIGLIP = dataclasses.replace(tiny.MODEL, logit_scale=float(np.log(10)), logit_bias=-10.0)


def test_siglip_on_eight_devices_is_one(digits):
  config = tiny.config(
    digits, model=SIGLIP, task={"loss_kind": "sigmoid", "multi_positive": True, "ring": True}
  )
  validate(config, devices=1)
  before, after, history = run(config)
  assert before.params["logit_bias"] == -10 and np.isclose(before.params["logit_scale"], np.log(10))
  assert after.params["logit_bias"] != -10
  shape = MeshShape(data=2, fsdp=2, tensor=2)
  again = run(dataclasses.replace(config, mesh=shape), mesh=sharding.make_mesh((2, 2, 2)))[2]
  for one, eight in zip(history, again, strict=True):
    np.testing.assert_allclose(eight["loss"], one["loss"], rtol=1e-5)


def test_the_bias_belongs_to_the_sigmoid_loss(digits):
  with pytest.raises(ValueError, match=r"expected a number with task\.loss_kind='sigmoid'"):
    validate(tiny.config(digits, task={"loss_kind": "sigmoid"}), devices=1)
  with pytest.raises(ValueError, match="None with 'softmax', found -10"):
    validate(tiny.config(digits, model=SIGLIP), devices=1)


def test_no_device_holds_all_logits(digits):
  config = tiny.config(digits, batch_size=72, task={"ring": True})
  mesh = sharding.make_mesh((2, 2, 2))
  program = make(config, mesh)
  spec = config.task.batch_spec(72)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
  state = jax.tree.map(place, program.abstract, program.shardings)
  batch = jax.tree.map(lambda x: place(x, sharding.batch_sharding(mesh)), spec)
  text = step.train_step(program).lower(state, batch).compile().as_text()
  assert "[72,72]" not in text and "[18,18]" in text and "collective-permute" in text


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """A stored model of another width than the student's."""
  config = dataclasses.replace(tiny.MODEL, embed_dim=24)
  params, rest = jax.tree.map(np.asarray, _initial(config))
  path = tmp_path_factory.mktemp("teacher") / "model"
  hub.save_directory(path, config, params, rest)
  return str(path)


def _initial(config):
  @jax.jit
  def make():
    return trees.split(config.build(rngs=nnx.Rngs(7)))[1:]

  return make()


def test_a_teacher_adds_its_losses(digits, teacher):
  options = {"teacher": teacher, "distill_features": 0.5, "distill_logits": 2.0}
  plain = run(tiny.config(digits), steps=1)[2][0]
  config = tiny.config(digits, task=options)
  validate(config, devices=1)
  before, _, history = run(config, steps=1)
  assert not any("teacher" in path for path in trees.flatten(before))

  program = make(config)
  _, params, rest = hub.load_directory(teacher)
  graph, _, _ = abstract(hub.open_model(teacher).config)
  (batch,) = batches(config, program.mesh, steps=1)

  @jax.jit
  @program.traced
  def added(teacher, student, batch):
    """The two losses, without the task."""
    other, student = nnx.merge(graph, *teacher), program.model(*student)
    pixels, tokens = to_float(batch["image"]), batch["tokens"]
    features = other.encode_image(pixels)
    image, text = student.encode_image(pixels), student.encode_text(tokens)
    kind = losses.Teacher(
      losses.normalize(features),
      losses.normalize(other.encode_text(tokens)),
      jnp.exp(other.logit_scale[...]),
    )
    terms = losses.contrastive(
      losses.normalize(image),
      losses.normalize(text),
      scale=jnp.exp(student.logit_scale[...]),
      teacher=kind,
    )
    kd = losses.distill_features(losses.normalize(image), features)
    return kd.value, terms["distill_logits"].value

  kd, logits = added((params, rest), (before.params, before.rest), batch)
  expected = plain["loss"] + 0.5 * kd + 2.0 * logits
  np.testing.assert_allclose(history[0]["loss"], expected, rtol=1e-5)
  np.testing.assert_allclose(history[0]["distill_features"], kd, rtol=1e-4)


@pytest.mark.slow  # compiles two steps; the quick one on eight devices is that of SigLIP
def test_a_teacher_on_eight_devices_is_one(digits, teacher):
  config = tiny.config(digits, task={"teacher": teacher, "distill_logits": 2.0})
  one = run(config, steps=1)[2][0]
  shape = MeshShape(data=2, fsdp=2, tensor=2)
  eight = run(dataclasses.replace(config, mesh=shape), steps=1, mesh=sharding.make_mesh((2, 2, 2)))
  for name in ("loss", "grad_norm", "distill_features", "distill_logits"):
    np.testing.assert_allclose(eight[2][0][name], one[name], rtol=1e-5, err_msg=name)


def test_a_teacher_is_no_constant_of_the_program(digits, teacher):
  config = tiny.config(digits, task={"teacher": teacher})
  program = make(config)
  spec = config.task.frozen(program.mesh, precision="fp32", load=False)
  loaded = config.task.frozen(program.mesh, precision="fp32")
  assert config.task.frozen(program.mesh, precision="fp32", training=False) is None
  assert not trees.difference(spec, loaded)
  batch = config.task.batch_spec(32)
  with_teacher = step.train_step(program).lower(program.abstract, batch, spec).as_text()
  plain = make(tiny.config(digits))
  without = step.train_step(plain).lower(plain.abstract, batch).as_text()
  assert len(with_teacher) - len(without) < trees.num_bytes(spec) / 10


def test_a_teacher_of_another_size_is_told(digits, teacher):
  config = tiny.config(digits, model=tiny.RESNET, task={"teacher": teacher})
  with pytest.raises(ValueError, match="expected a model of 32 pixels, found one of 16"):
    validate(config, devices=1)


def test_a_tower_but_for_its_last_layer_stays_bit_for_bit(digits):
  rates = layer_rates(tiny.MODEL, "image", trained=1, decay=0.5)
  optim = Optim(lr=1e-2, weight_decay=0.1, lr_scale=rates)
  before, after, _ = run(tiny.config(digits, optim=optim))
  before, after = trees.flatten(before.params), trees.flatten(after.params)
  for path, x in before.items():
    if path.startswith("visual/blocks/"):
      np.testing.assert_array_equal(after[path][0], x[0], err_msg=path)
      assert np.any(after[path][1] != x[1]), path
    elif path.startswith("visual/") and path not in ("visual/proj", *LAST_NORM):
      np.testing.assert_array_equal(after[path], x, err_msg=path)
    else:
      assert np.any(after[path] != x), path


LAST_NORM = ("visual/ln_post/scale", "visual/ln_post/bias")


def test_rates_fall_with_the_distance_from_the_output():
  assert layer_rates(tiny.MODEL, "text", decay=0.5) == (
    (r"^bert/blocks/", (0.25, 0.5)),
    (r"^bert/", 0.125),
    (r"^text_projection$", 1.0),
  )
  stages = layer_rates(tiny.RESNET, "image", trained=2)
  assert [rate for _, rate in stages] == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
  with pytest.raises(ValueError, match="0 to 2 trained layers, found 3"):
    layer_rates(tiny.MODEL, "text", trained=3)
  with pytest.raises(ValueError, match="image, text, found 'vision'"):
    layer_rates(tiny.MODEL, "vision")


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("name", cnclip.MODELS)
def test_rates_name_every_parameter_of_a_tower(name, tower):
  config = cnclip.config(*cnclip.MODELS[name])
  rates = layer_rates(config, tower, trained=0)
  _, params, _ = abstract(config)
  for path in trees.flatten(params):
    inside = trees.first_match(((config.towers[tower], True),), path)
    rate = trees.first_match(rates, path)
    assert (rate is not None) == bool(inside), path
    assert not np.any(rate or 0.0)


def test_a_frozen_resnet_keeps_its_statistics(digits):
  optim = Optim(lr=1e-3, lr_scale=layer_rates(tiny.RESNET, "image", trained=0))
  config = tiny.config(digits, model=tiny.RESNET, optim=optim)
  with pytest.raises(ValueError, match=r"task\.freeze_batch_norm: expected True"):
    validate(config, devices=1)
  config.task = dataclasses.replace(config.task, freeze_batch_norm=True)
  validate(config, devices=1)
  before, after, _ = run(config)
  assert not any(moved(before.rest, after.rest).values())
  changed = moved(before.params, after.params)
  assert not any(m for path, m in changed.items() if path.startswith("visual/"))
  assert all(m for path, m in changed.items() if not path.startswith("visual/"))


def test_masking_ends_at_its_step(digits):
  losses_of = lambda **task: [  # noqa: E731
    float(m["loss"]) for m in run(tiny.config(digits, task=task, optim=SLOW), steps=3)[2]
  ]
  masked = losses_of(mask_ratio=0.5)
  plain = losses_of()
  both = losses_of(mask_ratio=0.5, mask_until=2)
  assert both[:2] == pytest.approx(masked[:2], rel=1e-6)
  assert both[2] == pytest.approx(plain[2], rel=1e-5)
  assert masked[2] != pytest.approx(plain[2], rel=1e-5)


SLOW = Optim(lr=1e-9, eps=1e-4)  # the losses are then those of the first weights
