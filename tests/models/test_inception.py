"""Inception v3 in both variants against torchvision and pytorch-fid."""

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ofa_jax.models import inception, pillow
from ofa_jax.models.abstract import abstract
from ofa_jax.models.inception import InceptionConfig
from tests.frozen_golden import DIR, error, golden, last, model

# The stored parts of the features of each depth, with channels first.
PARTS = (
  np.s_[:, ::8, ::12, ::12],
  np.s_[:, ::16, ::6, ::6],
  np.s_[:, ::32, ::3, ::3],
  np.s_[:, :, 0, 0],
)


@pytest.fixture(autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def arrays():
  return golden("fid_is", "inception")


@pytest.fixture(scope="module")
def pictures():
  """uint8[1, H, W, 3] of both pictures, which have sizes of their own."""
  return [
    np.asarray(Image.open(DIR / "fid_is" / f"image_{i}.png").convert("RGB"))[None] for i in (0, 1)
  ]


def squared(picture):
  return pillow.resize(picture, (299, 299), kind="bilinear")


def test_pictures_are_resized_as_by_the_scripts(arrays, pictures):
  for i, picture in enumerate(pictures):
    np.testing.assert_array_equal(
      squared(picture)[0, ::6, ::6], arrays["resize_pil_299_sub"][i], strict=True
    )
    for corners, name in ((True, "true"), (False, "false")):
      found = inception.resize(np.float32(picture) / 255, size=299, corners=corners)
      expected = last(arrays[f"interpolate_align_{name}_sub"])[i]
      assert error(found[0, ::12, ::12], expected) < 1e-5


@pytest.mark.slow  # networks of 94 convolutions at the size they are for, 12 s each
@pytest.mark.parametrize("variant", ["torchvision", "pytorch_fid"])
def test_features_are_the_originals(variant, arrays, pictures):
  network = model(variant)
  name = {"torchvision": "ofa_fid", "pytorch_fid": "pytorch_fid"}[variant]
  graph, state = nnx.split(network)
  blocks = jax.jit(lambda state, x: nnx.merge(graph, state).blocks(x))
  for kind, prepared in (("from299", squared), ("raw", lambda x: x)):
    inputs = [network.mapped(prepared(picture)) for picture in pictures]
    found = blocks(state, np.concatenate(inputs))
    for i, (x, part) in enumerate(zip(found, PARTS, strict=True)):
      x = np.moveaxis(np.asarray(x), -1, 1)[part]
      assert error(x, arrays[f"{name}:{kind}:block{i}"]) < 2e-5
  features = network.features(pictures[0], dims=192)
  assert error(features[0], np.asarray(found[1])[0].mean((0, 1))) < 1e-5
  if variant == "torchvision":
    unit = np.concatenate([squared(picture) for picture in pictures])
    logits = network.logits(unit)
    assert error(logits, arrays["torchvision_logits"]) < 1e-5
    assert error(jax.nn.softmax(logits), arrays["torchvision_probs"]) < 1e-5
    logits = network.classify(network.mapped(unit))
    assert error(logits, arrays["torchvision_logits_transform_input_true"]) < 1e-5


def shape_of(config, method, *args, **options):
  """What a method of a model that is not computed gives."""
  graph, *weights = abstract(config)
  return jax.eval_shape(
    lambda weights, *args: getattr(nnx.merge(graph, *weights), method)(*args, **options),
    weights,
    *args,
  )


def test_shapes_are_those_of_the_paper():
  config = InceptionConfig(variant="pytorch_fid", num_classes=1008)
  found = shape_of(config, "blocks", jax.ShapeDtypeStruct((2, 299, 299, 3), np.float32))
  shapes = [(2, 73, 73, 64), (2, 35, 35, 192), (2, 17, 17, 768), (2, 1, 1, 2048)]
  assert [x.shape for x in found] == shapes
  picture = jax.ShapeDtypeStruct((2, 64, 48, 3), np.uint8)
  assert shape_of(config, "features", picture).shape == (2, 2048)
  assert shape_of(config, "logits", picture).shape == (2, 1008)


def test_what_is_not_there_is_told():
  with pytest.raises(ValueError, match="torchvision or pytorch_fid, found 'keras'"):
    abstract(InceptionConfig(variant="keras"))
  picture = jax.ShapeDtypeStruct((2, 64, 48, 3), np.uint8)
  with pytest.raises(ValueError, match="64, 192, 768, 2048 dims, found 100"):
    shape_of(InceptionConfig(), "features", picture, dims=100)
