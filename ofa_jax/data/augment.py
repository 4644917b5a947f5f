"""The training augmentation of the original: a random crop, a mirror, and AutoAugment.

Chinese-CLIP's `--use-augment` is timm's transform: a random 90-100 % of the area at an aspect of
3/4 to 4/3, resized to a square, mirrored at random, then one of AutoAugment's 25 ImageNet policies
(arXiv 1805.09501, table 9) as timm's "original" reads them: fixed magnitudes, and geometry filled
with the mean colour. Images are squashed to squares first, here and in the decode cache: the crop
is taken out of that square, where the original takes it out of the photograph.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ofa_jax.data.images import CLIP_MEAN

AUGMENT = ("none", "crop", "auto")
AREA = (0.9, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10
FILL = tuple(round(255 * c) for c in CLIP_MEAN)

Policy = tuple[tuple[str, float, int], ...]  # operation, probability, magnitude 0 to 10

# The operation's second argument is the magnitude, the third is 1 or -1 at random.
OPERATIONS: dict[str, Callable[[Image.Image, int, int], Image.Image]] = {
  "autocontrast": lambda image, m, sign: ImageOps.autocontrast(image),
  "equalize": lambda image, m, sign: ImageOps.equalize(image),
  "invert": lambda image, m, sign: ImageOps.invert(image),
  "posterize": lambda image, m, sign: ImageOps.posterize(image, int(m / 10 * 4) + 4),
  "solarize": lambda image, m, sign: ImageOps.solarize(image, int(m / 10 * 256)),
  "color": lambda image, m, sign: ImageEnhance.Color(image).enhance(m / 10 * 1.8 + 0.1),
  "contrast": lambda image, m, sign: ImageEnhance.Contrast(image).enhance(m / 10 * 1.8 + 0.1),
  "sharpness": lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(m / 10 * 1.8 + 0.1),
  "rotate": lambda image, m, sign: image.rotate(
    sign * m / 10 * 30, resample=Image.Resampling.BICUBIC, fillcolor=FILL
  ),
  "shear_x": lambda image, m, sign: image.transform(
    image.size,
    Image.Transform.AFFINE,
    (1, sign * m / 10 * 0.3, 0, 0, 1, 0),
    resample=Image.Resampling.BICUBIC,
    fillcolor=FILL,
  ),
}

POLICIES: tuple[Policy, ...] = (
  (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
  (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
  (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
  (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
  (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
  (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
  (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
  (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
  (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
  (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
  (("rotate", 0.8, 8), ("color", 0.4, 0)),
  (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
  (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
  (("invert", 0.6, 0), ("equalize", 1.0, 0)),
  (("color", 0.6, 4), ("contrast", 1.0, 8)),
  (("rotate", 0.8, 8), ("color", 1.0, 2)),
  (("color", 0.8, 8), ("solarize", 0.8, 7)),
  (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
  (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
  (("color", 0.4, 0), ("equalize", 0.6, 0)),
  (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
  (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
  (("invert", 0.6, 0), ("equalize", 1.0, 0)),
  (("color", 0.6, 4), ("contrast", 1.0, 8)),
  (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)


def auto_augment(image: np.ndarray, rng: np.random.Generator, *, size: int) -> np.ndarray:
  """Crop, mirror and one policy.

  Args:
    image: uint8[S, S, 3], as stored or just decoded.
    rng: the example's own generator.
    size: side of the result in pixels.

  Returns:
    uint8[size, size, 3].
  """
  box = random_box(image.shape[1], image.shape[0], rng)
  picture = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
  if rng.random() < 0.5:
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(apply_policy(picture, POLICIES[rng.integers(len(POLICIES))], rng))


def random_box(
  width: int,
  height: int,
  rng: np.random.Generator,
  *,
  shares: tuple[float, float] = AREA,
) -> tuple[int, int, int, int]:
  """(left, upper, right, lower) of a random crop; after `TRIES` that do not fit, a central one.

  Args:
    width, height: of the picture.
    rng: the example's own generator.
    shares: the least and the most of the picture's area.
  """
  for _ in range(TRIES):
    area = rng.uniform(*shares) * width * height
    aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if w <= width and h <= height:
      left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return left, upper, left + w, upper + h
  w = min(width, round(height * ASPECT[1]))
  h = min(height, round(width / ASPECT[0]))
  left, upper = (width - w) // 2, (height - h) // 2
  return left, upper, left + w, upper + h


def apply_policy(image: Image.Image, policy: Policy, rng: np.random.Generator) -> Image.Image:
  """Both operations of a policy, each with its probability."""
  for name, probability, magnitude in policy:
    if probability < 1 and rng.random() > probability:
      continue
    image = OPERATIONS[name](image, magnitude, 1 if rng.random() < 0.5 else -1)
  return image
