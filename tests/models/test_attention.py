"""Attention against its definition, and the choice of its implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.models import attention as lib
from ofa_jax.models.attention import attention
from tests.cnclip_golden import error


@pytest.fixture(autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


def _normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def test_attention_is_its_definition():
  q, k, v = _normal(0, 2, 3, 4, 8), _normal(1, 2, 5, 4, 8), _normal(2, 2, 5, 4, 8)
  bias, mask = _normal(3, 2, 1, 3, 5), np.ones((2, 1, 1, 5), bool)
  mask[1, ..., 3:] = False
  logits = np.einsum("bthk,bshk->bhts", q, k, dtype=np.float64) / np.sqrt(8) + np.asarray(bias)
  weights = np.exp(logits) * mask
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum("bhts,bshk->bthk", weights, v)
  assert error(attention(q, k, v, mask=mask, bias=bias), expected) < 1e-6


def test_attention_keeps_no_weights_for_its_gradient():
  q, key = _normal(0, 2, 32, 4, 8), jax.random.key(1)

  def fn(q, k, v):
    return attention(q, k, v, dropout_rate=0.5, rngs=key)

  _, pullback = jax.vjp(fn, q, q, q)
  assert max(leaf.size for leaf in jax.tree.leaves(pullback)) == q.size  # weights: 4 times that


def test_attention_has_float32_logits():
  q, k = jnp.full((1, 1, 1, 4), 16, jnp.bfloat16), jnp.full((1, 2, 1, 4), 16, jnp.bfloat16)
  k = k.at[0, 1, 0, 0].set(16.125)  # logits 512 and 513: equal if they were bfloat16
  v = jnp.array([0, 1], jnp.bfloat16).reshape(1, 2, 1, 1)
  out = attention(q, k, jnp.broadcast_to(v, k.shape))
  assert out.dtype == jnp.bfloat16
  assert abs(float(out[0, 0, 0, 0]) - 1 / (1 + np.exp(-1.0))) < 4e-3


def test_a_fully_masked_row_is_finite():
  q = _normal(0, 1, 2, 1, 4)
  out = attention(q, q, q, mask=jnp.zeros((1, 1, 1, 2), bool))
  assert error(out[:, 0], q.mean(1)) < 1e-6


@pytest.mark.parametrize(("queries", "keys"), ((5, 7), (6, 7), (5, 6), (6, 6)))
def test_fused_attention_is_attention_with_its_gradients(queries, keys):
  random = np.random.default_rng(0)
  q = jnp.asarray(random.normal(size=(2, queries, 3, 8)), jnp.float32)
  k, v = (jnp.asarray(random.normal(size=(2, keys, 3, 8)), jnp.float32) for _ in range(2))
  weight = jnp.asarray(random.normal(size=q.shape), jnp.float32)

  def loss(fn):
    return jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(fn(*qkv)) * weight), argnums=(0, 1, 2))

  fused = functools.partial(lib.fused_attention, implementation="xla")
  for a, b in zip(
    jax.tree.leaves(loss(fused)(q, k, v)),
    jax.tree.leaves(loss(attention)(q, k, v)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=2e-6)


H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
  ("device", "dtype", "length", "head", "plain", "name", "reason"),
  (
    ("cpu", jnp.bfloat16, 257, 64, True, "xla", "not for cpu"),
    ("TPU v5 lite", jnp.bfloat16, 257, 64, True, "xla", "not for TPU"),
    (H100, jnp.bfloat16, 257, 80, True, "cudnn", "never writes"),
    (H100, jnp.float32, 257, 64, True, "xla", "not float32"),
    (H100, jnp.bfloat16, 257, 64, False, "xla", "biases"),
    (H100, jnp.bfloat16, 257, 100, True, "xla", "multiple of 8"),
    (H100, jnp.bfloat16, 52, 64, True, "xla", "too few"),
  ),
)
def test_attention_choice(device, dtype, length, head, plain, name, reason):
  q = jax.ShapeDtypeStruct((2, length, 4, head), dtype)
  found, why = lib.attention_choice(q, q, plain=plain, device=device)
  assert found == name and reason in why


@pytest.mark.skipif(
  not jax.devices()[0].device_kind.startswith("NVIDIA"), reason="cuDNN is for NVIDIA's cards"
)
@pytest.mark.parametrize(
  ("length", "head"), ((257, 80), (257, 64), (197, 64), (577, 64), (128, 64))
)
def test_cudnn_is_as_near_to_the_definition_as_xla(length, head):
  q, k, v, weight = (_normal(seed, 2, length, 4, head).astype(jnp.bfloat16) for seed in range(4))
  assert lib.attention_choice(q, k, plain=True, device=jax.devices()[0].device_kind)[0] == "cudnn"

  def gradients(fn, *inputs):
    def loss(*qkv):
      out = fn(*qkv)
      return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)

  plain = functools.partial(lib.fused_attention, implementation="xla")
  exact, xla = (gradients(plain, *(x.astype(t) for x in (q, k, v))) for t in (jnp.float32, q.dtype))
  cudnn = gradients(attention, q, k, v)
  for name, truth, a, b in zip(
    ("dq", "dk", "dv", "out"), *map(jax.tree.leaves, (exact, xla, cudnn)), strict=True
  ):
    assert error(b, truth) < max(2 * error(a, truth), 1e-2), name
