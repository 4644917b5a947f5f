"""A program that is written out computes the same, in operations that converters know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from ofa_jax.exporting.programs import written_out
from ofa_jax.models.convolution import max_pool

WEIGHTS = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)


def function(x):
  @jax.checkpoint
  def layer(x, inputs):
    w, i = inputs
    y = jax.nn.gelu(x @ w, approximate=False) + jnp.broadcast_to(jnp.arange(4.0) * i, x.shape)
    return jax.nn.relu(y), y.sum(-1)

  x, sums = jax.lax.scan(jax.jit(layer), x, (jnp.asarray(WEIGHTS), jnp.arange(3)), reverse=True)
  return x * x.shape[0], sums


def test_the_values_are_the_same():
  x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
  program = jax.make_jaxpr(function)(x)
  found = written_out(program.jaxpr, program.consts, [x])
  for ours, theirs in zip(function(x), found, strict=True):
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)


def test_loops_and_calls_are_gone():
  spec = jax.ShapeDtypeStruct(export.symbolic_shape("N, 4"), jnp.float32)
  program = jax.make_jaxpr(function)(spec)
  assert "scan" in {eqn.primitive.name for eqn in program.eqns}
  written = jax.make_jaxpr(lambda x: written_out(program.jaxpr, program.consts, [x]))(spec)
  names = [eqn.primitive.name for eqn in written.eqns]
  assert names.count("dot_general") == 3
  assert not {"scan", "remat2", "checkpoint", "custom_jvp_call"} & set(names)
  assert str(written.out_avals[1].shape) == "(3, N)"


def test_pooling_is_maxima_of_slices():
  x = np.random.default_rng(2).normal(size=(2, 9, 8, 3)).astype(np.float32)
  program = jax.make_jaxpr(max_pool)(x)
  (found,) = written_out(program.jaxpr, program.consts, [x])
  np.testing.assert_array_equal(found, max_pool(x))
  written = jax.make_jaxpr(lambda x: written_out(program.jaxpr, program.consts, [x]))(x)
  assert "reduce_window_max" not in {eqn.primitive.name for eqn in written.eqns}


@pytest.mark.parametrize(
  ("padding", "dilation", "message"),
  [((0, 0), 2, "windows with holes"), ((2, 0), 1, "2 rows with a padding of 2 and 0")],
)
def test_other_pooling_is_told(padding, dilation, message):
  def pool(x):
    window = {"window_dimensions": (2,), "window_strides": (1,), "padding": [padding]}
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, **window, window_dilation=(dilation,))

  program = jax.make_jaxpr(pool)(np.zeros(5, np.float32))
  with pytest.raises(ValueError, match=message):
    written_out(program.jaxpr, program.consts, [np.zeros(5, np.float32)])
