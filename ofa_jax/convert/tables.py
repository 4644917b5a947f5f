"""A whole model through its table: the weights of PyTorch's tensors, and the tensors of weights."""

from collections.abc import Iterable, Mapping

import numpy as np

from ofa_jax import trees
from ofa_jax.convert import rules
from ofa_jax.convert.params import ModelConfig, Weights
from ofa_jax.models.abstract import abstract


def from_torch(
  tensors: Mapping[str, np.ndarray],
  config: ModelConfig,
  *,
  table: Iterable[rules.Rule],
  ignored: Iterable[tuple[str, str]] = (),
) -> Weights:
  """Makes weights, NumPy, of PyTorch's tensors by name.

  Args:
    tensors: of any floating precision.
    config: the model's sizes.
    table, ignored: as for `rules.from_torch`.

  Raises:
    ValueError: all tensors that are missing, unexpected, or of another shape than the config's.
  """
  params, rest = (
    {path: x.shape for path, x in trees.flatten(tree).items()} for tree in abstract(config)[1:]
  )
  flat = rules.from_torch(tensors, table, shapes={**params, **rest}, ignored=ignored)
  return tuple(trees.unflatten({path: flat[path] for path in tree}) for tree in (params, rest))


def to_torch(weights: Weights, *, table: Iterable[rules.Rule]) -> dict[str, np.ndarray]:
  """The inverse of `from_torch`: tensors by name, those of BatchNorm's counters being 0."""
  params, rest = weights
  tensors = rules.to_torch({**trees.flatten(params), **trees.flatten(rest)}, table)
  return tensors | rules.counters(tensors)
