"""Trees of parameters addressed by path: "visual/blocks/attn/qkv/kernel".

One regex language serves sharding, weight decay, freezing and learning-rate multipliers: an ordered
table of `(pattern, value)`, searched with `re.search`, in which the first match wins.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

BATCH_AXES = ("data", "fsdp")  # the mesh axes that split a batch

Rules = Iterable[tuple[str, Any]]
Tree = dict[
  str, Union[jax.Array, "Tree"]
]  # of parameters or statistics, as `nnx.to_pure_dict` gives


def path_name(key_path: tuple) -> str:
  """ "a/b/c" for a JAX key path through dictionaries, sequences and named tuples."""
  return "/".join(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path
  )


def flatten(tree: Any) -> dict[str, Any]:
  """Leaves by path, in tree order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_name(path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dictionaries from leaves by path: the inverse of `flatten` for such a tree."""
  return traverse_util.unflatten_dict(leaves, sep="/")


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
  """(graph, params, rest) of a model for `nnx.merge`: nested dicts, the second of statistics."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def map_paths(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
  """`fn(path, leaf, *other_leaves)` on every leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf, *rest: fn(path_name(path), leaf, *rest), tree, *others
  )


def first_match(rules: Rules, path: str, *, default: Any = None) -> Any:
  """Value of the first rule whose pattern is found in the path."""
  for pattern, value in rules:
    if re.search(pattern, path):
      return value
  return default


def unmatched(patterns: Iterable[str], tree: Any) -> list[str]:
  """Patterns that match no path of the tree: almost always a typing error."""
  paths = list(flatten(tree))
  return [p for p in patterns if not any(re.search(p, path) for path in paths)]


def matches(patterns: Iterable[str], tree: Any) -> Any:
  """Tree of bools: does any of the patterns match the leaf's path?"""
  patterns = tuple(patterns)
  return map_paths(lambda path, _: any(re.search(p, path) for p in patterns), tree)


def count(tree: Any) -> int:
  """Number of scalars in the tree."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
  """Bytes of all arrays of the tree (whole arrays, whatever their sharding)."""
  return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def difference(expected: Any, found: Any) -> list[str]:
  """Every way in which two trees of arrays differ in paths, shapes or dtypes, one line each."""
  a, b = flatten(expected), flatten(found)
  lines = [f"missing: {p} {tuple(a[p].shape)}" for p in a if p not in b]
  lines += [f"unexpected: {p} {tuple(b[p].shape)}" for p in b if p not in a]
  lines += [
    f"{p}: expected {tuple(a[p].shape)} {a[p].dtype}, found {tuple(b[p].shape)} {b[p].dtype}"
    for p in a
    if p in b and (tuple(a[p].shape) != tuple(b[p].shape) or a[p].dtype != b[p].dtype)
  ]
  return lines


def split_batch(batch: Any, parts: int) -> Any:
  """[B, ...] leaves to [parts, B / parts, ...]: part c holds the rows i * parts + c.

  B may differ from leaf to leaf, as between the streams of a batch: each is split by itself.
  Interleaved, not contiguous: where the batch axis is sharded, every device keeps its own rows in
  every part and nothing is moved. A scalar goes to every part.
  """

  def split(x):
    if not x.ndim:
      return jnp.broadcast_to(x, parts)
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, batch)


def join_batch(parts: Any) -> Any:
  """The inverse of `split_batch`: [parts, B / parts, ...] leaves to [B, ...] in the first order."""
  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), parts
  )
