"""The ModifiedResNet against the original, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax.models.clip_resnet import ModifiedResNet, ResNetConfig
from tests.cnclip_golden import error, golden, images, micro_model
from tests.models.test_vit import check_initial


@pytest.fixture(autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


def test_every_part_is_the_originals():
  resnet, arrays = micro_model("micro_rn50").visual, golden("micro_rn50", "forward")
  h = {k.removeprefix("h/v."): v for k, v in arrays.items() if k.startswith("h/v.")}

  def check(x, name):
    expected = h.pop(name)
    assert error(x, expected.transpose(0, 2, 3, 1) if expected.ndim == 4 else expected) < 1e-5

  image = jnp.asarray(images(arrays)[:3])
  # The original's ReLU works in place, so that what was recorded of its norms is behind it.
  x = jax.nn.relu(resnet.bn1(resnet.conv1(image)))
  check(x, "bn1")
  x = jax.nn.relu(resnet.bn2(resnet.conv2(x)))
  check(x, "bn2")
  check(jax.nn.relu(resnet.bn3(resnet.conv3(x))), "bn3")
  x = resnet.stem(image)
  check(x, "avgpool")
  for name in ("layer1", "layer2", "layer3", "layer4"):
    x = getattr(resnet, name)(x)
    check(x, name)
  check(resnet.attnpool(x), "attnpool")
  assert not h


def test_features_are_the_originals():
  arrays = golden("micro_rn50", "forward")
  found = micro_model("micro_rn50").visual(jnp.asarray(images(arrays)))
  assert error(found, arrays["image_features"]) < 1e-5


def test_only_training_updates_the_statistics():
  resnet = micro_model("micro_rn50").visual
  image = jnp.asarray(images(golden("micro_rn50", "forward")))
  before = nnx.to_pure_dict(nnx.state(resnet, nnx.BatchStat))
  resnet(image)
  for a, b in zip(
    jax.tree.leaves(before), jax.tree.leaves(nnx.state(resnet, nnx.BatchStat)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  resnet(image, rngs=jax.random.key(0))
  for a, b in zip(
    jax.tree.leaves(before), jax.tree.leaves(nnx.state(resnet, nnx.BatchStat)), strict=True
  ):
    assert not np.array_equal(a, b)


def test_sizes_that_do_not_fit_are_errors():
  config = ResNetConfig(image_size=50, width=1, head_width=64)
  with pytest.raises(ValueError, match=r"multiple of 32, found 50.*head_width 64, found 32"):
    ModifiedResNet(config, 4, rngs=nnx.Rngs(0))


def test_initialisation_is_torchs():
  key = jax.random.key(0, impl="rbg")  # compiles faster than the default
  config = ResNetConfig(image_size=64, layers=(1, 1, 1, 1), width=16)
  resnet = jax.jit(lambda: ModifiedResNet(config, 64, rngs=nnx.Rngs(key)))()
  for path, param in nnx.to_flat_state(nnx.state(resnet, nnx.Param)):
    name, x = "/".join(path), param[...]
    if "attnpool" in name:
      # 16 * 32 channels: weights and positions N(0, 1/512), biases torch's default for 512 inputs.
      kind = "uniform" if name.endswith("bias") else "normal"
      check_initial(x, kind, 512**-0.5, path=name)
    elif name.endswith("kernel"):
      check_initial(x, "uniform", np.prod(x.shape[:3]) ** -0.5, path=name)
    else:
      in_block_bn3 = "block" in name and "bn3" in name
      one = name.endswith("scale") and not in_block_bn3
      check_initial(x, "constant", 1 if one else 0, path=name)
