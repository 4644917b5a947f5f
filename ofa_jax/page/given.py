"""What a person gave the page: checked, and told in one sentence if it will not do."""

import os
import pathlib

from PIL import Image, ImageOps

from ofa_jax.data import images
from ofa_jax.data.given import FORMATS
from ofa_jax.page.words import Words

MAX_LETTERS = 20_000  # of a text; the models read a thousand words at most


class Fault(ValueError):  # noqa: N818 (of the person's, not of the program's)
  """What is shown in the page, a sentence."""


def picture(upload: str | os.PathLike | None, *, words: Words) -> Image.Image:
  """The picture of an uploaded file, turned as its camera says.

  Raises:
    Fault: there is none, or it cannot be read, or it has too many pixels.
  """
  if upload is None:
    raise Fault(words.no_picture)
  try:
    with images.opened(pathlib.Path(upload).read_bytes(), formats=FORMATS) as image:
      return ImageOps.exif_transpose(image)
  except images.TooLarge as error:
    raise Fault(words.too_large.format(error.pixels, images.MAX_PIXELS)) from error
  except (images.BadImage, OSError) as error:
    raise Fault(words.bad_picture) from error


def text(value: str | None, *, called: str, words: Words) -> str:
  """A text with words in it; Fault for an empty or an endless one."""
  value = (value or "").strip()
  if not value:
    raise Fault(words.no_text.format(called))
  return _of_some_length(value, called, words)


def perhaps(value: str | None, *, called: str, words: Words) -> str | None:
  """A text, or None where there is none."""
  return text(value, called=called, words=words) if (value or "").strip() else None


def lines(value: str | None, *, called: str, words: Words) -> list[str]:
  """The different lines with words in them; Fault where there is none."""
  value = _of_some_length(value or "", called, words)
  found = dict.fromkeys(line.strip() for line in value.splitlines() if line.strip())
  if not found:
    raise Fault(words.no_lines.format(called))
  return list(found)


def _of_some_length(value: str, called: str, words: Words) -> str:
  if len(value) > MAX_LETTERS:
    raise Fault(words.too_long.format(called, MAX_LETTERS, len(value)))
  return value
