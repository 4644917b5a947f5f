"""The VQGAN against the original, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax.convert import vqgan as convert
from ofa_jax.engine import sharding
from ofa_jax.models import vqgan
from ofa_jax.models.abstract import abstract
from ofa_jax.models.vqgan import VQGANConfig
from tests.frozen_golden import error, golden, images, last, model, state_dict


@pytest.fixture(autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def micro():
  return model("vqgan"), golden("vqgan", "micro")


def test_every_part_is_the_originals(micro):
  codec, arrays = micro
  encoder, decoder = codec.encoder, codec.decoder
  x = encoder.conv_in(last(arrays["image"]))
  for i in range(4):
    level = getattr(encoder, f"down{i}")
    if i == 3:
      assert error(level.block0(x), last(arrays["act:enc.down3.block0"])) < 1e-5
    x = level(x)
    if i == 0:
      assert error(x, last(arrays["act:enc.down0.downsample"])) < 1e-5
  assert error(encoder.mid(x), last(arrays["act:enc.mid.block_2"])) < 1e-5
  x = encoder(last(arrays["image"]))
  assert error(x, last(arrays["encoder_out"])) < 1e-5
  assert error(codec.quant_conv(x), last(arrays["quant_conv_out"])) < 1e-5
  x = decoder.conv_in(codec.post_quant_conv(codec.embed(arrays["sampled_codes"])))
  assert error(x, last(arrays["act:dec.conv_in"])) < 1e-5
  middle = decoder.mid
  x = middle.attn1(middle.block1(x))
  assert error(x, last(arrays["act:dec.mid.attn_1"])) < 1e-5
  x = decoder.up3(middle.block2(x))
  assert error(x, last(arrays["act:dec.up3.upsample"])) < 1e-5


def test_codes_are_the_originals(micro, monkeypatch):
  """With the noise that was recorded, and without any."""
  codec, arrays = micro
  image = last(arrays["image"])
  assert error(codec.logits(image), last(arrays["logits"])) < 1e-5
  np.testing.assert_array_equal(codec.encode(image), arrays["argmax_codes"])
  monkeypatch.setattr(vqgan, "gumbel", lambda rngs, shape: last(arrays["gumbel_noise"]))
  codes = codec.encode(image, rngs=jax.random.key(0))
  assert codes.dtype == jnp.int32
  np.testing.assert_array_equal(codes, arrays["sampled_codes"])
  assert error(codec.embed(codes), last(arrays["quant_sampled"])) < 1e-5
  x, divergence = codec.reconstruct(image, rngs=jax.random.key(0))
  assert error(x, last(arrays["reconstruction_of_sampled"])) < 1e-5
  assert 1e-8 * divergence == pytest.approx(arrays["kl_diff"], rel=1e-5)


def test_pictures_are_the_originals(micro):
  codec, arrays = micro
  decoded = codec.decode(arrays["codes"])
  assert decoded.dtype == jnp.float32
  assert error(decoded, last(arrays["decoded"])) < 1e-5
  pixels = np.asarray(vqgan.to_uint8(decoded)).astype(int)
  assert np.abs(pixels - arrays["decoded_uint8"]).max() <= 1  # where it cuts off
  assert np.mean(pixels != arrays["decoded_uint8"]) < 1e-3
  np.testing.assert_array_equal(vqgan.to_uint8(last(arrays["decoded"])), arrays["decoded_uint8"])


@pytest.fixture(scope="module")
def tiny():
  """(graph, state) of a model of two levels."""
  config = VQGANConfig(
    num_codes=8, embed_dim=32, z_channels=32, width=32, multipliers=(1, 1), blocks=1, attention=(1,)
  )
  rng = np.random.default_rng(0)
  graph, params, _ = abstract(config)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 8, params)
  return nnx.split(nnx.merge(graph, params))


def test_noise_is_of_each_row_and_no_other(tiny):
  """Codes do not depend on the batch, and are drawn by their probabilities."""
  graph, state = tiny
  encode = jax.jit(lambda state, x, rngs: nnx.merge(graph, state).encode(x, rngs=rngs))
  image = images(0, (2, 3, 16, 16))
  keys = jax.random.split(jax.random.key(3), 2)
  both = encode(state, image, keys)
  np.testing.assert_array_equal(encode(state, image[::-1], keys[::-1])[::-1], both)
  assert np.any(encode(state, image, keys[::-1]) != both)
  logits = jnp.log(jnp.array([0.7, 0.2, 0.1]))
  drawn = jnp.argmax(logits + vqgan.gumbel(jax.random.key(0), (4000, 3)), -1)
  np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.7, 0.2, 0.1], atol=0.03)


def test_parts_of_a_batch_are_the_batch(tiny):
  """On a mesh of two devices, each of which decodes rows of every part."""
  graph, state = tiny
  codes = np.random.default_rng(0).integers(0, 8, (6, 4, 4))
  mesh = sharding.make_mesh((2, 1, 1), devices=jax.devices()[:2])

  def decode(batch_size):
    return jax.jit(
      lambda state, codes: vqgan.decode_batches(
        nnx.merge(graph, state), codes, batch_size=batch_size
      )
    )

  whole = np.asarray(decode(6)(state, codes))
  with jax.set_mesh(mesh):
    placed = jax.device_put(state, sharding.replicated(mesh))
    parts = decode(2)(placed, jax.device_put(codes, sharding.batch_sharding(mesh)))
  difference = np.abs(np.asarray(parts).astype(int) - whole)
  assert parts.shape == (6, 8, 8, 3)
  assert difference.max() <= 1 and np.mean(difference > 0) < 1e-2


@pytest.mark.slow  # a backward pass through both halves is compiled, 8 s
def test_training_reaches_every_part(tiny):
  graph, state = tiny

  def loss(state):
    image = images(0, (1, 3, 8, 8))
    x, divergence = nnx.merge(graph, state).reconstruct(image, rngs=jax.random.key(0))
    return jnp.square(x - image).mean() + 1e-4 * divergence

  grads = jax.tree.leaves(jax.jit(jax.grad(loss))(state))
  assert all(np.isfinite(g).all() and np.any(g != 0) for g in grads)


def test_sizes_that_do_not_fit_are_told(micro):
  with pytest.raises(ValueError, match="multiples of 32, found 48"):
    abstract(VQGANConfig(width=48, multipliers=(1, 2)))
  with pytest.raises(ValueError, match=r"equal to z_channels 256, found 128.*out of 0 to 3, found"):
    abstract(VQGANConfig(embed_dim=128, attention=(4,)))
  with pytest.raises(ValueError, match="multiples of 8 pixels, found 30 x 32"):
    micro[0].encode(np.zeros((1, 30, 32, 3), np.float32))


@pytest.mark.slow  # 69 million weights are drawn
def test_the_released_sizes_are_the_originals():
  tensors = state_dict("vqgan_f8")
  config, _ = convert.infer(tensors, {})
  assert config == convert.RELEASED
  codec, arrays = model("vqgan_f8"), golden("vqgan", "real_size_decode_8x8")
  assert error(codec.decode(arrays["codes"]), last(arrays["image"])) < 1e-4
  logits = codec.logits(last(arrays["encode_input"]))
  np.testing.assert_array_equal(jnp.argmax(logits, -1), arrays["encode_argmax"])
  assert error(logits.max(-1), arrays["encode_logits_max"]) < 1e-4
  step = logits.shape[-1] // arrays["encode_logits_sub"].shape[1]
  assert error(logits[..., ::step], last(arrays["encode_logits_sub"])) < 1e-4
