import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from ofa_jax.ahead import hlo
from ofa_jax.engine import sharding
from ofa_jax.models import layers


def abstract(**shapes):
  return {k: jax.ShapeDtypeStruct(shape, np.float32) for k, shape in shapes.items()}


@pytest.fixture
def mesh():
  return sharding.make_mesh((2, 2, 2))


def specs(params, table, mesh):
  return {k: s.spec for k, s in sharding.params_shardings(params, table, mesh).items()}


def test_layer_axis_is_prepended(mesh):
  params = abstract(kernel=(3, 64, 32), alone=(64, 32))
  found = specs(params, ((".", P("fsdp", "tensor")),), mesh)
  assert found == {"kernel": P(None, "fsdp", "tensor"), "alone": P("fsdp", "tensor")}


def test_an_axis_that_does_not_divide_falls_back_to_the_largest_that_does(mesh):
  found = specs(abstract(kernel=(333, 512)), ((".", P("fsdp", None)),), mesh)
  assert found == {"kernel": P(None, "fsdp")}


def test_small_parameters_are_not_split_by_the_fallback(mesh):
  assert specs(abstract(kernel=(33, 8)), ((".", P("fsdp", None)),), mesh) == {"kernel": P()}


def test_one_device_needs_no_spec():
  mesh = sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
  assert specs(abstract(k=(4, 4)), ((".", P("fsdp", "tensor")),), mesh) == {"k": P()}


def test_large_parameters_without_a_row_are_all_named(mesh):
  params = abstract(first=(512, 512), second=(512, 512), small=(4,))
  with pytest.raises(ValueError, match=r"first \(512, 512\)\n  second \(512, 512\)\nAdd rows"):
    sharding.params_shardings(params, (("nothing", P()),), mesh)


def test_a_spec_longer_than_the_array_is_an_error(mesh):
  with pytest.raises(ValueError, match="at most 1 axes"):
    sharding.params_shardings(abstract(bias=(4,)), ((".", P("fsdp", "tensor")),), mesh)


def test_optimizer_state_lies_with_its_parameter(mesh):
  params = abstract(kernel=(64, 32), bias=(32,))
  places = sharding.params_shardings(params, (("kernel", P("fsdp", None)),), mesh)
  state = {"count": jax.ShapeDtypeStruct((), np.int32), "mu": dict(params), "nu": dict(params)}
  found = sharding.like_params(state, params, places, mesh)
  assert found["mu"]["kernel"].spec == P("fsdp")
  assert found["nu"]["bias"].spec == P() and found["count"].spec == P()


def test_bytes_per_device(mesh):
  params = abstract(kernel=(64, 32), bias=(32,))
  places = sharding.params_shardings(params, (("kernel", P("fsdp", "tensor")),), mesh)
  assert sharding.bytes_per_device(params, places) == 64 * 32 * 4 // 4 + 32 * 4


def test_batches_are_split_over_data_and_fsdp(mesh):
  batch = sharding.to_global({"x": np.arange(8.0)}, mesh)
  assert batch["x"].sharding.spec == sharding.BATCH
  assert {s.data.shape for s in batch["x"].addressable_shards} == {(2,)}


LAYERS, WIDTH, HIDDEN, ROWS = 3, 16, 32, 8


def make_stack():
  """A stack of layers, and the sharding table that splits both of its matrices."""

  def make(rngs):
    return layers.Mlp(WIDTH, HIDDEN, activation=jax.nn.relu, rngs=rngs)

  blocks = layers.stack(make, LAYERS, rngs=nnx.Rngs(0))
  up = ((r"up/kernel", P("fsdp", "tensor")), (r"up/bias", P("tensor")))
  return blocks, (*up, (r"down/kernel", P("tensor", "fsdp")))


def gradients(blocks, *, mesh, table, remat):
  """The compiled gradients of a loss of the stack, and their values."""
  graph, params = nnx.split(blocks)
  params = nnx.to_pure_dict(params)
  whole = sharding.replicated(mesh)
  places = sharding.params_shardings(params, table, mesh)
  graph = nnx.graphdef(sharding.gathering(blocks, places))

  def loss(params, x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      model = nnx.merge(graph, params)
      scan = layers.Scan(remat)
      y = layers.scan_blocks(lambda block, x, _: x + block(x), model, x, scan=scan)
      return (y * y).sum()

  x = np.random.default_rng(0).normal(size=(ROWS, 2, WIDTH)).astype(np.float32)
  rows = sharding.batch_sharding(mesh)
  gradient = jax.jit(jax.value_and_grad(loss), out_shardings=(whole, places))
  compiled = gradient.lower(jax.device_put(params, places), jax.device_put(x, rows)).compile()
  return compiled, compiled(jax.device_put(params, places), jax.device_put(x, rows))


@pytest.mark.parametrize(("remat", "reads"), [("none", 1), ("full", 2)])
def test_one_layer_at_a_time_is_gathered_and_its_gradient_split_again(remat, reads):
  blocks, table = make_stack()
  one = sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
  _, (loss, grads) = gradients(blocks, mesh=one, table=table, remat=remat)
  mesh = sharding.make_mesh((1, 8, 1))
  compiled, (same_loss, same_grads) = gradients(blocks, mesh=mesh, table=table, remat=remat)
  np.testing.assert_allclose(same_loss, loss, rtol=1e-6)
  for name in ("up", "down"):
    found, expected = same_grads[name]["kernel"], grads[name]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert found.addressable_shards[0].data.size == found.size // 8
  gathers = hlo.collectives(compiled.as_text())["all-gather"]
  assert gathers.calls == reads * 2 * LAYERS
  assert gathers.num_bytes == reads * 2 * LAYERS * WIDTH * HIDDEN * 4


def test_tensor_stays_split_where_a_parameter_is_read():
  blocks, table = make_stack()
  mesh = sharding.make_mesh((1, 4, 2))
  compiled, _ = gradients(blocks, mesh=mesh, table=table, remat="none")
  gathers = hlo.collectives(compiled.as_text())["all-gather"]
  assert gathers.num_bytes == 2 * LAYERS * WIDTH * HIDDEN * 4 // 2


def test_a_part_of_a_split_parameter_is_a_part_of_all_of_it():
  value = np.arange(12.0).reshape(4, 3)
  param = sharding.SplitParam(value, axes=("fsdp", None))
  np.testing.assert_array_equal(param[1:3], value[1:3])
  np.testing.assert_array_equal(param[...], value)
  np.testing.assert_array_equal(layers.read_once({"w": param})["w"][...], value)


def test_without_a_mesh_reading_is_no_operation():
  param = sharding.SplitParam(jax.numpy.ones((4, 3)), axes=("fsdp", None))
  text = str(jax.make_jaxpr(lambda p: p[...] + 1)(param))
  assert "sharding_constraint" not in text
