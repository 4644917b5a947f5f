"""Pictures as people hand them over: files, Pillow images, arrays of several kinds.

What can be meant in one way only is made a Pillow image; anything else is one line that says what
is expected. Arrays of other libraries (a PyTorch tensor, a JAX array) are read by NumPy's own
protocol, so that none of them is imported.
"""

import os
from typing import TypeAlias

import numpy as np
from PIL import Image

from ofa_jax import storage
from ofa_jax.data import images
from ofa_jax.files import at_home
from ofa_jax.text_files import shown

FORMATS = (*images.FORMATS, "TIFF", "AVIF", "PPM")  # of single files; none of them runs a program
Picture: TypeAlias = Image.Image | np.ndarray | str | os.PathLike | bytes

EXPECTED = (
  "a picture: a path, a Pillow image, or an array of one picture, [h, w, 3] or [3, h, w], uint8 "
  "from 0 to 255 or floats from 0 to 1, in RGB"
)


def picture(value: object) -> Image.Image:
  """The picture that somebody hands over.

  Args:
    value: a path of an image file, its bytes, a Pillow image; or an array [h, w], [h, w, 1 or 3 or
      4] or [1 or 3 or 4, h, w] of uint8, of other whole numbers from 0 to 255, or of floats from 0
      to 1, in RGB (OpenCV gives BGR: `array[..., ::-1]`).

  Returns:
    A Pillow image, in its own mode.

  Raises:
    ValueError: something else, or a file that cannot be decoded.
  """
  if isinstance(value, Image.Image):
    return value
  if isinstance(value, str | os.PathLike):
    return _file(value)
  if isinstance(value, bytes | bytearray):
    return _decoded(bytes(value), "these bytes")
  return Image.fromarray(_pixels(as_array(value)))


def as_array(value: object) -> np.ndarray:
  """The numbers of an array of any library; ValueError for what is none.

  Raises:
    ValueError: it is no array, or one that NumPy cannot read where it is.
  """
  if not hasattr(value, "__array__"):
    raise ValueError(f"Expected {EXPECTED}; found {type(value).__name__}: {shown(value, 40)}")
  try:
    return np.asarray(value)
  except Exception as error:  # of a tensor on a GPU, in bfloat16 or with a gradient
    raise ValueError(
      f"Expected {EXPECTED}; found {type(value).__name__}, which NumPy cannot read: "
      f"{shown(str(error), 120)} (x.detach().float().cpu() can be read)"
    ) from error


def _file(path: str | os.PathLike) -> Image.Image:
  name = shown(os.fspath(path), 300)
  if name.startswith(("http://", "https://")):
    raise ValueError(f"Expected a file, found an address: {name}. Download the picture first.")
  try:
    data = storage.read_bytes(at_home(path))
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    reason = getattr(error, "strerror", None) or str(error)
    raise ValueError(f"Expected an image in {name}, found: {reason}") from error
  return _decoded(data, name)


def _decoded(data: bytes, name: str) -> Image.Image:
  try:
    with images.opened(data, formats=FORMATS) as image:
      image.load()
      return image
  except images.BadImage as error:
    raise ValueError(f"Expected an image in {name}, found: {shown(str(error), 300)}") from error


def _pixels(array: np.ndarray) -> np.ndarray:
  """uint8[h, w] or [h, w, 3 or 4] of an array of one picture."""
  what = f"{array.dtype}{list(array.shape)}"
  if array.ndim == 4:
    raise ValueError(f"Expected {EXPECTED}; found {array.ndim} axes, {what}: one at a time, x[0]")
  if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
    array = np.moveaxis(array, 0, 2)
  if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in _RGB):
    raise ValueError(f"Expected {EXPECTED}; found {what}")
  if array.shape[0] * array.shape[1] > images.MAX_PIXELS:
    raise ValueError(f"Expected at most {images.MAX_PIXELS:,} pixels, found {what}")
  if array.ndim == 3 and array.shape[2] == 1:
    array = array[:, :, 0]
  return np.ascontiguousarray(_bytes(array, what))


_RGB = (1, 3, 4)  # grey, RGB, RGB with alpha


def _bytes(array: np.ndarray, what: str) -> np.ndarray:
  if array.dtype == np.uint8:
    return array
  if array.dtype.kind not in "iuf":
    raise ValueError(f"Expected {EXPECTED}; found {what}")
  low, high = array.min(), array.max()
  inside = bool(low >= 0 and high <= (1 if array.dtype.kind == "f" else 255))  # False for NaN
  if array.dtype.kind == "f" and inside:
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
  if inside or (low >= 0 and high <= 255 and (array == np.floor(array)).all()):
    return array.astype(np.uint8)
  raise ValueError(f"Expected {EXPECTED}; found {what} from {low} to {high}")
