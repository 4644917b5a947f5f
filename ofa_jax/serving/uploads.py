"""Pictures as clients send them: bytes of an image file, checked and made ready for a model."""

from collections.abc import Callable

import numpy as np
import pybase64
from PIL import Image

from ofa_jax.data import images
from ofa_jax.serving.limits import Limits, Refused
from ofa_jax.text_files import shown


def encoded(upload: bytes | str, number: int) -> bytes:
  """The bytes of an image file, of an uploaded file or of its base64.

  Raises:
    Refused: no base64. Addresses and paths are none, and are never followed.
  """
  if isinstance(upload, bytes):
    return upload
  text = upload
  if text.startswith("data:image/"):
    text = text.partition(",")[2]
  try:
    return pybase64.b64decode(text, validate=True)
  except ValueError:
    found = (
      f"Expected an image file in base64 as number {number} of images, found "
      f"{shown(upload, 40)!r}. Pictures are sent, and never fetched from an address or a path."
    )
    raise Refused(422, found, reason="image") from None


def ready(
  data: bytes, number: int, *, make: Callable[[Image.Image], np.ndarray], limits: Limits
) -> tuple[np.ndarray, tuple[int, int]]:
  """Decodes a picture and makes it ready; returns its pixels, and its width and height before.

  Args:
    data: the image file.
    number: of the picture in its request, for messages.
    make: `picture -> pixels`, as the model takes them.
    limits: of its size.

  Raises:
    Refused: no JPEG, PNG, WebP, GIF or BMP file, a damaged one, or too many pixels.
  """
  pixels = None
  try:
    with images.opened(data) as image:  # reads the header
      width, height = image.size
      if width * height <= limits.pixels:
        pixels = make(image)
  except images.BadImage as error:
    text = f"Expected an image file as number {number} of images, found: {shown(str(error), 300)}"
    raise Refused(422, text, reason="image") from None
  if pixels is None:
    text = (
      f"Expected at most {limits.pixels:,} pixels of a picture, found {width} x {height} in number "
      f"{number} of images. Send it smaller."
    )
    raise Refused(422, text, reason="pixels")
  return pixels, (width, height)
