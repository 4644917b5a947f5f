"""The ViT against the original, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax.engine import sharding
from ofa_jax.models import layers
from ofa_jax.models.layers import Scan
from ofa_jax.models.vit import ViT, ViTConfig, patchify, random_patches
from tests.cnclip_golden import error, golden, images, micro_model


@pytest.fixture(autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


def test_every_part_is_the_originals():
  vit, arrays = micro_model("micro_vit").visual, golden("micro_vit", "forward")
  h = {k.removeprefix("h/v."): v for k, v in arrays.items() if k.startswith("h/v.")}
  image = jnp.asarray(images(arrays))
  conv1 = vit.conv1(patchify(image[:3], 8)).reshape(3, 4, 4, 48)
  assert error(conv1, h.pop("conv1").transpose(0, 2, 3, 1)) < 1e-5
  x = vit.ln_pre(vit.embed(image))
  assert error(x[:3], h.pop("ln_pre")) < 1e-5
  for i in range(3):
    block = jax.tree.map(lambda p, i=i: p[i], vit.blocks)
    y = block.ln_1(x)
    assert error(y.swapaxes(0, 1)[:3], h.pop(f"block{i}.ln_1")) < 1e-5
    attn = block.attn(y)
    assert error(attn.swapaxes(0, 1)[:, :3], h.pop(f"block{i}.attn_LND")) < 1e-5
    mlp = block.mlp(block.ln_2(x + attn))
    assert error(mlp.swapaxes(0, 1)[:, :3], h.pop(f"block{i}.mlp_LND")) < 1e-5
    x = block(x)
    assert error(x.swapaxes(0, 1)[:, :3], h.pop(f"block{i}_LND")) < 1e-5
  assert error(vit.ln_post(x[:, 0])[:3], h.pop("ln_post")) < 1e-5
  assert not h


@pytest.mark.parametrize(
  "scan", [Scan(), Scan(unroll=3), Scan(remat="full"), Scan(remat="dots", unroll=2)]
)
def test_features_are_the_originals(scan):
  arrays = golden("micro_vit", "forward")
  found = jax.jit(micro_model("micro_vit", scan=scan).visual)(images(arrays))
  assert error(found, arrays["image_features"]) < 1e-5


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_large_batch_in_parts_is_the_whole_batch(remat, monkeypatch):
  """What TPUs do, on a mesh of four devices: features, and gradients summed over the parts."""
  arrays = golden("micro_vit", "forward")
  vit, image = micro_model("micro_vit", scan=Scan(remat=remat)).visual, jnp.asarray(images(arrays))
  graph, params = nnx.split(vit)
  mesh = sharding.make_mesh((2, 2, 1), devices=jax.devices()[:4])

  def loss(params, image):
    features = nnx.merge(graph, params)(image)
    return jnp.square(features).sum(), features

  def features_and_gradients():
    with jax.set_mesh(mesh):
      step = jax.jit(jax.grad(loss, has_aux=True))
      placed = jax.device_put(image, sharding.batch_sharding(mesh))
      return str(step.trace(params, placed).jaxpr), *step(params, placed)

  whole, gradients, _ = features_and_gradients()
  monkeypatch.setattr(layers, "device_kind", lambda: "TPU v5 lite")
  monkeypatch.setattr(layers, "_PART_ROWS", len(image) // 8)
  parts, summed, features = features_and_gradients()
  assert parts.count("dot_general") > whole.count("dot_general")
  assert error(features, arrays["image_features"]) < 1e-5
  for a, b in zip(jax.tree.leaves(summed), jax.tree.leaves(gradients), strict=True):
    assert error(a, b) < 1e-5


def test_masking_draws_patches_only_in_training():
  vit = micro_model("micro_vit").visual
  image = jnp.asarray(images(golden("micro_vit", "forward")))
  masked = jax.jit(lambda rngs: vit(image, mask_ratio=0.5, rngs=rngs))
  whole = jax.jit(vit)(image)
  assert error(masked(None), whole) < 1e-6
  one, two = masked(jax.random.key(1)), masked(jax.random.key(2))
  assert error(one, whole) > 1e-3 and error(one, two) > 1e-3
  keep = random_patches(jax.random.key(1), 16, batch=8, keep=8)
  assert keep.shape == (8, 8)
  assert error(one, jax.jit(vit)(image, keep=keep)) < 1e-5


def test_random_patches_are_uniform_and_different():
  keep = np.asarray(random_patches(jax.random.key(0), 10, batch=4000, keep=3))
  assert keep.shape == (4000, 3)
  assert all(len(set(row)) == 3 for row in keep)
  counts = np.bincount(keep.ravel(), minlength=10)
  assert counts.min() > 1100 and counts.max() < 1300


def test_sizes_that_do_not_fit_are_errors():
  config = ViTConfig(image_size=33, patch_size=8, width=40, layers=1, head_width=16)
  with pytest.raises(ValueError, match=r"patch_size 8, found 33.*head_width 16, found 40"):
    ViT(config, 4, scan=Scan(), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="Expected images of 16 patches"):
    micro_model("micro_vit").visual(jnp.zeros((1, 64, 64, 3)))


# sqrt(3) * std of a uniform distribution is its bound.
XAVIER = np.sqrt(6 / (256 + 3 * 256))
INITIAL = {
  "class_embedding": ("normal", 1 / 16),
  "positional_embedding": ("normal", 1 / 16),
  "proj": ("normal", 1 / 16),
  "conv1/kernel": ("uniform", 192**-0.5),
  "blocks/attn/qkv/kernel": ("uniform", XAVIER),
  "blocks/attn/qkv/bias": ("constant", 0),
  "blocks/attn/out/kernel": ("uniform", 256**-0.5),
  "blocks/attn/out/bias": ("constant", 0),
  "blocks/mlp/up/kernel": ("uniform", 256**-0.5),
  "blocks/mlp/up/bias": ("uniform", 256**-0.5),
  "blocks/mlp/down/kernel": ("uniform", 1024**-0.5),
  "blocks/mlp/down/bias": ("uniform", 1024**-0.5),
}


def test_initialisation_is_torchs():
  key = jax.random.key(0, impl="rbg")  # compiles faster than the default
  config = ViTConfig(image_size=64, patch_size=8, width=256, layers=3)
  vit = jax.jit(lambda: ViT(config, 128, scan=Scan(), rngs=nnx.Rngs(key)))()
  params = nnx.to_flat_state(nnx.state(vit, nnx.Param))
  for path, param in params:
    path = "/".join(path)
    norm = ("constant", 1 if path.endswith("scale") else 0)
    check_initial(param[...], *(norm if "ln_" in path else INITIAL[path]), path=path)


def check_initial(x, kind, value, *, path):
  """Asserts that x looks drawn from N(0, value), from U(-value, value), or is the value."""
  x = np.asarray(x, np.float64).ravel()
  tolerance = 5 / np.sqrt(x.size)  # of the relative error of a standard deviation: far out
  if kind == "constant":
    np.testing.assert_array_equal(x, value, err_msg=path)
    return
  std = value if kind == "normal" else value / np.sqrt(3)
  assert abs(x.std() / std - 1) < tolerance, (path, x.std(), std)
  assert abs(x.mean()) < tolerance * std, path
  if kind == "uniform":
    assert (1 - tolerance) * value < np.abs(x).max() <= value * (1 + 1e-6), path
  else:
    assert np.abs(x).max() > 2 * std, path
