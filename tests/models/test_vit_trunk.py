"""OFA with a ViT for its images, and with a second image, against the PyTorch original."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections.config_flags import config_path

import ofa_jax
from ofa_jax import trees
from ofa_jax.convert import __main__ as converter
from ofa_jax.convert import rules, torch_files
from ofa_jax.convert.ofa import sizes as ofa_sizes
from ofa_jax.convert.ofa import start
from ofa_jax.convert.ofa import table as convert
from ofa_jax.models import ofa
from ofa_jax.models.abstract import abstract
from ofa_jax.models.layers import Scan
from ofa_jax.models.vit import ViTConfig
from ofa_jax.models.vit_trunk import ViTTrunk
from tests.ofa_golden import (
  error,
  golden,
  golden_json,
  images,
  inputs,
  micro_config,
  micro_state_dict,
  rule_state_dict,
  vit_shapes,
)

TRUNK = ViTConfig(image_size=224, patch_size=16, width=96, layers=3, head_width=24)
CASES = {  # shape of the images, step of the stored cells and tokens
  "224": ((1, 3, 224, 224), 3, 7),
  "96x128": ((2, 3, 96, 128), 1, 1),
  "384": ((1, 3, 384, 384), 3, 7),
  "64x48": ((1, 3, 64, 48), 1, 1),
}
OPTIONS = {"code_dict_size": 32, "num_bins": 16, "orig_patch_image_size": 64}


@pytest.fixture(autouse=True)
def exact():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def trunk():
  """The golden's small trunk."""
  prefix = "encoder.embed_images."
  graph, params = nnx.split(nnx.eval_shape(lambda: ViTTrunk(TRUNK, scan=Scan(), rngs=nnx.Rngs(0))))
  paths = trees.flatten(nnx.to_pure_dict(params))
  shapes = {f"encoder/image/{path}": x.shape for path, x in paths.items()}
  weights = rules.from_torch(
    rule_state_dict(vit_shapes(TRUNK, prefix)), convert.RULES, shapes=shapes
  )
  return nnx.merge(graph, trees.unflatten(weights)["encoder"]["image"])


@pytest.mark.parametrize("case", CASES)
def test_the_small_trunk(case):
  shape, cell_step, token_step = CASES[case]
  expected = golden("vit_backbone", "trunk")

  @jax.jit
  def run(trunk, image):
    return trunk(image), trunk.ln_pre(trunk.embed(image))

  features, start = run(trunk(), images(700, shape))
  assert error(start[:, ::token_step], expected[f"{case}:ln_pre"]) < 1e-5
  features = features[:, ::cell_step, ::cell_step].transpose(0, 3, 1, 2)
  assert error(features, expected[f"{case}:out"]) < 1e-5


def test_odd_sizes():
  """What is left over is cut off; where only the width differs, positions are interpolated too."""
  run = jax.jit(lambda trunk, image: trunk(image))
  for side in ((40, 40), (224, 32)):
    image = images(1, (1, 3, *side))
    whole = tuple(16 * (x // 16) for x in side)
    features = run(trunk(), image)
    assert features.shape == (1, side[0] // 16, side[1] // 16, 96)
    np.testing.assert_array_equal(features, run(trunk(), image[:, : whole[0], : whole[1]]))


def vit_state_dict(vit):
  """The golden micro model with a ViT in its ResNet's place."""
  released = {name: shape for name, (shape, _) in golden_json("micro/state_dict").items()}
  shapes = {k: x for k, x in released.items() if not k.startswith("encoder.embed_images.")}
  shapes |= vit_shapes(vit) | {"encoder.image_proj.weight": (32, vit.width)}
  return rule_state_dict(shapes)


@functools.cache
def real_state_dict():
  """The golden micro model with the original's ViT."""
  return vit_state_dict(ofa.VIT_B_16)


@functools.cache
def two_images_state_dict():
  """The golden micro model with a longer ResNet and a type for a second image."""
  shapes = {name: shape for name, (shape, _) in golden_json("micro/state_dict").items()}
  layer = "encoder.embed_images.layer3"
  first = {k: x for k, x in shapes.items() if k.startswith(f"{layer}.0.") and "downs" not in k}
  shapes |= {k.replace(f"{layer}.0", f"{layer}.1"): x for k, x in first.items()}
  shapes[f"{layer}.1.conv1.weight"] = (256, 1024, 1, 1)
  return rule_state_dict(shapes | {"encoder.type_embedding.weight": (3, 32)})


MODELS = {  # the golden's name, the weights, the config that they show
  "micro": (real_state_dict, {"stages": (), "vit": ofa.VIT_B_16}),
  "two_images": (two_images_state_dict, {"stages": (2, 2, 2), "max_images": 2}),
}


def test_the_names_of_the_originals_trunk():
  released = golden_json("vit_backbone/state_dict").items()
  assert vit_shapes(ofa.VIT_B_16) == {name: tuple(shape) for name, (shape, _) in released}


@pytest.mark.parametrize("name", MODELS)
def test_the_originals_models(name):
  state_dict, options = MODELS[name]
  expected, given = golden("vit_backbone", name), inputs(golden("vit_backbone", name))
  config = ofa_sizes.infer_config(state_dict(), OPTIONS)
  assert config == micro_config(**options)
  pictures = {k: x for k, x in given.items() if "image" in k}

  @jax.jit
  def run(model, tokens, decoder_tokens, pictures):
    encoded = model.encode(tokens, **pictures)
    return model.encoder.image(pictures["image"]), encoded, model.decode(encoded, decoder_tokens)

  model = nnx.merge(abstract(config)[0], *convert.from_torch(state_dict(), config))
  features, encoded, logits = run(model, given["tokens"], given["decoder_tokens"], pictures)
  if "trunk_out_sub" in expected:
    assert error(features[..., ::8].transpose(0, 3, 1, 2), expected["trunk_out_sub"]) < 1e-5
  np.testing.assert_array_equal(encoded.mask, ~expected["encoder_padding_mask"].astype(bool))
  positions = expected["encoder_position_embeddings"]
  assert error(np.broadcast_to(encoded.positions, positions.shape), positions) < 1e-5
  assert error(encoded.hidden, expected["encoder_out"]) < 1e-5
  assert error(logits, expected["logits"]) < 1e-5


SMALL = ViTConfig(image_size=64, patch_size=16, width=48, layers=2, head_width=24)


def test_there_and_back_is_bit_equal():
  tensors = vit_state_dict(SMALL)
  options = {**OPTIONS, "vit_head_width": 24, "freeze_resnet": True, "resnet_drop_path_rate": 0.1}
  config = ofa_sizes.infer_config(tensors, options)
  assert config == micro_config(stages=(), vit=SMALL)
  back = convert.to_torch(*convert.from_torch(tensors, config), config)
  assert back.keys() == tensors.keys()
  for name in vit_shapes(SMALL):
    np.testing.assert_array_equal(back[name], tensors[name], strict=True)
  theirs = convert.to_huggingface(back)
  settings = ofa_sizes.settings({})
  for described in (
    ofa_sizes.to_options(config, settings),
    ofa_sizes.to_huggingface(config, settings),
  ):
    assert ofa_sizes.infer_config(theirs, described) == config
  assert ofa_sizes.from_json(json.loads(json.dumps(ofa_sizes.to_json(config)))) == config
  real = dataclasses.replace(config, vit=ofa.VIT_B_16)
  assert ofa_sizes.to_options(real, settings)["resnet_type"] == "ViT-B/16"


@pytest.mark.parametrize("name", ["vit", "two_images"])
def test_the_front_door(tmp_path, monkeypatch, name):
  """A `.pt` by the command, the API's answer, and back to a `.pt`.

  The ViT is a small one here: what a model answers is compared with the original's above.
  """
  vit = ViTConfig(image_size=64, patch_size=16, width=64, layers=2)
  tensors = two_images_state_dict() if name == "two_images" else vit_state_dict(vit)
  tensors = {key: np.array(x) for key, x in tensors.items()}
  torch_files.save_fairseq(tmp_path / "checkpoint.pt", tensors, options=OPTIONS)
  for *names, to in (("checkpoint.pt", "ours", ""), ("ours", "back.pt", "--to=torch")):
    paths = [str(tmp_path / name) for name in names]
    monkeypatch.setattr("sys.argv", ["convert_torch_weights.py", *paths, *filter(None, [to])])
    converter.main()
  back = torch_files.load_state_dict(tmp_path / "back.pt")
  assert back.keys() == tensors.keys()
  made = (*convert.buffers(micro_config()), "num_batches_tracked")
  for key in (key for key in tensors if not key.endswith(made)):
    np.testing.assert_array_equal(back[key], tensors[key])

  ours, _ = ofa_jax.load_from_name(tmp_path / "ours")
  stored = golden("vit_backbone", "two_images" if name == "two_images" else "micro")
  given = {key: np.asarray(x) for key, x in inputs(stored).items()}
  tokens, image = (given["tokens"], given["decoder_tokens"]), given["image"]
  second = given.get("second_image")
  logits = ours.forward(*tokens, image, given["image_mask"], second_images=second)
  if second is None:
    config = micro_config(stages=(), vit=vit)
    model = nnx.merge(abstract(config)[0], *convert.from_torch(tensors, config))
    assert error(logits, jax.jit(lambda model: model(**given))(model)) < 1e-5
    with pytest.raises(ValueError, match="table of types is for, found a second one"):
      ours.forward(*tokens, image, second_images=image)
  else:
    assert error(logits, stored["logits"]) < 1e-5
    with pytest.raises(ValueError, match="Expected a first image beside the second"):
      ours.forward(*tokens, second_images=image)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"stages": ()}, "expected stages of a ResNet, 3 numbers, or a vit"),
    ({"vit": ofa.VIT_B_16}, r"expected stages=\(\) beside a vit"),
    ({"max_images": 3}, "expected max_images to be 1 or 2, found 3"),
    (
      {"stages": (), "vit": ofa.VIT_B_16, "freeze_resnet": True},
      "expected no freeze_resnet and no resnet_drop_path with a vit",
    ),
    (
      {"stages": (), "vit": ViTConfig(image_size=64, patch_size=8, width=60, layers=1)},
      "expected vit.patch_size to be 16.*; vit: expected width to be a multiple of head_width 64",
    ),
  ],
)
def test_options_that_do_not_fit(options, message):
  with pytest.raises(ValueError, match=message):
    abstract(micro_config(**options))


def test_training_starts_from_a_model_for_one_image():
  """A type for a second image is drawn anew where there is none."""
  lines = []
  config = micro_config(max_images=2)
  tensors = start.complete(micro_state_dict(), config, seed=0, say=lines.append)
  assert lines == ["types of images: 1 rows behind the 2 stored ones, drawn anew"]
  table = convert.from_torch(tensors, config)[0]["encoder"]["type"]["embedding"]
  np.testing.assert_array_equal(table[:2], micro_state_dict()["encoder.type_embedding.weight"])
  assert table[2].any()


def test_a_mesh_has_a_place_for_every_parameter():
  for options in ({"stages": (), "vit": SMALL}, {"max_images": 2}):
    config = micro_config(**options)
    paths = trees.flatten(abstract(config)[1])
    assert not [p for p in paths if trees.first_match(config.sharding, p) is None]
    assert not [p for p in paths if not any(re.search(t, p) for t in config.towers.values())]


def test_patches_are_drawn_of_both_images():
  """In training some cells of each; the first image's are those that it has alone."""
  two = MODELS["two_images"]
  config = micro_config(**two[1])
  model = nnx.merge(abstract(config)[0], *convert.from_torch(two[0](), config))
  image, second = images(1, (1, 3, 64, 64)), images(2, (1, 3, 64, 32))

  @jax.jit
  def run(model, image, second, key):
    text = jnp.array([[0, 5, 2]])
    alone = model.encode(text, image=image, num_patches=3, rngs=key)
    both = model.encode(text, image=image, second_image=second, num_patches=3, rngs=key)
    return alone, both

  alone, both = run(model, image, second, jax.random.key(0))
  assert alone.hidden.shape[1] == 3 + 3 and both.hidden.shape[1] == 3 + 3 + 3
  np.testing.assert_allclose(both.positions[:, 3:], alone.positions, atol=1e-6)


def test_a_flag_may_name_every_field():
  """Fields of two types have none for the command line, as ml_collections reads annotations."""
  config = micro_config(stages=(), vit=SMALL)
  for field in dataclasses.fields(config):
    assert config_path.get_type(field.name, config) is not None
