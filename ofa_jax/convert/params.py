"""A model's parameters on their way to devices."""

from typing import Any

import jax

from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.inception import InceptionConfig
from ofa_jax.models.ofa.model import OFAConfig
from ofa_jax.models.openai_clip import OpenAICLIPConfig
from ofa_jax.models.patches import PatchCodecConfig
from ofa_jax.models.vqgan import VQGANConfig

ModelConfig = (
  CNCLIPConfig | OFAConfig | OpenAICLIPConfig | VQGANConfig | InceptionConfig | PatchCodecConfig
)
Weights = tuple[dict[str, Any], dict[str, Any]]  # nested dicts: parameters, running statistics


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
