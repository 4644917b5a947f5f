"""Convolutions and pooling, with their gradients, against PyTorch's."""

import jax
import numpy as np
import pytest
from flax import nnx

from ofa_jax.models.convolution import Conv, max_pool
from tests.cnclip_golden import error

RNG = np.random.default_rng(0)


def nchw(x):
  torch = pytest.importorskip("torch")
  return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy()).requires_grad_()


def nhwc(x):
  return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
  ("size", "stride", "sides"),
  [(1, 1, (8, 8)), (3, 1, (8, 8)), (3, 2, (8, 8)), (3, 2, (4, 4)), (3, 2, (4, 3)), (7, 2, (5, 6))],
)
def test_convolution_is_torchs(size, stride, sides):
  torch = pytest.importorskip("torch")
  conv = Conv(3, 5, size=size, stride=stride, bias=True, rngs=nnx.Rngs(0))
  graph, params = nnx.split(conv)
  x = RNG.normal(size=(2, *sides, 3)).astype(np.float32)
  with jax.default_matmul_precision("highest"):
    ours, backward = jax.vjp(lambda x, p: nnx.merge(graph, p)(x), x, params)
    kernel = torch.from_numpy(np.array(conv.kernel[...]).transpose(3, 2, 0, 1).copy())
    inputs, kernel = nchw(x), kernel.requires_grad_()
    bias = torch.from_numpy(np.array(conv.bias[...]))
    theirs = torch.nn.functional.conv2d(
      inputs, kernel, bias, stride=stride, padding=(size - 1) // 2
    )
    assert ours.shape == nhwc(theirs).shape and error(ours, nhwc(theirs)) < 1e-6
    gradient = RNG.normal(size=ours.shape).astype(np.float32)
    of_x, of_params = backward(gradient)
  theirs.backward(nchw(gradient).detach())
  assert error(of_x, nhwc(inputs.grad)) < 1e-6
  assert error(of_params["kernel"][...], kernel.grad.numpy().transpose(2, 3, 1, 0)) < 1e-6


@pytest.mark.parametrize(("stride", "pad"), [(2, 1), (2, 0), (1, 1)])
def test_pooling_is_torchs(stride, pad):
  """Also where values in a window are equal, and below zero beside the padding."""
  torch = pytest.importorskip("torch")
  x = RNG.integers(-3, 1, size=(2, 9, 8, 3)).astype(np.float32)
  ours, backward = jax.vjp(lambda x: max_pool(x, stride=stride, pad=pad), x)
  inputs = nchw(x)
  theirs = torch.nn.functional.max_pool2d(inputs, 3, stride=stride, padding=pad)
  np.testing.assert_array_equal(ours, nhwc(theirs))
  gradient = RNG.normal(size=ours.shape).astype(np.float32)
  theirs.backward(nchw(gradient).detach())
  np.testing.assert_allclose(*backward(gradient), nhwc(inputs.grad), rtol=1e-6, atol=1e-6)
  jitted = jax.jit(lambda x, g: jax.vjp(lambda x: max_pool(x, stride=stride, pad=pad), x)[1](g)[0])
  np.testing.assert_allclose(jitted(x, gradient), nhwc(inputs.grad), rtol=1e-6, atol=1e-6)


def test_pooling_shows_what_is_not_a_number():
  x = np.zeros((1, 8, 8, 1), np.float32)
  x[0, 4, 4, 0] = np.nan
  assert np.isnan(max_pool(x)).any()
