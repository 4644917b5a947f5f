"""The filters against the original's."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.decode import sample

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "ofa" / "generation"


@pytest.fixture(scope="module")
def filters():
  with np.load(GOLDEN / "sampling_filters.npz") as arrays:
    return dict(arrays)


def test_the_likeliest_k_are_the_originals(filters):
  values, tokens = sample.largest(jnp.asarray(filters["lprobs"][:, :1]), 8)
  np.testing.assert_array_equal(tokens, filters["topk8_indices"])
  np.testing.assert_array_equal(values, filters["topk8_values"])


def test_the_likeliest_share_is_the_originals(filters):
  log_probs, tokens = sample.nucleus(jnp.asarray(filters["lprobs"]), 0.6)
  expected = filters["topp06_trimmed_probs"]
  width = expected.shape[-1]
  np.testing.assert_allclose(np.exp(log_probs[..., :width]), expected, atol=1e-6)
  assert (log_probs[..., width:] == -np.inf).all()
  kept = expected > 0
  np.testing.assert_array_equal(
    np.asarray(tokens)[..., :width][kept], filters["topp06_indices"][kept]
  )


@pytest.mark.parametrize("options", [{"top_k": 8}, {"top_p": 0.6}, {}])
def test_draws_keep_to_the_filter_and_are_scored_with_the_whole(filters, options):
  log_probs = jnp.asarray(np.tile(filters["lprobs"][:1, :1], (1000, 3, 1)))
  tokens, scores = sample.draw(log_probs, rngs=jax.random.key(0), **options)
  row = filters["lprobs"][0, 0]
  assert (tokens.shape, tokens.dtype) == ((1000, 3), jnp.int32)
  np.testing.assert_allclose(scores, row[np.asarray(tokens)], atol=1e-6)
  keep = {"top_k": 8, "top_p": 2}.get(next(iter(options), None), len(row))
  expected = np.where(row >= np.sort(row)[-keep], np.exp(row), 0)
  counts = np.bincount(np.asarray(tokens).ravel(), minlength=len(row))
  assert np.abs(counts / counts.sum() - expected / expected.sum()).max() < 0.03
  assert not counts[expected == 0].any()


@pytest.mark.parametrize(("size", "k"), [(7, 7), (1000, 3), (59_457, 10), (59_457, 100)])
def test_the_largest_of_many_are_those_of_top_k(size, k):
  rng = np.random.default_rng(size)
  x = jnp.asarray(rng.normal(size=(2, 3, size)), jnp.float32)
  x = x.at[0, 0, : size // 2].set(-jnp.inf)
  for found, expected in zip(sample.largest(x, k), jax.lax.top_k(x, k), strict=True):
    np.testing.assert_array_equal(found, expected)
  # Of equal ones any may be taken, but none twice.
  values, at = sample.largest(jnp.round(x), k)
  np.testing.assert_array_equal(values, jax.lax.top_k(jnp.round(x), k)[0])
  assert all(len(set(row)) == k for row in np.asarray(at).reshape(-1, k).tolist())
  np.testing.assert_array_equal(jnp.take_along_axis(jnp.round(x), at, axis=-1), values)
