"""Tables of patches for `hub`: a codec of small worlds, which no other program has."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ofa_jax.convert import limits, rules, tables, torch_files
from ofa_jax.convert.family import Family
from ofa_jax.convert.params import Weights
from ofa_jax.convert.rules import SAME, Rule
from ofa_jax.models.patches import COLOURS, PatchCodecConfig

TITLE = "a table of patches"
RULES: tuple[Rule, ...] = (("patches.weight", "patches/embedding", SAME),)


def from_torch(tensors: Mapping[str, np.ndarray], config: PatchCodecConfig) -> Weights:
  """Makes weights of tensors by name; ValueError as `tables.from_torch`."""
  return tables.from_torch(rules.plain_names(tensors), config, table=RULES, ignored=())


def infer(
  tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]
) -> tuple[PatchCodecConfig, dict[str, Any]]:
  """Reads the sizes off the table, and the side of the pictures out of what is beside it.

  A table that says nothing is for pictures of eight patches a side.

  Raises:
    ValueError: there is no table, or none of square patches.
  """
  table = rules.plain_names(tensors).get("patches.weight")
  if table is None or table.ndim != 2:
    found = "none" if table is None else str(table.shape)
    raise ValueError(f"Expected a table of patches, patches.weight, found {found}")
  side = round((table.shape[1] / COLOURS) ** 0.5)
  if side * side * COLOURS != table.shape[1]:
    raise ValueError(f"Expected square patches of {COLOURS} colours, found {table.shape}")
  image_size = torch_files.described(options).get("image_size", 8 * side)
  config = PatchCodecConfig(image_size=image_size, patch_size=side, num_codes=len(table))
  return limits.check(config), {}


def save_torch(
  path: pathlib.Path,
  config: PatchCodecConfig,
  weights: Weights,
  *,
  settings: Mapping[str, Any],
) -> None:
  """Writes the table, with the side of the pictures beside."""
  del settings
  tensors, described = tables.to_torch(weights, table=RULES), {"image_size": config.image_size}
  torch_files.save_state_dict(path, tensors, under="state_dict", described=described)


FAMILY = Family(
  name="patches",
  title=TITLE,
  paper="the quickstart of this package",
  config=PatchCodecConfig,
  marks=(r"^patches\.weight$",),
  settings={},
  read_settings=lambda described: {},
  to_json=dataclasses.asdict,
  from_json=functools.partial(limits.from_json, PatchCodecConfig, title=TITLE),
  infer=infer,
  from_torch=from_torch,
  save_torch=save_torch,
  image_size=lambda config, settings: config.image_size,
)
