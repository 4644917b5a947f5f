"""OFA's cross entropy against the original's values and gradients, `golden/ofa/losses`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import losses
from ofa_jax.engine import sharding

GOLDEN = Path(__file__).parent / "golden" / "ofa" / "losses"
FUNCTION = json.loads((GOLDEN / "nll_function.json").read_text())
CRITERION = json.loads((GOLDEN / "criterion_injected.json").read_text())


def cases(golden, kind="ce"):
  """Those of a criterion: the cross entropy, or "el" with the encouraging loss added."""
  names = [name for name, case in golden.items() if "error" not in case and name[:2] == kind]
  # The encouraging criterion pairs R-Drop's tokens after it has sorted them: see `test_rdrop_...`.
  return [name for name in names if kind == "ce" or "rdrop" not in name]


def arrays(name):
  with np.load(GOLDEN / f"{name}.npz") as found:
    return dict(found)


def evaluate(logits, targets, *, twins=False, **options):
  """Metrics, and the gradient of the loss's sum by the logits.

  The original's twins stand behind one another, here they are neighbours.
  """
  neighbours = np.arange(len(logits)).reshape(2, -1).T.ravel() if twins else np.arange(len(logits))
  targets = targets[neighbours % len(targets)]

  @jax.jit
  def run(logits):
    metrics = losses.label_smoothed(logits[neighbours], jnp.asarray(targets), **options)
    return metrics["loss"].total, metrics

  return jax.grad(run, has_aux=True)(jnp.asarray(logits))[::-1]


def check(case, metrics, grads, *, tokens):
  np.testing.assert_allclose(metrics["loss"].total, case["loss"], rtol=1e-5)
  np.testing.assert_allclose(metrics["nll"].total, case["nll_loss"], rtol=1e-5)
  assert metrics["nll"].count == tokens
  grads = np.asarray(grads)
  np.testing.assert_allclose(np.linalg.norm(grads), case["grad_norm"], rtol=1e-5)
  first = next(v for k, v in case.items() if k.endswith("first8"))
  np.testing.assert_allclose(grads[0, 0, :8], first, atol=1e-5 * np.abs(grads).max())


@pytest.mark.parametrize("name", [*cases(FUNCTION), *cases(FUNCTION, "el")])
def test_the_originals_function(name):
  case, given = FUNCTION[name], arrays("nll_inputs")
  kwargs = case["kwargs"]
  logits, targets = given["logits"][:, None], given[case["target"]][:, None].astype(np.int32)
  options = {
    "smoothing": kwargs["epsilon"],
    "drop_worst": kwargs.get("drop_worst_ratio", 0.0),
    "dropping": kwargs["update_num"] > kwargs.get("drop_worst_after", 0),
    "drop_best": kwargs.get("drop_best_ratio", 0.0),
    "dropping_best": kwargs["update_num"] > kwargs.get("drop_best_after", 0),
    "rdrop": kwargs.get("reg_alpha"),
    "twins": "reg_alpha" in kwargs,
  }
  if case["constraint_masks"]:
    options["mask"] = given["constraint_masks"][:, None]
  if "constraint_start" in kwargs:
    options["allowed_range"] = kwargs["constraint_start"], kwargs["constraint_end"]
  check(case, *evaluate(logits, targets, **options), tokens=case["ntokens"])


@pytest.mark.parametrize("name", [*cases(CRITERION), *cases(CRITERION, "el")])
def test_the_originals_criterion(name):
  case, given = CRITERION[name], arrays("criterion_inputs")
  kwargs = case["kwargs"]
  twins = kwargs.get("use_rdrop", False)
  logits, targets = given["logits_2B"][: 8 if twins else 4], given[case["target"]].astype(np.int32)
  options = {
    "smoothing": kwargs["label_smoothing"],
    "sentence_avg": kwargs["sentence_avg"],
    "ignore_prefix": kwargs.get("ignore_prefix_size", 0),
    "ignore": 2 if kwargs.get("ignore_eos") else None,
    "drop_worst": kwargs.get("drop_worst_ratio", 0.0),
    "dropping": case["update_num"] > kwargs.get("drop_worst_after", 0),
    "rdrop": kwargs.get("reg_alpha", 1.0) if twins else None,
    "twins": twins,
    "log_end": kwargs.get("log_end", 0.75) if name.startswith("el.") else None,
  }
  for option, name in (("conf", "conf"), ("mask", "constraint_masks")):
    if case[name]:
      options[option] = np.repeat(given[name], 2 if twins else 1, axis=0)
  if "constraint_range" in kwargs:
    options["allowed_range"] = tuple(map(int, kwargs["constraint_range"].split(",")))
  metrics, grads = evaluate(logits, targets, **options)
  assert metrics["loss"].count == case["sample_size"]
  if np.isnan(case["loss"]):  # the divergence of two infinities; ours leaves those ids out
    np.testing.assert_allclose(metrics["nll"].total, case["nll_loss"], rtol=1e-5)
    assert np.isfinite(metrics["loss"].total) and np.isfinite(grads).all()
    return
  tokens = case["sample_size"] if not kwargs["sentence_avg"] else case["log_ntokens"]
  check(case, metrics, grads, tokens=tokens)


PEAKY = json.loads((GOLDEN / "encouraging_peaky.json").read_text())


@pytest.mark.parametrize("name", PEAKY)
def test_the_encouraging_loss_of_a_model_that_is_sure(name):
  """Most probabilities are above `log_end`, or even so near 1 that their logarithm ends."""
  case, given = PEAKY[name], arrays("criterion_inputs_peaky")
  logits, (log_end, which) = given["logits"], name.removeprefix("log_end").rsplit(".", 1)
  targets = given["target"]
  if which == "argmax_target":
    targets = np.where(targets == 1, 1, logits.argmax(-1))
  options = {"smoothing": 0.1, "log_end": float(log_end)}
  metrics, grads = evaluate(logits, targets.astype(np.int32), **options)
  np.testing.assert_allclose(metrics["loss"].total, case["loss"], rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(grads), case["grad_norm"], rtol=1e-5)
  assert metrics["loss"].count == case["sample_size"]


def test_rows_of_the_mask_that_allow_nothing_are_finite():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 3, 10)).astype(np.float32)
  targets = np.array([[1, 4, 2], [1, 1, 5]], np.int32)
  mask = np.zeros((2, 3, 10), bool)
  for b, t in zip(*np.nonzero(targets != 1), strict=True):
    mask[b, t, [targets[b, t], 7]] = True
  metrics, grads = evaluate(logits, targets, mask=mask, smoothing=0.1)
  assert np.isfinite(metrics["loss"].total) and metrics["loss"].count == 3
  assert np.isfinite(grads).all()
  assert not np.asarray(grads)[targets == 1].any() and not np.asarray(grads)[~mask].any()


def test_accuracy_counts_the_likeliest_allowed_id():
  logits = np.zeros((1, 3, 12), np.float32)
  logits[0, :, 9] = 3.0
  logits[0, :, 5] = 2.0
  targets = np.array([[5, 9, 1]], np.int32)
  free, _ = evaluate(logits, targets)
  bound, _ = evaluate(logits, targets, allowed_range=(4, 8))
  assert free["accuracy"].value == 0.5 and free["accuracy"].count == 2
  assert bound["accuracy"].value == 0.5
  assert np.isposinf(bound["loss"].total)  # a target that is not allowed does not pass unnoticed


def test_tokens_of_all_devices_are_ranked_together():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(16, 5, 24)).astype(np.float32) * 3
  targets = rng.integers(2, 24, (16, 5)).astype(np.int32)
  targets[rng.random((16, 5)) < 0.3] = 1
  targets[3] = 1

  def total(logits, targets):
    metrics = losses.label_smoothed(logits, targets, smoothing=0.1, drop_worst=0.3)
    return metrics["loss"].total, metrics["loss"].count

  gradient = jax.jit(jax.value_and_grad(total, has_aux=True))
  (loss, count), grads = gradient(logits, targets)
  assert count == int(np.sum(targets != 1) * 0.7)
  rows = sharding.batch_sharding(sharding.make_mesh((2, 4, 1)))
  (same, same_count), split = gradient(*jax.device_put((logits, targets), rows))
  assert count == same_count
  np.testing.assert_allclose(same, loss, rtol=1e-6)
  np.testing.assert_allclose(split, grads, atol=1e-6)


def test_losses_of_two_batches_add_by_their_own_means():
  parts = losses.Mean(jnp.float32(6), jnp.float32(3)), losses.Mean(jnp.float32(5), jnp.float32(10))
  both = losses.sum_of_means(*parts)
  assert both.value == 2.5 and both.terms == parts
  assert losses.sum_of_means(both, parts[0]).value == 4.5
