"""Building blocks against their definitions, and PyTorch's where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax.engine import sharding
from ofa_jax.models import layers
from ofa_jax.models.layers import BatchNorm, Embed, LayerNorm, Linear, Mlp, Scan
from tests.cnclip_golden import error


@pytest.fixture(autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


def _normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def test_linear_contracts_the_input_axes():
  x = _normal(0, 2, 5, 3, 4)
  linear = Linear((3, 4), (6, 2), rngs=nnx.Rngs(0))
  expected = np.einsum("btij,ijkl->btkl", x, linear.kernel[...]) + np.asarray(linear.bias[...])
  assert error(linear(x), expected) < 1e-6
  assert Linear(3, 4, bias=False, rngs=nnx.Rngs(0)).bias is None


def test_layer_norm_keeps_float32_statistics():
  norm = LayerNorm(64, eps=1e-5)
  x = (100 + _normal(0, 4, 64)).astype(jnp.bfloat16)
  y = norm(x)
  assert y.dtype == jnp.bfloat16
  wide = np.asarray(x, np.float64)
  expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
  assert error(y.astype(jnp.float32), expected) < 2**-8


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_batch_norm_is_torchs(offset):
  torch = pytest.importorskip("torch")
  theirs, ours = torch.nn.BatchNorm2d(6), BatchNorm(6)
  rng = np.random.default_rng(0)
  for name, param in (("weight", ours.scale), ("bias", ours.bias)):
    value = rng.standard_normal(6).astype(np.float32)
    getattr(theirs, name).data = torch.from_numpy(value)
    param.set_value(jnp.asarray(value))
  for _ in range(3):
    x = (offset + rng.standard_normal((4, 5, 5, 6))).astype(np.float32)
    expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy()
    assert error(ours(x, rngs=jax.random.key(0)), expected.transpose(0, 2, 3, 1)) < 1e-5
    assert error(ours.mean[...], theirs.running_mean) < 1e-6
    assert error(ours.var[...], theirs.running_var) < 1e-5
  before = ours.mean[...]
  expected = theirs.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy()
  assert error(ours(x), expected.transpose(0, 2, 3, 1)) < 1e-5
  np.testing.assert_array_equal(ours.mean[...], before)


def test_activations_are_torchs():
  torch = pytest.importorskip("torch")
  x = np.linspace(-6, 6, 1001, dtype=np.float32)
  t = torch.from_numpy(x)
  assert error(layers.gelu(x), torch.nn.functional.gelu(t)) < 1e-6
  assert error(layers.quick_gelu(x), t * torch.sigmoid(1.702 * t)) < 1e-6


def test_the_pad_row_is_used_but_gets_no_gradient():
  embed = Embed(5, 3, init=jax.nn.initializers.normal(1.0), pad=2, rngs=nnx.Rngs(0))
  tokens = jnp.array([[1, 2, 4], [2, 2, 1]])
  np.testing.assert_array_equal(embed(tokens), embed.embedding[...][tokens])
  assert bool(jnp.isnan(embed(jnp.array([5]))).all())
  graph, params = nnx.split(embed)
  grads = jax.grad(lambda p: nnx.merge(graph, p)(tokens).sum())(params)
  np.testing.assert_array_equal(grads["embedding"][...][:, 0], [0, 2, 0, 0, 1])


def test_dropout_keeps_the_mean_and_only_in_training():
  x = jnp.full((1000, 100), 2.0)
  assert layers.dropout(x, 0.1, rngs=None) is x
  assert layers.dropout(x, 0.0, rngs=jax.random.key(0)) is x
  y = layers.dropout(x, 0.1, rngs=jax.random.key(0))
  assert abs(float((y == 0).mean()) - 0.1) < 0.005
  np.testing.assert_allclose(np.unique(y), [0, 2 / 0.9], rtol=1e-6)
  assert layers.dropout(x.astype(jnp.bfloat16), 0.1, rngs=jax.random.key(0)).dtype == jnp.bfloat16


def test_dropout_draws_the_same_on_every_mesh_and_on_tpus(monkeypatch):
  x, key = _normal(0, 8, 4, 6), jax.random.key(1)
  expected = layers.dropout(x, 0.5, rngs=key)
  drop = jax.jit(lambda x: layers.dropout(layers.shard_batch(x), 0.5, rngs=key))
  mesh = sharding.make_mesh((2, 2, 2))
  with jax.set_mesh(mesh):
    y = drop(jax.device_put(x, sharding.batch_sharding(mesh)))
  assert len(y.sharding.device_set) == 8
  np.testing.assert_array_equal(y, expected)

  def traced():
    return jax.make_jaxpr(lambda x: layers.dropout(x, 0.5, rngs=key))(x)

  assert "optimization_barrier" not in str(traced())
  monkeypatch.setattr(layers, "device_kind", lambda: "TPU v5 lite")
  assert "optimization_barrier" in str(traced())
  np.testing.assert_array_equal(layers.dropout(x, 0.5, rngs=key), expected)


def _stack(num=4):
  def make(rngs):
    return Mlp(8, 16, activation=layers.gelu, rngs=rngs)

  return layers.stack(make, num, rngs=nnx.Rngs(0))


def test_drop_path_drops_rows_and_keeps_the_mean():
  x = _normal(0, 2000, 3, 2)
  assert layers.drop_path(x, 0.3, rngs=None) is x
  assert layers.drop_path(x, 0.0, rngs=jax.random.key(0)) is x
  assert layers.drop_path(x, None, rngs=jax.random.key(0)) is x
  y = jax.jit(lambda x, rate: layers.drop_path(x, rate, rngs=jax.random.key(0)))(x, 0.3)
  kept = np.asarray(y[:, 0, 0] != 0)
  assert abs(kept.mean() - 0.7) < 0.03
  np.testing.assert_allclose(y[kept], x[kept] / 0.7, rtol=1e-6)
  assert not np.any(y[~kept])
  np.testing.assert_allclose(layers.drop_path_rates(0.3, 4), (0, 0.1, 0.2, 0.3))
  assert layers.drop_path_rates(0.3, 1) == (0.0,)


def test_a_frozen_batch_norm_is_a_constant_map():
  norm = BatchNorm(3, frozen=True)
  norm.mean.set_value(jnp.array([1.0, 2.0, 3.0]))
  norm.var.set_value(jnp.array([4.0, 1.0, 9.0]))
  graph, params, rest = nnx.split(norm, nnx.Param, ...)

  def run(params, rngs):
    norm = nnx.merge(graph, params, rest)
    y = norm(_normal(0, 2, 4, 4, 3), rngs=rngs)
    return y.sum(), (y, norm.mean[...])

  grads, (trained, mean) = jax.grad(run, has_aux=True)(params, jax.random.key(0))
  assert not any(np.any(g) for g in jax.tree.leaves(grads))
  np.testing.assert_array_equal(trained, run(params, None)[1][0])
  np.testing.assert_array_equal(mean, [1, 2, 3])


def test_stacked_layers_are_drawn_one_by_one():
  kernel = np.asarray(_stack().up.kernel[...])
  assert kernel.shape == (4, 8, 16)
  assert len({layer.tobytes() for layer in kernel}) == 4
  assert np.abs(kernel).max() <= 8**-0.5


def _layer(block, x, key):
  return x + layers.dropout(block(x), 0.2, rngs=key)


@pytest.mark.parametrize(
  ("remat", "unroll"),
  [("none", 1), ("none", 100), ("full", 1), ("full", 100), ("dots", 2), ("dots", 100)],
)
def test_every_way_to_run_a_stack_computes_the_same(remat, unroll):
  blocks, x, key = _stack(), _normal(1, 2, 3, 8), jax.random.key(7)
  graph, params = nnx.split(blocks)

  def by_hand(params):
    keys = layers.split_rngs(key, 4)
    y = x
    for i in range(4):
      y = _layer(nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], params)), y, keys[i])
    return jnp.square(y).sum()

  def scanned(params):
    scan = Scan(remat=remat, unroll=unroll)
    y = layers.scan_blocks(_layer, nnx.merge(graph, params), x, scan=scan, rngs=key)
    return jnp.square(y).sum()

  expected, expected_grads = jax.jit(jax.value_and_grad(by_hand))(params)
  found, found_grads = jax.jit(jax.value_and_grad(scanned))(params)
  assert error(found, expected) < 1e-6
  for a, b in zip(jax.tree.leaves(found_grads), jax.tree.leaves(expected_grads), strict=True):
    assert error(a, b) < 1e-5


@pytest.mark.parametrize("unroll", [1, 100])
def test_remat_computes_again_instead_of_keeping(unroll):
  blocks, x = _stack(), _normal(1, 4, 64, 8)
  graph, params = nnx.split(blocks)

  def kept_bytes(remat):
    def loss(params):
      scan = Scan(remat=remat, unroll=unroll)
      return layers.scan_blocks(_layer, nnx.merge(graph, params), x, scan=scan).sum()

    _, pullback = jax.vjp(loss, params)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))

  full, dots, none = kept_bytes("full"), kept_bytes("dots"), kept_bytes("none")
  assert full < dots < none


def test_parts_are_of_large_batches_on_tpus(monkeypatch):
  def num_parts(rows):
    return layers.num_parts(jax.ShapeDtypeStruct((rows, 257, 1280), jnp.bfloat16))

  assert num_parts(128) == 1
  monkeypatch.setattr(layers, "device_kind", lambda: "TPU v5 lite")
  assert [num_parts(rows) for rows in (16, 64, 96, 128, 512, 576)] == [1, 1, 1, 2, 8, 1]
  with jax.set_mesh(sharding.make_mesh((2, 2, 2))):  # the batch is over data and fsdp
    assert [num_parts(rows) for rows in (128, 256, 512)] == [1, 1, 2]


def test_norms_and_activations_keep_their_input_only():
  x, norm = _normal(1, 4, 8), layers.LayerNorm(8, eps=1e-5)
  for fn in (norm, layers.gelu, layers.quick_gelu):
    _, pullback = jax.vjp(fn, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.ndim > 1) == x.size


def test_a_batch_is_split_over_the_mesh():
  x = jnp.ones((8, 3, 4))
  assert layers.shard_batch(x) is x and layers.replicate(x) is x
  with jax.set_mesh(sharding.make_mesh((2, 2, 2))):
    split = jax.jit(layers.shard_batch)(x)
    whole = jax.jit(lambda x: layers.replicate(layers.shard_batch(x)))(x)
    odd = jnp.ones((3, 4))
    assert layers.shard_batch(odd) is odd
  assert split.sharding.shard_shape(x.shape) == (2, 3, 4)
  assert whole.sharding.is_fully_replicated
