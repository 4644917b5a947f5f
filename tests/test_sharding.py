import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ofa_jax import sharding


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
