"""What is read of a flag's text: numbers, texts and lists of config fields, and paths."""

import ast
import dataclasses
import os
import re
from typing import Any

from absl import flags
from ml_collections.config_flags import tuple_parser


class Number(flags.ArgumentParser):
  """A number, or None where the field may be that (`validation.validate` says where not)."""

  def __init__(self, parser: flags.ArgumentParser):
    super().__init__()
    self._parser = parser

  def parse(self, argument):
    return None if argument in ("None", "none") else self._parser.parse(argument)

  def flag_type(self):
    return self._parser.flag_type()


class Share(flags.FloatParser):
  """A number from 0 to 1."""

  syntactic_help = "a number from 0 to 1"

  def convert(self, argument):
    share = super().convert(argument)
    if not 0 <= share <= 1:  # NaN among others
      raise ValueError(f"expected a share between 0 and 1, found {share}")
    return share


class Text(flags.ArgumentParser):
  """A text, or None."""

  def parse(self, argument):
    return None if argument in ("None", "none") else argument


class Tuple(tuple_parser.TupleParser):
  """A Python literal, or texts as they are, with commas between them (but for those in {a,b})."""

  def parse(self, argument):
    if isinstance(argument, list):  # of a flag that was given once or more
      return tuple(part for text in argument for part in self.parse(text))
    if not isinstance(argument, str):
      return super().parse(argument)
    try:
      value = ast.literal_eval(argument)
    except (ValueError, SyntaxError):
      return tuple(part.strip() for part in re.split(r",(?![^{]*\})", argument))
    return value if isinstance(value, tuple) else (value,)


OF_FIELDS = {
  int: Number(flags.IntegerParser()),
  float: Number(flags.FloatParser()),
  str: Text(),
  tuple: Tuple(),
}


class Path(flags.ArgumentParser):
  """Expands ~, which shells leave where it does not begin a word."""

  syntactic_help = "a path"

  def parse(self, argument: str) -> str:
    return expand(argument)

  def flag_type(self) -> str:
    return "path"


class Paths(flags.ListParser):
  """A list of such paths."""

  def parse(self, argument: str | list[str]) -> list[str]:
    return [expand(path) for path in super().parse(argument)]


def expand(path: str) -> str:
  """The path with its ~ replaced by the home directory.

  Raises:
    ValueError: there is none.
  """
  if not path.startswith("~"):
    return path
  expanded = os.path.expanduser(path)
  if expanded.startswith("~") and not os.path.lexists(path):
    raise ValueError(
      f"Expected a home directory for the ~ of {path}, found none. Set HOME, or write the path out."
    )
  return expanded


def expand_in(value: Any) -> Any:
  """Replaces the ~ of the paths in a config, in place."""
  if isinstance(value, str) and value.startswith("~/"):
    return expand(value)
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      old = getattr(value, field.name)
      new = expand_in(old)
      if new is not old:
        object.__setattr__(value, field.name, new)
  elif type(value) in (tuple, list):
    new = type(value)(expand_in(part) for part in value)
    return new if any(a is not b for a, b in zip(new, value, strict=True)) else value
  return value
