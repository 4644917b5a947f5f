"""Chinese-CLIP against the original: features, loss, gradients, statistics, sizes, sharding."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax import losses, numerics, trees
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.engine import sharding
from ofa_jax.models import cnclip
from ofa_jax.models.layers import Scan
from ofa_jax.models.vit import random_patches
from tests.cnclip_golden import (
  MICRO,
  abstract,
  error,
  golden,
  golden_json,
  images,
  micro_config,
  micro_model,
  micro_split,
  realsize_images,
  realsize_model,
)

# Mathematically zero gradients, of biases that every key shares: rounding noise in the original.
NOISE = re.compile(r"self\.key\.bias$|k_proj\.bias$")


@pytest.fixture(autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


def _batch(model, name="forward"):
  arrays = golden(model, name)
  return jnp.asarray(images(arrays)), jnp.asarray(arrays["token_ids"], jnp.int32)


def _loss(params, rest, batch, *, graph, rngs=None):
  """The symmetric contrastive loss, with features and the new statistics."""
  model = nnx.merge(graph, params, rest)
  image, text, scale = model(*batch, rngs=rngs)
  metrics = losses.contrastive(image, text, scale=scale)
  rest = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])
  return metrics["loss"].value, (metrics, rest)


@pytest.mark.parametrize("model", MICRO)
def test_features_and_logits_are_the_originals(model):
  clip, arrays = micro_model(model), golden(model, "forward")
  image, tokens = _batch(model)

  @jax.jit
  def run(clip, image, tokens):
    return clip.encode_image(image), clip.encode_text(tokens), clip(image, tokens)

  image_features, text_features, normalized = run(clip, image, tokens)
  assert error(image_features, arrays["image_features"]) < 1e-5
  assert error(text_features, arrays["text_features"]) < 1e-5
  image_features, text_features, scale = normalized
  assert error(image_features, arrays["image_features_norm"]) < 1e-5
  assert error(text_features, arrays["text_features_norm"]) < 1e-5
  assert error(scale, arrays["logit_scale_exp"]) < 1e-6
  logits = scale * image_features @ text_features.T
  assert error(logits, arrays["logits_per_image"]) < 1e-5
  assert error(logits.T, arrays["logits_per_text"]) < 1e-5
  short = golden(model, "forward_ctx16")
  tokens = jnp.asarray(short["token_ids"], jnp.int32)
  found = jax.jit(lambda clip, tokens: clip.encode_text(tokens))(clip, tokens)
  assert error(found, short["text_features"]) < 1e-5


@pytest.mark.parametrize("model", MICRO)
def test_training_gradients_and_statistics_are_the_originals(model):
  graph, params, rest = micro_split(model)
  expected, norms = golden(model, "loss_grad"), golden_json(model, "grad_norms_all")
  step = jax.jit(
    jax.value_and_grad(
      lambda *args: _loss(*args, graph=graph, rngs=jax.random.key(0)), has_aux=True
    )
  )
  (loss, (metrics, new_rest)), grads = step(params, rest, _batch(model))
  assert error(loss, expected["loss"]) < 1e-5
  assert float(metrics["i2t_acc"].value) == expected["i2t_acc"]
  assert float(metrics["t2i_acc"].value) == expected["t2i_acc"]
  config = micro_config(model)
  grads = convert.to_torch(jax.device_get(grads), jax.device_get(new_rest), config)
  words = grads["bert.embeddings.word_embeddings.weight"]
  assert not words[config.text.pad].any()

  # The gradients' names also hold the running statistics after the step.
  names = [k for k in expected if k.startswith("grad/") and "num_batches_tracked" not in k]
  for key in names:
    name, _, part = key.removeprefix("grad/").partition("[")
    found = grads[name]
    if part:
      found = found[expected["word_rows"]] if part == "rows]" else found[: int(part[1:-1])]
    if NOISE.search(name):
      assert np.abs(found).max() < 1e-6
    else:
      assert error(found, expected[key]) < 1e-5, name
  assert len(names) >= 19
  # BatchNorm amplifies rounding: of the RN50 the original's own norms are 8e-6 off float64's, ours
  # 6e-6.
  for name, norm in norms.items():
    found = np.linalg.norm(np.float64(grads[name]))
    assert abs(found - norm) < (1e-6 if NOISE.search(name) else 1e-5 * norm), name

  evaluated, _ = jax.jit(functools.partial(_loss, graph=graph))(params, rest, _batch(model))
  assert error(evaluated, expected["loss_eval_mode"]) < 1e-5


@pytest.mark.parametrize("ratio", ["0.5", "0.3", "0.75"])
def test_masked_loss_and_gradients_are_the_originals(ratio):
  graph, params, rest = micro_split("micro_vit")
  expected = golden("micro_vit", "flip")
  image, tokens = _batch("micro_vit")
  keep = jnp.asarray(expected[f"{ratio}/ids_keep_plus1"] - 1)
  drawn = random_patches(jax.random.key(0), 16, batch=8, keep=int(16 * (1 - float(ratio))))
  assert keep.shape == drawn.shape

  def loss(params):
    model = nnx.merge(graph, params, rest)
    features = model.encode_image(image, keep=keep)
    image_features = losses.normalize(features)
    text_features = losses.normalize(model.encode_text(tokens))
    scale = jnp.exp(model.logit_scale[...])
    return losses.contrastive(image_features, text_features, scale=scale)["loss"].value, features

  (value, features), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert error(features, expected[f"{ratio}/image_features"]) < 1e-5
  assert error(value, expected[f"{ratio}/loss"]) < 1e-5
  grads = convert.to_torch(jax.device_get(grads), {}, micro_config("micro_vit"))
  names = [k for k in expected if k.startswith(f"{ratio}/grad/")]
  assert len(names) == 3
  for name in names:
    assert error(grads[name.partition("grad/")[2]], expected[name]) < 1e-5, name


@pytest.mark.parametrize("name", ["ViT-B-16", "RN50"])
def test_real_size_features_are_the_originals(name):
  arrays = golden("realsize", f"{name}.forward")
  model = realsize_model(name)

  @jax.jit
  def run(model, image, tokens):
    return model.encode_image(image), model.encode_text(tokens)

  tokens = jnp.asarray(arrays["token_ids"], jnp.int32)
  image_features, text_features = run(model, jnp.asarray(realsize_images()), tokens)
  assert error(image_features, arrays["image_features"]) < 1e-4
  assert error(text_features, arrays["text_features"]) < 1e-4


COUNTS = {  # image tower, BERT, all
  "RN50": (38_316_896, 37_886_208, 76_989_537),
  "ViT-B-16": (86_192_640, 101_677_056, 188_262_913),
  "ViT-L-14": (303_966_208, 101_677_056, 406_233_089),
  "ViT-L-14-336": (304_293_888, 101_677_056, 406_560_769),
  "ViT-H-14": (632_076_800, 324_472_832, 957_598_209),
}


@pytest.mark.parametrize("name", cnclip.MODELS)
def test_released_models_have_the_published_sizes(name):
  _, params, _ = abstract(cnclip.config(*cnclip.MODELS[name]))
  image, bert, total = COUNTS[name]
  assert trees.count(params["visual"]) == image
  assert trees.count(params["bert"]) == bert
  assert trees.count(params) == total


def test_the_unreleased_vit_b_32_has_its_size():
  _, params, _ = abstract(cnclip.config("ViT-B-32", "RoBERTa-wwm-ext-base-chinese"))
  assert trees.count(params) == 189_919_489


@pytest.mark.parametrize(("vision", "text"), itertools.product(cnclip.VISION, cnclip.TEXT))
def test_tables_cover_every_parameter_of_every_config(vision, text):
  config = cnclip.config(vision, text)
  _, params, rest = abstract(config)
  assert bool(rest) == (vision == "RN50")
  for path, x in trees.flatten(params).items():
    spec = trees.first_match(config.sharding, path)
    assert spec is not None and len(spec) <= x.ndim, path
    assert sum(bool(re.search(p, path)) for p in config.towers.values()) == 1, path
    if x.size > 2**20 and "positional" not in path:
      assert "fsdp" in spec, path


def test_configs_are_fresh_and_names_are_checked():
  one = cnclip.config("RN50", "RBT3-chinese")
  one.text.dropout = 0.0
  assert cnclip.config("RN50", "RBT3-chinese").text.dropout == 0.1
  assert one.name == "RN50@RBT3-chinese"
  with pytest.raises(ValueError, match=r"did you mean ViT-B-16(.|\n)*did you mean RBT3-chinese"):
    cnclip.config("ViT-B16", "RBT3-chines")


def test_scalars_are_initialised_as_in_the_original():
  config = dataclasses.replace(micro_config("micro_vit"), embed_dim=256)

  @jax.jit  # which leaves out the towers
  def init():
    model = config.build(rngs=nnx.Rngs(0))
    return model.logit_scale[...], model.text_projection[...]

  logit_scale, text_projection = init()
  assert error(logit_scale, np.log(1 / 0.07)) < 1e-6
  assert abs(float(text_projection.std()) * 32**0.5 - 1) < 0.05


@pytest.mark.parametrize("model", MICRO)
def test_bfloat16_is_finite_and_close(model):
  graph, params, rest = micro_split(model)
  half = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if p.ndim else p, params)
  batch, arrays = _batch(model), golden(model, "forward")

  def loss(params):
    image, text, scale = nnx.merge(graph, params, rest)(*batch)
    return losses.contrastive(image, text, scale=scale)["loss"].value, (image, text)

  grads, found = jax.jit(jax.grad(loss, has_aux=True))(half)
  for ours, name in zip(found, ("image_features_norm", "text_features_norm"), strict=True):
    assert ours.dtype == jnp.float32
    assert float((ours * arrays[name]).sum(-1).min()) > 0.999
  for path, g in trees.flatten(grads).items():
    assert bool(jnp.isfinite(g).all()), path
    assert g.dtype == (jnp.float32 if path == "logit_scale" else jnp.bfloat16), path


# A quarter of a minute for the second; tests/engine/test_step.py trains a ResNet on eight devices.
@pytest.mark.parametrize("model", ["micro_vit", pytest.param("micro_rn50", marks=pytest.mark.slow)])
def test_eight_devices_compute_what_one_does(model):
  """In float64, where the order of a sum does not decide on which side of a kink a ReLU stands."""
  graph, params, rest = micro_split(model, dropout=0.1, scan=Scan(remat="dots"))
  batch = _batch(model)

  @jax.jit
  def step(params, rest, batch):
    params = numerics.cast(params, "fp64")
    gradient = jax.value_and_grad(_loss, has_aux=True)
    (value, (_, rest)), grads = gradient(params, rest, batch, graph=graph, rngs=jax.random.key(3))
    return {"loss": value, "grads": grads, "rest": rest}

  with jax.enable_x64(True):
    expected = trees.flatten(step(params, rest, batch))
    mesh = sharding.make_mesh((2, 2, 2))
    places = sharding.params_shardings(params, micro_config(model).sharding, mesh)
    assert any("tensor" in str(p.spec) for p in jax.tree.leaves(places))
    assert any("fsdp" in str(p.spec) for p in jax.tree.leaves(places))
    with jax.set_mesh(mesh):
      found = step(
        jax.device_put(params, places),
        jax.device_put(rest, sharding.replicated(mesh)),
        jax.device_put(batch, sharding.batch_sharding(mesh)),
      )
  largest = max(float(np.abs(x).max()) for x in expected.values())
  for path, x in trees.flatten(found).items():
    x, y = np.asarray(x), np.asarray(expected[path])
    assert x.dtype == (np.float32 if path.startswith("rest/") else np.float64), path
    # Gradients that are zero but for rounding are compared on the scale of the others.
    limit = 1e-7 if path.startswith("rest/") else 1e-10
    assert np.abs(x - y).max() <= limit * max(np.abs(y).max(), 1e-4 * largest), path
