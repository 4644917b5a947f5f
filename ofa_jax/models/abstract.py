"""A model without its parameters: their names, shapes and dtypes."""

from typing import Any, Protocol

import jax
from flax import nnx

from ofa_jax import trees


class Buildable(Protocol):
  """The sizes of a model, which make it."""

  def build(self, *, rngs: nnx.Rngs) -> nnx.Module:
    """Makes the model with fresh parameters."""


def abstract(config: Buildable) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
  """Returns (graph, params, rest) for `nnx.merge`, the last two nested dicts of ShapeDtypeStructs.

  Raises:
    ValueError: sizes that do not fit together.
  """
  return trees.split(jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
