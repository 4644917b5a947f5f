"""Texts and ids out of JSON, where anything may stand: what a person means, or why it is none."""

import math
import re

from ofa_jax.text_files import shown


def caption(value: object) -> str:
  """The caption that a JSON value is: a string, or a number as it is written.

  Raises:
    ValueError: no text; the message is the end of a sentence about the line.
  """
  if isinstance(value, str):
    return value
  if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
    return str(value)
  raise ValueError(f"the text is {_kind(value)}, not a string: {shown(value, 40)}")


def identifier(value: object, name: str) -> int | str:
  """The id that a JSON value is: an integer of any size, a string, or a float that is whole.

  Spreadsheets and data frames write 7.0 for 7 where another row has none.

  Args:
    value: out of JSON.
    name: of the field.

  Raises:
    ValueError: no id.
  """
  if isinstance(value, str):
    return value
  if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
    return int(value)
  if isinstance(value, int) and not isinstance(value, bool):
    return value
  raise ValueError(f"{name} is {_kind(value)}, not a whole number or string: {shown(value, 40)}")


def whole(value: object) -> int | None:
  """The integer that a JSON value is, a float that is whole among them; None: it is none."""
  try:
    number = identifier(value, "")
  except ValueError:
    return None
  return None if isinstance(number, str) else number


def is_integer(text: str) -> bool:
  """Whether an id is written as an integer."""
  return re.fullmatch("-?[0-9]+", text) is not None


def _kind(value: object) -> str:
  if isinstance(value, float):
    return "no number (NaN)" if math.isnan(value) else "a number that is not whole"
  names = {type(None): "missing (null)", bool: "true or false", list: "a list", dict: "an object"}
  return names.get(type(value), type(value).__name__)
