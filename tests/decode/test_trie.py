"""Tries against sets of tuples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.decode import trie
from ofa_jax.engine import sharding

EOS, VOCAB = 2, 40


def test_what_follows_is_what_the_answers_say():
  rng = np.random.default_rng(0)
  answers = [rng.integers(4, 12, rng.integers(1, 5)).tolist() for _ in range(60)]
  found = trie.build(answers)
  ended = [(*answer, EOS) for answer in answers]
  beginnings = sorted({x[:i] for x in ended for i in range(len(x) + 1)} | {(39,), (4, 39)})
  node = np.full(len(beginnings), trie.ROOT)
  for depth in range(max(map(len, beginnings))):
    token = [x[depth] if depth < len(x) else 0 for x in beginnings]
    follow = np.asarray(jax.jit(found.child)(jnp.asarray(node), jnp.asarray(token)))
    node = np.where([depth < len(x) for x in beginnings], follow, node)
  allowed = jax.jit(lambda node: found.allowed(node, vocab_size=VOCAB))(jnp.asarray(node)[None])
  for beginning, row in zip(beginnings, np.asarray(allowed[0]), strict=True):
    follow = {x[len(beginning)] for x in ended if x[: len(beginning)] == beginning != x}
    assert set(np.flatnonzero(row).tolist()) == (follow or {EOS})


def test_similar_tries_share_a_program():
  one, two = (trie.build([[i] for i in range(4, n)]) for n in (80, 90))
  assert jax.tree.structure(one) == jax.tree.structure(two)
  assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, two)


def test_tries_need_answers():
  with pytest.raises(ValueError, match="at least one answer to choose from, found none"):
    trie.build([])
  with pytest.raises(ValueError, match="found 2 without any: numbers 1, 3"):
    trie.build([[4], [], [5], []])


def test_the_path_of_an_answer_says_what_was_allowed_on_it():
  answers = [[5, 6], [5, 6, 7], [5, 8], [9]]
  found = trie.build(answers)
  for answer in answers:
    path = found.path(answer)
    assert path[0] == trie.ROOT and len(path) == len(answer) + 1
    allowed = np.asarray(found.allowed(jnp.asarray(path), vocab_size=VOCAB))
    for place, row in enumerate(allowed):
      ended = [(*x, EOS) for x in answers]
      follow = {x[place] for x in ended if list(x[:place]) == answer[:place]}
      assert set(np.flatnonzero(row).tolist()) == follow
  for other in ([5], [6], [5, 6, 7, 7], [9, EOS], [39], []):
    assert found.path(other) is None


def test_what_is_allowed_is_looked_up_where_the_rows_are():
  found = trie.build([[i] for i in range(4, 40)])
  mesh = sharding.make_mesh((8, 1, 1))
  node = jax.ShapeDtypeStruct((16, 3), jnp.int32, sharding=sharding.batch_sharding(mesh))
  look = jax.jit(lambda found, node: found.allowed(node, vocab_size=VOCAB))
  with jax.set_mesh(mesh):
    text = look.lower(found, node).compile().as_text()
  assert "all-gather" not in text and "pred[2,3,40]" in text
