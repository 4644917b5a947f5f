import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import losses
from ofa_jax.engine import sharding


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
  labels = jnp.array([[0, 0, 8], [1, 1, 7], [2, 2, 6], [3, 0, 9], [4, 4, 5], [5, 5, 4]], jnp.int32)
  result = losses.contrastive(image, text, scale=jnp.float32(7.0), labels=labels)
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


def pairs_of_48():
  """Features of student and teacher, uneven weights, repeated captions."""
  rng = np.random.default_rng(0)
  image, text = rng.normal(size=(2, 48, 8)).astype(np.float32)
  teacher = losses.normalize(rng.normal(size=(2, 48, 6)))
  weight = jnp.asarray(rng.integers(0, 3, 48), jnp.float32)
  labels = np.stack([rng.integers(0, 30, 48), np.arange(48)], axis=1).astype(np.int32)
  return (jnp.asarray(image), jnp.asarray(text), jnp.float32(9.0)), {
    "weight": weight,
    "labels": jnp.asarray(labels),
    "teacher": losses.Teacher(*teacher, jnp.float32(20.0)),
  }


def loss_and_gradients(mesh, **options):
  """(program, metrics, gradients) of the loss with everything in it, on a mesh or none."""
  arguments, rest = pairs_of_48()
  options = rest | options

  def total(image, text, scale):
    image, text = losses.normalize(image), losses.normalize(text)
    metrics = losses.contrastive(image, text, scale=scale, **options)
    value = metrics["loss"].value + metrics["distill_logits"].value
    return value, {name: m.value for name, m in metrics.items()}

  def run(*args):
    gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
    if mesh is None:
      return gradient(*args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return gradient(*args)

  if mesh is not None:
    rows = sharding.batch_sharding(mesh)
    arguments = jax.device_put(arguments, (rows, rows, sharding.replicated(mesh)))
  program = jax.jit(run).lower(*arguments).compile()
  return program, *reversed(program(*arguments))


@pytest.mark.parametrize("kind", losses.LOSSES)
@pytest.mark.parametrize(
  ("sizes", "chunks"), [(None, 4), ((8, 1, 1), 1), ((2, 2, 2), 1), ((2, 2, 2), 3)], ids=str
)
def test_blocks_and_rings_are_the_whole_matrix(kind, sizes, chunks):
  options = {"kind": kind, "bias": jnp.float32(-3.0)}
  whole, metrics, grads = loss_and_gradients(None, **options)
  mesh = None if sizes is None else sharding.make_mesh(sizes)
  program, same, same_grads = loss_and_gradients(mesh, **options, chunks=chunks)
  for name, value in metrics.items():
    np.testing.assert_allclose(same[name], value, rtol=1e-6, err_msg=name)
  for found, expected in zip(same_grads, grads, strict=True):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
  assert "[48,48]" in whole.as_text()
  assert "[48,48]" not in program.as_text()


def test_sigmoid_is_siglips_sum_over_all_pairs(features):
  image, text = features
  result = losses.contrastive(
    image, text, scale=jnp.float32(10.0), kind="sigmoid", bias=jnp.float32(-10.0)
  )
  logits = 10.0 * np.asarray(image, np.float64) @ np.asarray(text, np.float64).T - 10.0
  signs = 2 * np.eye(6) - 1
  expected = np.log1p(np.exp(-signs * logits)).sum() / 6  # algorithm 1 of the paper
  np.testing.assert_allclose(result["loss"].value, expected, rtol=1e-6)


def test_distilled_logits_are_soft_cross_entropies(features):
  image, text = features
  teacher = losses.normalize(np.random.default_rng(1).normal(size=(2, 6, 3)))
  result = losses.contrastive(
    image, text, scale=jnp.float32(7.0), teacher=losses.Teacher(*teacher, jnp.float32(5.0))
  )
  logits = 7.0 * np.asarray(image) @ np.asarray(text).T
  soft = np.exp(5.0 * np.asarray(teacher[0], np.float64) @ np.asarray(teacher[1]).T)
  rows = cross_entropy(logits, soft / soft.sum(1, keepdims=True))
  columns = cross_entropy(logits.T, (soft / soft.sum(0)).T)
  expected = (rows + columns).mean() / 2
  np.testing.assert_allclose(result["distill_logits"].value, expected, rtol=1e-6)


def test_an_unknown_loss_is_told(features):
  with pytest.raises(ValueError, match="softmax, sigmoid, found 'hinge'"):
    losses.contrastive(*features, scale=jnp.ones(()), kind="hinge")
