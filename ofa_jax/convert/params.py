"""A model's parameters without computing them: their shapes, and moving them to devices."""

from typing import Any

import jax
from flax import nnx

from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.ofa import OFAConfig

ModelConfig = CNCLIPConfig | OFAConfig
Weights = tuple[dict[str, Any], dict[str, Any]]  # nested dicts: parameters, running statistics


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
  """Returns (graph, params, rest) for `nnx.merge`, the last two nested dicts of ShapeDtypeStructs.

  Raises:
    ValueError: sizes that do not fit together.
  """
  model = jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def placement(weights: Any, shardings: Any) -> Any:
  """Returns a tree of shardings like `weights`.

  Args:
    weights: (params, rest), arrays or their shapes.
    shardings: such trees, which are returned; one sharding for all; None for the first device.
  """
  if isinstance(shardings, tuple):
    return shardings
  one = shardings or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda _: one, tuple(weights))


def place(params: dict[str, Any], rest: dict[str, Any], shardings: Any) -> Weights:
  """Moves NumPy arrays to devices, emptying the given dicts: no two arrays exist twice at once.

  Args:
    params, rest: nested dicts, empty afterwards.
    shardings: as for `placement`.
  """

  def move(arrays, places):
    moved = {}
    for name in list(arrays):
      x = arrays.pop(name)
      put = move if isinstance(x, dict) else jax.device_put
      moved[name] = put(x, places[name])
    return moved

  params_places, rest_places = placement((params, rest), shardings)
  return move(params, params_places), move(rest, rest_places)
