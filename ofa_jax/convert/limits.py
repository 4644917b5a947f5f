"""What sizes a model may have: far above any that exists, far below what would hang or fill memory.

Sizes come out of files that may be anybody's; they are checked before anything is built of them.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

C = TypeVar("C")
_LARGEST = 1 << 24
MAXIMA = {
  **dict.fromkeys(("layers", "encoder_layers", "decoder_layers"), 1000),
  # Blocks of a ResNet and a VQGAN, each of which is traced by itself, and a VQGAN's levels.
  **dict.fromkeys(("stages", "blocks", "attention"), 100),
  **dict.fromkeys(("multipliers",), 1 << 10),
  **dict.fromkeys(("heads", "head_width", "patch_size"), 1 << 13),
  **dict.fromkeys(("image_size", "code_image_size", "orig_patch_image_size"), 1 << 14),
  **dict.fromkeys(("width", "embed_dim", "adapter", "prompt_hidden", "hidden"), 1 << 17),
  **dict.fromkeys(("mlp", "max_positions", "context_length"), 1 << 19),
  **dict.fromkeys(("token_bucket_size", "image_bucket_size", "max_length"), 1 << 14),
  **dict.fromkeys(("encoder_prompt", "decoder_prompt", "images", "type_vocab"), 1 << 16),
  "num_beams": 1 << 10,
  "max_images": 2,
}
# Of tuples of any length by their type; the stages of a ViT are none.
_LENGTHS = {"stages": (3, 0), "multipliers": range(1, 13), "attention": range(13)}
_MAY_BE_ZERO = (
  *("num_codes", "num_bins", "pad", "adapter", "hidden", "prompt_hidden"),
  *("encoder_prompt", "decoder_prompt", "no_repeat_ngram_size", "min_length", "attention"),
)


def check(config: Any) -> Any:
  """Returns the config of a model, a dataclass, if every field has its type and a possible size.

  Raises:
    ValueError: all fields that have not.
  """
  problems = _problems(config, "")
  if problems:
    raise ValueError(f"expected the sizes of a model, found {'; '.join(problems[:10])}")
  return config


def from_json(kind: type[C], described: Mapping[str, Any], *, title: str) -> C:
  """Makes a config of its own fields, as `dataclasses.asdict` and JSON leave them.

  Args:
    kind: the class of the config, whose fields are numbers, texts and tuples of numbers.
    described: the fields, among others.
    title: of the model, for messages, with its article.

  Raises:
    ValueError: fields are missing or impossible.
  """
  try:
    fields = {field.name: described[field.name] for field in dataclasses.fields(kind)}
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return check(kind(**fields))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"config.json does not describe {title}: {error}") from error


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a file says besides the sizes, if its numbers are possible.

  Raises:
    ValueError: all values that are not.
  """
  problems = [
    problem for name, value in settings.items() for problem in _problems_of_setting(name, value)
  ]
  if problems:
    raise ValueError(f"expected the settings of a model, found {'; '.join(problems[:10])}")
  return dict(settings)


def section(described: Mapping[str, Any], name: str) -> dict[str, Any]:
  """The JSON object under a name, empty if there is none; ValueError if it is something else."""
  value = described.get(name)
  if value is not None and not isinstance(value, dict):
    raise ValueError(f"{name}: expected a JSON object, found {type(value).__name__}")
  return value or {}


def _problems(config: Any, prefix: str) -> list[str]:
  problems = []
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    name, value = f"{prefix}{field.name}", getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      problems += _problems(value, f"{name}.")
    else:
      problems += _problems_of(name, field.name, value, hints[field.name])
  return problems


def _problems_of(name: str, key: str, value: Any, hint: Any) -> list[str]:
  options = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
  if value is None and type(None) in options:
    return []
  if typing.get_origin(options[0]) is tuple:
    lengths = _LENGTHS.get(key) or (len(typing.get_args(options[0])),)
    if type(value) is not tuple or len(value) not in lengths:
      number = f"{lengths[0]} to {lengths[-1]}" if isinstance(lengths, range) else lengths[0]
      return [f"{name} {_shown(value)}, expected {number} numbers"]
    key = key if isinstance(lengths, range) else "stages"
    return [p for i, x in enumerate(value) for p in _problems_of(f"{name}[{i}]", key, x, int)]
  if options[0] is int:
    return _problems_of_number(name, key, value)
  if options[0] is float:
    number = type(value) in (int, float) and math.isfinite(value)
    rate = "dropout" in key or "drop_path" in key
    if not number or not -1e6 < value < 1e6 or (rate and not 0 <= value <= 1):
      return [f"{name} {_shown(value)}, expected {'a rate from 0 to 1' if rate else 'a number'}"]
  elif options[0] in (bool, str) and type(value) is not options[0]:
    return [f"{name} {_shown(value)}, expected {options[0].__name__}"]
  elif dataclasses.is_dataclass(options[0]):
    return [f"{name} {_shown(value)}, expected a JSON object"]
  return []


def _problems_of_number(name: str, key: str, value: Any) -> list[str]:
  least, most = int(key not in _MAY_BE_ZERO), MAXIMA.get(key, _LARGEST)
  if type(value) is not int or not least <= value <= most:
    return [f"{name} {_shown(value)}, expected a whole number from {least} to {most:,}"]
  return []


def _problems_of_setting(name: str, value: Any) -> list[str]:
  if name in ("context_length", "image_size", "num_beams", "max_length"):
    return _problems_of_number(name, name, value)
  if name == "generation":
    if not isinstance(value, Mapping):
      return [f"{name} {_shown(value)}, expected a JSON object"]
    return [problem for key, x in value.items() for problem in _problems_of_setting(key, x)]
  if isinstance(value, int | float) and not -1e6 < value < 1e6:
    return [f"{name} {_shown(value)}, expected a number"]
  return []


def _shown(value: Any) -> str:
  return type(value).__name__ if isinstance(value, list | dict | tuple) else f"{value!r:.40}"
