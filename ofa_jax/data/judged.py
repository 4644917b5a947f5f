"""Pictures as those want them who judge them, each in its own size and colours."""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from ofa_jax.data import given, images
from ofa_jax.data.protocols import Images
from ofa_jax.data.tsv import BadRow

SIDE = 299  # of Inception's pictures in pixels

Prepare = Callable[[Image.Image], np.ndarray]


def for_ofa_fid(image: Image.Image) -> np.ndarray:
  """uint8[299, 299, 3] as OFA's scripts have it: squashed by Pillow, bilinear, antialiased."""
  return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def for_pytorch_fid(image: Image.Image) -> np.ndarray:
  """float32[299, 299, 3] from 0 to 1, as pytorch-fid's network makes it of a picture of any size.

  Bilinear without antialiasing, PyTorch's `interpolate` with its default corners.
  """
  pixels = np.asarray(image.convert("RGB"), np.float32) / np.float32(255)
  for axis in (0, 1):
    old = pixels.shape[axis]
    if old == SIDE:
      continue
    at = np.maximum((np.arange(SIDE) + 0.5) * old / SIDE - 0.5, 0)
    first = np.minimum(at.astype(int), old - 1)
    second = np.minimum(first + 1, old - 1)
    share = np.float32(at - first).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
    low, high = (pixels.take(index, axis) for index in (first, second))
    pixels = (1 - share) * low + share * high
  return pixels


FOR_FID: Mapping[str, Prepare] = {  # by the variant of Inception
  "torchvision": for_ofa_fid,
  "pytorch_fid": for_pytorch_fid,
}


def no_picture(variant: str) -> np.ndarray:
  """An array as `FOR_FID` makes it, of nothing."""
  return np.zeros((SIDE, SIDE, 3), np.uint8 if variant == "torchvision" else np.float32)


class JudgedRows:
  """Pictures of any form of storage, made ready for several judges.

  Args:
    pictures: encoded.
    prepare: by the judge's name, what makes its array of a picture, all of one shape.
    blanks: an array of each.
  """

  def __init__(
    self, pictures: Images, *, prepare: Mapping[str, Prepare], blanks: Mapping[str, np.ndarray]
  ):
    self.notes = ()
    self._pictures, self._prepare, self._blanks = pictures, dict(prepare), dict(blanks)

  def __len__(self) -> int:
    return len(self._pictures)

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """An array for each judge. Raises BadRow when the picture cannot be read."""
    del rng
    encoded = self._pictures.encoded(i)
    try:
      with images.opened(encoded, formats=given.FORMATS) as image:
        image.load()
        return {name: prepare(image) for name, prepare in self._prepare.items()}
    except images.BadImage as error:
      raise BadRow(self._pictures.name(i), str(error)) from error

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch where a row is bad."""
    return dict(self._blanks)

  def close(self) -> None:
    """Nothing is cached."""


def captions_in(pictures: Images) -> list[str | None]:
  """The captions that PNG files carry in their metadata, under "caption"; None where there is none.

  That is where `ofa_jax.generate --task=image` writes them.
  """
  captions = []
  for i in range(len(pictures)):
    try:
      with images.opened(pictures.encoded(i), formats=given.FORMATS) as image:
        text = image.info.get("caption")
    except (images.BadImage, BadRow):
      text = None
    captions.append(str(text) if text else None)
  return captions
