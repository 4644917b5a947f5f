import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax import trees

TREE = {
  "visual": {"conv": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}},
  "scale": jnp.ones(()),
}


def test_paths():
  assert list(trees.flatten(TREE)) == ["scale", "visual/conv/bias", "visual/conv/kernel"]
  assert trees.flatten({"a": [1, (2,)]}) == {"a/0": 1, "a/1/0": 2}


def test_first_match_wins():
  rules = (("conv/bias", 1), ("conv", 2))
  found = trees.map_paths(lambda path, _: trees.first_match(rules, path, default=0), TREE)
  assert trees.flatten(found) == {"scale": 0, "visual/conv/bias": 1, "visual/conv/kernel": 2}


def test_unmatched_patterns_are_named():
  assert trees.unmatched(["^visual", "visaul", "scale$"], TREE) == ["visaul"]


def test_sizes():
  assert trees.count(TREE) == 10
  assert trees.num_bytes(TREE) == 40


def test_difference_lists_everything():
  other = {"visual": {"conv": {"kernel": jnp.zeros((2, 4))}}, "extra": jnp.zeros(1)}
  assert trees.difference(TREE, other) == [
    "missing: scale ()",
    "missing: visual/conv/bias (3,)",
    "unexpected: extra (1,)",
    "visual/conv/kernel: expected (2, 3) float32, found (2, 4) float32",
  ]
  assert trees.difference(TREE, jax.tree.map(jnp.array, TREE)) == []


def test_split_batch_keeps_rows_on_their_device_and_joins_back():
  rows = np.arange(24).reshape(12, 2)
  parts = trees.split_batch(rows, 3)
  np.testing.assert_array_equal(parts[1, :, 0] // 2, [1, 4, 7, 10])
  np.testing.assert_array_equal(trees.join_batch(parts), rows)


def test_split_batch_gives_scalars_to_every_part():
  parts = trees.split_batch({"rows": np.arange(4), "late": np.bool_(True)}, 2)
  assert parts["late"].tolist() == [True, True]
  assert parts["rows"].tolist() == [[0, 2], [1, 3]]
