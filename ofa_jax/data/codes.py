"""Image codes as texts: whole numbers, spaces between them, row by row of a square."""

from collections.abc import Sequence

import numpy as np

from ofa_jax.text_files import shown

_DIGITS = 18  # of numbers that int64 holds whatever they are


def parse(text: str, *, count: int, num_codes: int) -> np.ndarray:
  """The codes int32[count] of a text.

  Raises:
    ValueError: another number of them, or something that is no code.
  """
  words = text.split()
  if len(words) != count:
    raise ValueError(
      f"expected {count} codes, one for each cell of the picture, found {len(words)}"
    )
  try:
    codes = np.array(words, np.int64)
  except (ValueError, OverflowError):
    other = next(x for x in words if not x.isascii() or not x.isdecimal() or len(x) > _DIGITS)
    raise ValueError(
      f"expected codes from 0 to {num_codes - 1}, found {shown(other, 20)}"
    ) from None
  wrong = codes[(codes < 0) | (codes >= num_codes)]
  if len(wrong):
    raise ValueError(
      f"expected codes from 0 to {num_codes - 1}, found {len(wrong)} others, first {wrong[0]}"
    )
  return codes.astype(np.int32)


def written(codes: Sequence[int]) -> str:
  """Codes as a text."""
  return " ".join(str(int(code)) for code in codes)
