"""The sizes of a Chinese-CLIP as JSON: in our own fields and in those of the original.

The original has one file for each image tower and one for each text tower
(cn_clip/clip/model_configs), whose fields it merges.
"""

import ast
import dataclasses
import difflib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ofa_jax import storage
from ofa_jax.convert import json_files, limits
from ofa_jax.models.bert import BertConfig
from ofa_jax.models.clip_resnet import ResNetConfig
from ofa_jax.models.cnclip import CNCLIPConfig
from ofa_jax.models.vit import ViTConfig

# The original's field -> (ours, the value when the field is left out; ... means it may not be).
TEXT = {
  "vocab_size": ("vocab_size", ...),
  "text_hidden_size": ("width", ...),
  "text_num_hidden_layers": ("layers", ...),
  "text_num_attention_heads": ("heads", ...),
  "text_intermediate_size": ("mlp", ...),
  "text_max_position_embeddings": ("max_positions", ...),
  "text_type_vocab_size": ("type_vocab", ...),
  "text_hidden_dropout_prob": ("dropout", 0.1),
  "text_attention_probs_dropout_prob": ("attention_dropout", 0.1),
}
VISION = {
  "embed_dim": ("embed_dim", ...),
  "image_resolution": ("image_size", ...),
  "vision_layers": ("layers", ...),
  "vision_width": ("width", ...),
  "vision_patch_size": ("patch_size", None),
  "vision_head_width": ("head_width", 64),
}
# What the model is always built with, and initialised with.
FIXED = {"text_hidden_act": "gelu", "text_initializer_range": 0.02}


def to_json(config: CNCLIPConfig) -> dict[str, Any]:
  """Returns the config's own fields."""
  return dataclasses.asdict(config)


def from_json(described: Mapping[str, Any]) -> CNCLIPConfig:
  """Makes a config of its own fields, as `to_json` or a run's `config.json` has them.

  Raises:
    ValueError: fields are missing or unknown.
  """
  try:
    config = CNCLIPConfig(
      vision=vision_from_json(described),
      text=BertConfig(**fields_of(described, "text")),
      embed_dim=described["embed_dim"],
      **{k: described[k] for k in ("name", "logit_scale", "logit_bias") if k in described},
    )
    return limits.check(config)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"config.json does not describe a Chinese-CLIP: {error}") from error


def vision_from_json(described: Mapping[str, Any]) -> ViTConfig | ResNetConfig:
  """The image tower under "vision"; KeyError or TypeError where fields are missing or unknown."""
  vision = fields_of(described, "vision")
  if "patch_size" in vision:
    return ViTConfig(**vision)
  return ResNetConfig(**{**vision, "layers": tuple(vision["layers"])})


def fields_of(described: Mapping[str, Any], tower: str) -> dict[str, Any]:
  """The fields of a tower, of which a run also says the class; ValueError if it is no object."""
  return {k: v for k, v in limits.section(described, tower).items() if k != "_class"}


def read(paths: Iterable[str | pathlib.Path]) -> CNCLIPConfig:
  """Reads the image tower's and the text tower's JSON, in any order or merged in one file.

  Raises:
    ValueError: a file that is missing or no JSON object; all fields that are missing or unknown.
  """
  fields = {}
  paths = [storage.of(path) for path in paths]
  for path in paths:
    try:
      fields.update(json_files.read(path))
    except FileNotFoundError as error:
      raise ValueError(f"{path}: expected a JSON file, found none") from error
  try:
    return from_fields(fields)
  except ValueError as error:
    raise ValueError(f"{' + '.join(map(str, paths))}: {error}") from error


def from_fields(fields: Mapping[str, Any]) -> CNCLIPConfig:
  """Makes a config of the merged fields of both towers.

  Raises:
    ValueError: all fields that are missing or unknown, or have a wrong type.
  """
  known = {**VISION, **TEXT}
  values = {name: fields.get(name, default) for name, (_, default) in known.items()}
  layers = values["vision_layers"] = _vision_layers(values["vision_layers"])
  problems = _unknown_fields(fields) + [
    f"missing field {name!r}" if value is ... else f"{name}: expected a number, found {value!r}"
    for name, value in values.items()
    if not _is_number(value) and name not in ("vision_layers", "vision_patch_size")
  ]
  if layers is None:
    problems.append(
      "vision_layers: expected a number (ViT) or a list of four (ResNet), found "
      f"{fields.get('vision_layers', 'no such field')!r}"
    )
  if isinstance(layers, int) and not _is_number(values["vision_patch_size"]):
    problems.append("missing field 'vision_patch_size'")
  if problems:
    raise ValueError(
      "expected the fields of cn_clip's clip/model_configs of one image and one text tower; "
      + "; ".join(problems)
    )
  vision = {ours: values[name] for name, (ours, _) in VISION.items()}
  embed_dim, patch_size = vision.pop("embed_dim"), vision.pop("patch_size")
  return limits.check(
    CNCLIPConfig(
      vision=ViTConfig(patch_size=patch_size, **vision)
      if isinstance(layers, int)
      else ResNetConfig(**vision),
      text=BertConfig(**{ours: values[name] for name, (ours, _) in TEXT.items()}),
      embed_dim=embed_dim,
    )
  )


def to_fields(config: CNCLIPConfig) -> dict[str, Any]:
  """The inverse of `from_fields`; also the arguments of the original's class `CLIP`."""
  vision = {
    name: getattr(config.vision, ours, default)
    for name, (ours, default) in VISION.items()
    if name != "embed_dim"
  }
  text = {name: getattr(config.text, ours) for name, (ours, _) in TEXT.items()}
  return {"embed_dim": config.embed_dim, **vision, **text, **FIXED}


def _unknown_fields(fields: Mapping[str, Any]) -> list[str]:
  known = {**VISION, **TEXT, **FIXED}
  problems = []
  for name in fields:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      problems.append(f"unknown field {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
  act = fields.get("text_hidden_act", "gelu")
  if act != "gelu":
    problems.append(f"text_hidden_act: expected 'gelu', found {act!r}")
  return problems


def _vision_layers(value: Any) -> int | tuple[int, ...] | None:
  """A ViT's number of layers, a ResNet's four, or None; the original writes those as a string."""
  if isinstance(value, str):
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      return None
  if isinstance(value, list | tuple) and len(value) == 4:
    return tuple(value)
  return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
