"""OFA's image trunk: its shapes, its stochastic depth, its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax import trees
from ofa_jax.models.resnet import Bottleneck, ResNet, max_pool


@pytest.mark.parametrize(("shape", "grid"), [((64, 64), (4, 4)), ((40, 96), (3, 6))])
def test_a_cell_is_sixteen_pixels(shape, grid):
  found = jax.eval_shape(
    lambda x: ResNet((1, 2, 1), rngs=nnx.Rngs(0))(x), jnp.zeros((2, *shape, 3))
  )
  assert found.shape == (2, *grid, 1024)


def test_max_pool_pads_with_less_than_everything():
  x = -1.0 - jnp.arange(25.0).reshape(1, 5, 5, 1)
  np.testing.assert_array_equal(
    max_pool(x)[0, :, :, 0], [[-1, -2, -4], [-6, -7, -9], [-16, -17, -19]]
  )


def test_a_dropped_block_is_its_shortcut():
  block = Bottleneck(256, 64, stride=1, drop_path=0.5, eps=1e-5, frozen=True, rngs=nnx.Rngs(0))
  x = jax.nn.relu(jax.random.normal(jax.random.key(0), (16, 4, 4, 256)))
  run = jax.jit(lambda block, x, rngs: block(x, rngs=rngs))
  found, kept = run(block, x, jax.random.key(1)), run(block, x, None)
  dropped = np.array([np.array_equal(a, b) for a, b in zip(found, x, strict=True)])
  assert 2 < dropped.sum() < 14
  # What is kept counts double, before the last ReLU.
  inside = np.asarray(found > 0)[~dropped] & np.asarray(kept > 0)[~dropped]
  twice = np.asarray(x + 2 * (kept - x))[~dropped]
  np.testing.assert_allclose(found[~dropped][inside], twice[inside], atol=1e-4)


def test_rates_grow_in_every_stage_anew():
  net = jax.eval_shape(lambda: ResNet((3, 2, 1), drop_path=0.3, rngs=nnx.Rngs(0)))
  rates = [
    [getattr(stage, f"block{i}").drop_path for i in range(stage.num)]
    for stage in (net.layer1, net.layer2, net.layer3)
  ]
  np.testing.assert_allclose(np.concatenate(rates), [0, 0.15, 0.3, 0, 0.3, 0])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_trunk_trains_its_convolutions_only(frozen):
  graph, params, rest = jax.jit(
    lambda: nnx.split(ResNet((1, 1, 1), frozen=frozen, rngs=nnx.Rngs(0)), nnx.Param, ...)
  )()
  params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
  image = jax.random.normal(jax.random.key(2), (2, 32, 32, 3))

  def loss(params):
    net = nnx.merge(graph, params, rest)
    x = net(image, rngs=jax.random.key(0))
    return jnp.sum(jnp.sin(x)), nnx.state(net, nnx.BatchStat)

  grads, stats = jax.jit(jax.grad(loss, has_aux=True))(params)
  for path, x in trees.flatten(grads).items():
    assert np.any(x) == (path.endswith("kernel") or not frozen), path
  assert np.any(stats["layer3"]["block0"]["bn3"]["mean"][...]) != frozen
