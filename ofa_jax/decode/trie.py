"""Tries of answers as arrays: what may follow is looked up on the device.

A node is a beginning of answers, `ROOT` the empty one. Its continuations are a run of edges, sorted
by token (the CSR form of the tree). A hypothesis carries the number of its node; `DEAD` is where it
goes when it leaves the trie or has ended an answer, and there, as in the original, it can only end.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

DEAD, ROOT = 0, 1


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["first", "tokens", "nodes"], meta_fields=["width"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trie:
  """N nodes and E edges, both padded to powers of two so that similar tries share a program.

  Attributes:
    first: int32[N + 1], the first edge of every node; it has those before the next node's first.
    tokens: int32[E], the token of every edge.
    nodes: int32[E], where it leads.
    width: at least the most edges that a node has.
  """

  first: np.ndarray
  tokens: np.ndarray
  nodes: np.ndarray
  width: int

  def allowed(self, node: jax.Array, *, vocab_size: int) -> jax.Array:
    """Returns which tokens may follow, bool[..., V], at nodes int32[...]."""
    edges, exists = self._edges(node)
    tokens = jnp.where(exists, jnp.take(self.tokens, edges), vocab_size)  # beyond: dropped
    row = lambda ids: jnp.zeros(vocab_size, bool).at[ids].set(True, mode="drop")  # noqa: E731
    for _ in node.shape:  # rows stay on their devices, where one scatter for all gathers the ids
      row = jax.vmap(row)
    return row(tokens)

  def child(self, node: jax.Array, token: jax.Array) -> jax.Array:
    """Returns the node int32[...] behind `token` at `node`, both int32[...]; `DEAD` without one."""
    edges, exists = self._edges(node)
    matches = exists & (jnp.take(self.tokens, edges) == token[..., None])
    return jnp.max(jnp.where(matches, jnp.take(self.nodes, edges), DEAD), axis=-1)

  def path(self, answer: Sequence[int]) -> np.ndarray | None:
    """Returns the nodes int32[n + 1] at which an answer's tokens and its end are chosen.

    On the host; None where the trie does not hold the answer. The trie has to be one of NumPy.
    """
    nodes, node = [ROOT], ROOT
    for token in answer:
      begin, end = self.first[node], self.first[node + 1]
      at = begin + np.searchsorted(self.tokens[begin:end], token)
      if at == end or self.tokens[at] != token or self.nodes[at] == DEAD:
        return None
      node = self.nodes[at]
      nodes.append(node)
    begin, end = self.first[node], self.first[node + 1]
    if not np.any(self.nodes[begin:end] == DEAD):  # no answer ends here
      return None
    return np.array(nodes, np.int32)

  def _edges(self, node):
    edges = jnp.take(self.first, node)[..., None] + jnp.arange(self.width)
    exists = edges < jnp.take(self.first, node + 1)[..., None]
    return jnp.where(exists, edges, 0), exists


def build(answers: Sequence[Sequence[int]], *, eos: int = 2) -> Trie:
  """Makes the trie of answers.

  Args:
    answers: token ids of each, without the begin and end tokens; equal ones are one.
    eos: the token that ends an answer.

  Raises:
    ValueError: there is no answer, or one without tokens.
  """
  check(answers)
  children = [{eos: DEAD}, {}]
  for answer in answers:
    node = ROOT
    for token in answer:
      if token not in children[node]:
        children[node][token] = len(children)
        children.append({})
      node = children[node][token]
    children[node][eos] = DEAD
  edges = [edge for node in children for edge in sorted(node.items())]
  counts = np.array([len(node) for node in children])
  first = np.full(_power_of_two(len(children)) + 1, len(edges), np.int32)
  first[: len(children)] = np.cumsum(counts) - counts
  tokens, nodes = np.zeros((2, _power_of_two(len(edges))), np.int32)
  tokens[: len(edges)], nodes[: len(edges)] = np.array(edges).T
  return Trie(first=first, tokens=tokens, nodes=nodes, width=_power_of_two(counts.max()))


def check(answers: Sequence[Sequence[int]]) -> None:
  """Refuses what no trie can be made of.

  Raises:
    ValueError: there is no answer, or one without tokens.
  """
  if not len(answers):
    raise ValueError("Expected at least one answer to choose from, found none")
  empty = [str(i) for i, answer in enumerate(answers) if not len(answer)]
  if empty:
    raise ValueError(
      f"Expected answers of at least one token, found {len(empty)} without any: "
      f"numbers {', '.join(empty[:5])}"
    )


def _power_of_two(number: int) -> int:
  return 1 << (int(number) - 1).bit_length()
