r"""Inception v3 for `hub`: torchvision's file and the one of pytorch-fid, in both directions.

Which of them a file is shows in its last layer: TensorFlow's model has 1008 classes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ofa_jax.convert import limits, rules, tables, torch_files
from ofa_jax.convert.family import Family
from ofa_jax.convert.params import Weights
from ofa_jax.convert.rules import CONV, Rule, batch_norm_rules, linear_rules
from ofa_jax.models.inception import SIZE, InceptionConfig

TITLE = "an Inception v3"
_TENSORFLOW = 1008  # classes

_UNIT, _BRANCH = r"(\w+)", r"(\w+).(\w+)"
RULES: tuple[Rule, ...] = (
  (rf"{_UNIT}.conv.weight", r"\1/conv/kernel", CONV),
  *batch_norm_rules(rf"{_UNIT}.bn", r"\1/bn"),
  (rf"{_BRANCH}.conv.weight", r"\1/\2/conv/kernel", CONV),
  *batch_norm_rules(rf"{_BRANCH}.bn", r"\1/\2/bn"),
  *linear_rules("fc", "fc"),
)
IGNORED: tuple[tuple[str, str], ...] = (
  (r"^AuxLogits\.", "a second classifier, which only training uses"),
  (r"\.num_batches_tracked$", "a counter that BatchNorm with a fixed momentum never reads"),
)


def from_torch(tensors: Mapping[str, np.ndarray], config: InceptionConfig) -> Weights:
  """Makes weights of PyTorch's tensors by name; ValueError as `tables.from_torch`."""
  return tables.from_torch(rules.plain_names(tensors), config, table=RULES, ignored=IGNORED)


def to_torch(weights: Weights) -> dict[str, np.ndarray]:
  """Tensors as PyTorch names them, without torchvision's second classifier."""
  return tables.to_torch(weights, table=RULES)


def infer(
  tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]
) -> tuple[InceptionConfig, dict[str, Any]]:
  """Reads the variant and the classes off the tensors; ValueError without the last layer."""
  del options
  bias = rules.plain_names(tensors).get("fc.bias")
  if bias is None or bias.ndim != 1:
    raise ValueError("Expected an Inception v3 with its last layer, found no fc.bias")
  variant = "pytorch_fid" if len(bias) == _TENSORFLOW else "torchvision"
  config = InceptionConfig(variant=variant, num_classes=len(bias), name=f"inception_v3_{variant}")
  return limits.check(config), {}


def save_torch(
  path: pathlib.Path, config: InceptionConfig, weights: Weights, *, settings: Mapping[str, Any]
) -> None:
  """Writes a state dict that torchvision (`aux_logits=False`) or pytorch-fid loads."""
  del config, settings
  torch_files.save_state_dict(path, to_torch(weights))


FAMILY = Family(
  name="inception",
  title=TITLE,
  paper="arXiv 1512.00567",
  config=InceptionConfig,
  marks=(r"Conv2d_1a_3x3\.conv\.", r"Mixed_7c\.branch3x3dbl_3b\."),
  settings={},
  read_settings=lambda described: {},
  to_json=dataclasses.asdict,
  from_json=functools.partial(limits.from_json, InceptionConfig, title=TITLE),
  infer=infer,
  from_torch=from_torch,
  save_torch=save_torch,
  image_size=lambda config, settings: SIZE,
  card={"pipeline_tag": "image-feature-extraction", "tags": ["inception", "fid"]},
)
