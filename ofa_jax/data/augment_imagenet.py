"""The augmentation of OFA's ImageNet recipe.

A crop of 8 to 100 % of the picture's area, mirrored in half of the cases; two operations of timm's
RandAugment (arXiv 1909.13719) as "rand-m9-mstd0.5-inc1" reads them: each in half of the cases, its
magnitude drawn around 9 of 10, "increasing" ones the stronger the greater it is; two more of OFA's
own (`data/random_augment.py`); and in a quarter of the cases a box of noise. The noise is normal
after the colours were taken out of the pixels, and so is drawn where that happens; here is its box.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ofa_jax.data.augment import random_box
from ofa_jax.data.images import IMAGENET_MEAN
from ofa_jax.data.random_augment import random_augment

CROP_SHARES = (0.08, 1.0)
ERASED_SHARES = (0.02, 1 / 3)
ERASED_ASPECTS = (0.3, 1 / 0.3)
ERASE = 0.25
TRIES = 10
MAGNITUDE, MAGNITUDE_STD, GREATEST = 9, 0.5, 10
FILL = tuple(round(255 * c) for c in IMAGENET_MEAN)

ENHANCERS = {
  "ColorIncreasing": ImageEnhance.Color,
  "ContrastIncreasing": ImageEnhance.Contrast,
  "BrightnessIncreasing": ImageEnhance.Brightness,
  "SharpnessIncreasing": ImageEnhance.Sharpness,
}
NAMES = (
  "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing",
  "SolarizeAdd", *ENHANCERS, "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
SIGNED = ("Rotate", *ENHANCERS, "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def augment(
  image: Image.Image, rng: np.random.Generator, *, size: int, repaired: bool = False
) -> np.ndarray:
  """All but the noise.

  Args:
    image: the stored picture in RGB.
    rng: the example's own generator.
    size: side of the result in pixels.
    repaired: see `random_augment.random_augment`.

  Returns:
    uint8[size, size, 3].
  """
  box = random_box(*image.size, rng, shares=CROP_SHARES)
  image = cropped(image, box, size=size, mirrored=rng.random() < 0.5)
  return random_augment(np.asarray(rand_augment(image, rng)), rng, repaired=repaired)


def cropped(
  image: Image.Image, box: tuple[int, int, int, int], *, size: int, mirrored: bool
) -> Image.Image:
  """A box (left, upper, right, lower) of a picture, squashed to a square."""
  image = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
  return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def rand_augment(image: Image.Image, rng: np.random.Generator, *, num: int = 2) -> Image.Image:
  """Draws `num` of timm's operations, one perhaps twice, and does each in half of the cases."""
  for place in rng.integers(len(NAMES), size=num):
    if rng.random() <= 0.5:
      magnitude = min(max(rng.normal(MAGNITUDE, MAGNITUDE_STD), 0.0), GREATEST)
      name, sign = NAMES[place], -1 if rng.random() > 0.5 else 1
      image = OPERATIONS[name](image, *arguments(name, magnitude, sign))
  return image


def arguments(name: str, magnitude: float, sign: int = 1) -> tuple[float, ...]:
  """What one of timm's operations is called with at a magnitude from 0 to `GREATEST`."""
  part = magnitude / GREATEST
  if name in ENHANCERS:
    return (max(0.1, 1 + sign * part * 0.9),)
  return {
    "Rotate": (sign * part * 30,),
    "PosterizeIncreasing": (4 - int(part * 4),),
    "SolarizeIncreasing": (256 - min(256, int(part * 256)),),
    "SolarizeAdd": (min(128, int(part * 110)),),
    "ShearX": (sign * part * 0.3,),
    "ShearY": (sign * part * 0.3,),
    "TranslateXRel": (sign * part * 0.45,),
    "TranslateYRel": (sign * part * 0.45,),
  }.get(name, ())


def erased_box(size: int, rng: np.random.Generator) -> np.ndarray:
  """int32[4]: top, left, height, width of the noise in a square; nothing in most cases."""
  if rng.random() > ERASE:
    return np.zeros(4, np.int32)
  for _ in range(TRIES):
    area = rng.uniform(*ERASED_SHARES) * size * size
    aspect = math.exp(rng.uniform(*map(math.log, ERASED_ASPECTS)))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if height < size and width < size:
      top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
      return np.array([top, left, height, width], np.int32)
  return np.zeros(4, np.int32)


def _posterized(image, bits):
  # With no bits left older versions of Pillow gave black, which is what timm's users have learnt
  # with; newer ones refuse.
  return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def _solarize_added(image, added):
  table = [min(255, i + added) if i < 128 else i for i in range(256)]
  return image.point(table * 3)


def _affine(image, matrix):
  return image.transform(
    image.size,
    Image.Transform.AFFINE,
    matrix,
    resample=Image.Resampling.BICUBIC,
    fillcolor=FILL,
  )


OPERATIONS: dict[str, Callable[..., Image.Image]] = {
  "AutoContrast": ImageOps.autocontrast,
  "Equalize": ImageOps.equalize,
  "Invert": ImageOps.invert,
  "Rotate": lambda image, degrees: image.rotate(
    degrees, resample=Image.Resampling.BICUBIC, fillcolor=FILL
  ),
  "PosterizeIncreasing": _posterized,
  "SolarizeIncreasing": ImageOps.solarize,
  "SolarizeAdd": _solarize_added,
  **{name: lambda image, x, of=of: of(image).enhance(x) for name, of in ENHANCERS.items()},
  "ShearX": lambda image, part: _affine(image, (1, part, 0, 0, 1, 0)),
  "ShearY": lambda image, part: _affine(image, (1, 0, 0, part, 1, 0)),
  "TranslateXRel": lambda image, part: _affine(image, (1, 0, part * image.width, 0, 1, 0)),
  "TranslateYRel": lambda image, part: _affine(image, (1, 0, 0, 0, 1, part * image.height)),
}
