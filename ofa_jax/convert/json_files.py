"""JSON objects out of files that may be anybody's: bounded, and one line on what is wrong."""

import json
import math
import pathlib
from typing import Any, NoReturn

from ofa_jax import storage, text_files
from ofa_jax.convert import file_kinds

MAX_BYTES = 8 << 20  # far more than any description of a model


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no regular file, too large, no UTF-8, no JSON, no object; or it has NaN, an
      infinite number, a key twice, or is nested too deep. The message names the file.
  """
  if not storage.exists(path):
    raise FileNotFoundError(path)
  try:
    bucket = storage.in_bucket(path)
    size = storage.stat(path).size if bucket else file_kinds.require_regular(path)
    if size > MAX_BYTES:
      raise ValueError(f"{size:,} bytes, more than the {MAX_BYTES:,} of any description")
    with storage.opened(path) as file:
      return parse(file.read(MAX_BYTES))
  except (ValueError, OSError) as error:
    raise ValueError(f"{path}: expected a JSON object, found {error}") from error


def parse(data: bytes) -> dict[str, Any]:
  """The object of JSON text in UTF-8, with or without a byte order mark; errors as `read`."""
  kind = text_files.in_place_of(data)
  if kind:
    raise ValueError(kind)
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"bytes that are not UTF-8 ({error.reason} at {error.start})") from error
  try:
    content = json.loads(
      text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique
    )
  except RecursionError as error:
    raise ValueError("a value nested too deep") from error
  if not isinstance(content, dict):
    raise ValueError(f"{type(content).__name__}")
  return content


def _no_constant(name: str) -> NoReturn:
  raise ValueError(f"the number {name}, which is no JSON")


def _finite(text: str) -> float:
  if not math.isfinite(number := float(text)):
    raise ValueError(f"the number {text[:20]}, which is too large")
  return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  content = dict(pairs)
  if len(content) != len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"the key {twice[:80]!r} twice")
  return content
