import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import losses


@pytest.fixture
def features():
  rng = np.random.default_rng(0)
  image, text = rng.normal(size=(2, 6, 4)).astype(np.float32)
  return losses.normalize(image), losses.normalize(text)


def cross_entropy(logits, targets):
  logits = np.asarray(logits, np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -(targets * log_probs).sum(-1)


def test_contrastive_is_the_mean_of_both_directions(features):
  image, text = features
  result = losses.contrastive(image, text, scale=jnp.float32(7.0))
  logits = 7.0 * np.asarray(image) @ np.asarray(text).T
  expected = (cross_entropy(logits, np.eye(6)) + cross_entropy(logits.T, np.eye(6))).mean() / 2
  np.testing.assert_allclose(result["loss"].value, expected, rtol=1e-6)
  np.testing.assert_allclose(result["i2t_acc"].value, (logits.argmax(1) == np.arange(6)).mean())
  np.testing.assert_allclose(result["t2i_acc"].value, (logits.argmax(0) == np.arange(6)).mean())


def test_rows_without_weight_are_neither_targets_nor_negatives(features):
  image, text = features
  weight = jnp.array([1, 0, 1, 1, 0, 1], jnp.float32)
  keep = np.flatnonzero(weight)

  def loss(image, text, weight):
    return losses.contrastive(image, text, scale=jnp.float32(7.0), weight=weight)["loss"].value

  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(image, text, weight)
  ones = jnp.ones(len(keep))
  expected, kept = jax.value_and_grad(loss, argnums=(0, 1))(image[keep], text[keep], ones)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for grad, few in zip(grads, kept, strict=True):
    np.testing.assert_allclose(grad[keep], few, atol=1e-7)
    assert not np.any(np.delete(np.asarray(grad), keep, axis=0))


def test_equal_captions_share_the_target(features):
  image, text = features
  same = np.eye(6, dtype=bool)
  same[0, 3] = same[3, 0] = True
  result = losses.contrastive(image, text, scale=jnp.float32(7.0), same=jnp.asarray(same))
  logits = 7.0 * np.asarray(image) @ np.asarray(text).T
  targets = same / same.sum(1, keepdims=True)
  expected = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)).mean() / 2
  np.testing.assert_allclose(result["loss"].value, expected, rtol=1e-6)


def test_untrained_features_cost_ln_batch():
  same = losses.normalize(jnp.ones((8, 4)))
  loss = losses.contrastive(same, same, scale=jnp.float32(100.0))["loss"]
  np.testing.assert_allclose(loss.value, np.log(8), rtol=1e-6)


def test_means_add_up():
  values, weight = jnp.arange(6.0), jnp.array([1, 0, 1, 1, 1, 0.0])
  whole = losses.mean(values, weight)
  parts = [losses.mean(values[i : i + 2], weight[i : i + 2]) for i in (0, 2, 4)]
  total = jax.tree.map(lambda *x: sum(x), *parts)
  np.testing.assert_allclose(total.value, whole.value)
