"""LoRA (arXiv 2106.09685): matrices are trained by the two factors of what is added to them.

The factors are part of the optimizer's state, and the parameters are at every step what they are
with the product added. So checkpoints, evaluations, conversions and exports have whole models, and
know nothing of LoRA; what it saves is the moments of Adam, not the gradient of a matrix.

The optimizer sees a tree in which the factors stand in the place of their matrix.
"""

import math
import re
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ofa_jax import trees
from ofa_jax.config import Lora
from ofa_jax.trees import Tree

DOWN, UP = "lora_down", "lora_up"
# Matrices of attention whose first axis is the input and the others the output; of all others the
# last axis is the output.
_FIRST_IS_INPUT = r"/(qkv|kv|qk|q|k)/kernel$"
_STACKED = r"/blocks/"  # one matrix a layer


class Factored(NamedTuple):
  """The optimizer's state of a run with LoRA.

  Attributes:
    factors: in the place of their matrix, `DOWN` float32[..., N, R] and `UP` float32[..., R, M].
    inner: the state of the optimizer of these and of what is trained as it is.
  """

  factors: Tree
  inner: optax.OptState


def trains(lora: Lora, path: str) -> bool:
  """Whether a parameter is trained: by factors, as one of those, or as it is."""
  return any(re.search(p, matrix_of(path)) for p in (*lora.matrices, *lora.also))


def matrix_of(path: str) -> str:
  """The path of the matrix that a factor is of; any other path as it is."""
  head, _, last = path.rpartition("/")
  return head if last in (DOWN, UP) else path


def init(lora: Lora, params: Tree) -> Tree:
  """Fresh factors, whose product is zero; what is drawn depends on the path alone.

  Raises:
    ValueError: a pattern matches no parameter, or one that is no matrix or too small.
  """
  lost = trees.unmatched((*lora.matrices, *lora.also), params)
  flat = {
    path: leaf
    for path, leaf in trees.flatten(params).items()
    if any(re.search(p, path) for p in lora.matrices)
  }
  others = [
    f"{path} {tuple(x.shape)}" for path, x in flat.items() if min(_sizes(path, x)) <= lora.rank
  ]
  if lost or others:
    lines = [f"no parameter that matches {pattern!r}" for pattern in lost]
    lines += [f"no matrix that rank {lora.rank} makes smaller: {name}" for name in others]
    raise ValueError(
      "optim.lora: expected patterns of matrices, found\n  "
      + "\n  ".join(lines[:10])
      + "\nParameter paths look like\n  "
      + "\n  ".join(list(trees.flatten(params))[:5])
    )
  return trees.unflatten({k: v for path, x in flat.items() for k, v in _fresh(lora, path, x)})


def trained(params: Tree, factors: Tree) -> Tree:
  """The tree that the optimizer sees: parameters, and of some matrices the factors."""
  factors = trees.flatten(factors)
  matrices = {matrix_of(path) for path in factors}
  others = {path: x for path, x in trees.flatten(params).items() if path not in matrices}
  return trees.unflatten(others | factors)


def gradients(lora: Lora, grads: Tree, factors: Tree) -> Tree:
  """The gradients of that tree out of those of the parameters."""
  whole, flat = trees.flatten(grads), trees.flatten(factors)

  def one(path, factor):
    head, _, name = path.rpartition("/")
    grad = lora.scale * _matrix(head, whole[head]).astype(factor.dtype)
    other = jnp.swapaxes(flat[f"{head}/{UP if name == DOWN else DOWN}"], -1, -2)
    return _product(grad, other) if name == DOWN else _product(other, grad)

  return trained(grads, trees.map_paths(one, factors))


def applied(lora: Lora, params: Tree, factors: Tree, tree: Tree) -> tuple[Tree, Tree]:
  """Parameters and factors after an update of the optimizer's tree.

  Args:
    lora: the config.
    params, factors: before it.
    tree: as `trained` gives it, updated.
  """
  updated, old, flat = trees.flatten(tree), trees.flatten(factors), trees.flatten(params)
  for path in {matrix_of(path) for path in old}:
    down, up = f"{path}/{DOWN}", f"{path}/{UP}"
    # Of the differences, so that no digits are lost to those of the products.
    change = _product(updated[down], updated[up] - old[up])
    change += _product(updated[down] - old[down], old[up])
    flat[path] = flat[path] + (lora.scale * change).reshape(flat[path].shape)
  others = {path: x for path, x in updated.items() if path in flat}
  return trees.unflatten(flat | others), trees.unflatten({path: updated[path] for path in old})


def _product(left, right):
  return jnp.matmul(left, right, precision="highest")


def _sizes(path, x):
  """(N, M), rows and columns of the matrix; (0, 0) of what is none."""
  shape = x.shape[1:] if re.search(_STACKED, path) else x.shape
  if len(shape) < 2:
    return 0, 0
  cut = 1 if re.search(_FIRST_IS_INPUT, path) else len(shape) - 1
  return math.prod(shape[:cut]), math.prod(shape[cut:])


def _matrix(path, x):
  """The parameter as [N, M], or [L, N, M] of stacked layers."""
  stacked = x.shape[:1] if re.search(_STACKED, path) else ()
  return x.reshape(*stacked, *_sizes(path, x))


def _fresh(lora, path, x):
  """The first factor keeps the size of what it is multiplied by; the second is zero."""
  stacked = x.shape[:1] if re.search(_STACKED, path) else ()
  inputs, outputs = _sizes(path, x)
  key = jax.random.key(zlib.crc32(path.encode()))
  down = jax.random.normal(key, (*stacked, inputs, lora.rank), jnp.float32) / math.sqrt(inputs)
  yield f"{path}/{DOWN}", down
  yield f"{path}/{UP}", jnp.zeros((*stacked, lora.rank, outputs), jnp.float32)
