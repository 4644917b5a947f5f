"""Operations counted from jaxprs, against numbers known by hand and from the literature."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from ofa_jax.ahead import flops
from ofa_jax.engine import sharding
from ofa_jax.models import cnclip

A = jax.ShapeDtypeStruct((4, 8, 16), jnp.float32)
B = jax.ShapeDtypeStruct((4, 16, 32), jnp.float32)
PRODUCT = 2 * 4 * 8 * 16 * 32


def count(fn, *args):
  return flops.count(jax.make_jaxpr(fn)(*args))


def test_a_batched_product():
  assert count(lambda a, b: a @ b, A, B) == PRODUCT
  assert count(lambda a, b: jnp.einsum("bij,bjk->kbi", a, b), A, B) == PRODUCT


def test_a_loop_counts_every_round_and_what_is_computed_again():
  def loss(w, x):
    body = jax.checkpoint(lambda x, _: (jnp.sin(x @ w), None))
    return jnp.sum(jax.lax.scan(body, x, length=5)[0])

  w = jax.ShapeDtypeStruct((16, 16), jnp.float32)
  x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
  one = 2 * 8 * 16 * 16
  assert count(loss, w, x) == 5 * one
  assert count(jax.grad(loss, argnums=(0, 1)), w, x) == 5 * 4 * one  # forward, again, two gradients


def test_branches_calls_and_devices():
  def branch(a, b):
    return jax.lax.cond(a[0, 0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((4, 8, 32)))

  assert count(jax.jit(branch), A, B) == PRODUCT
  mesh = sharding.make_mesh((4, 1, 2))
  spec = P(("data", "fsdp"))
  split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=spec, out_specs=spec)
  assert count(split, A, B) == 2 * PRODUCT  # both halves of `tensor` do all of it


@pytest.mark.parametrize("stride", (1, 2))
def test_a_convolution(stride):
  def conv(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
  w = jax.ShapeDtypeStruct((3, 3, 3, 16), jnp.float32)
  forward = 2 * 2 * (8 // stride) ** 2 * 16 * 9 * 3
  assert count(conv, x, w) == forward


def test_chinese_clip_b16_is_as_large_as_published():
  """open_clip's docs/model_profile.csv gives 35.13 GFLOP for the image tower of ViT-B-16."""
  config = cnclip.config(*cnclip.MODELS["ViT-B-16"])
  graph, state = nnx.split(jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, 52), jnp.int32)
  tower = count(lambda s, x: nnx.merge(graph, s).encode_image(x), state, image)
  assert tower / 1e9 == pytest.approx(35.13, abs=0.005)
  both = tower + count(lambda s, x: nnx.merge(graph, s).encode_text(x), state, tokens)
  assert 3 * both / 1e12 == pytest.approx(0.132, abs=0.0005)  # a training step, for each pair
  # The count does not depend on how the layers are run.
  graph, state = nnx.split(jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0), unroll=12)))
  assert count(lambda s, x: nnx.merge(graph, s).encode_image(x), state, image) == tower
