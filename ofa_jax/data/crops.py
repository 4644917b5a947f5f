"""Pictures of OFA's pretraining: resized, cropped, and the boxes that move with them.

Sizes, places and boxes are computed in the precision of the original, so that a pixel or a bin is
never the next one.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ofa_jax.data.draws import Draws

GREATEST = 480  # of the sides that pictures are resized to
LONGEST = 672  # a longer side is cut to it, whatever becomes of the aspect
JITTER = (1.0, 1.5)  # how much larger than its crop a picture is made

Box = np.ndarray  # float32[..., 4] = x0, y0, x1, y1 in pixels


def resized(image: Image.Image, draws: Draws, *, side: int) -> Image.Image:
  """A picture whose shorter side is drawn, from `side` to 480 pixels."""
  short = draws.choice(range(side, max(side, GREATEST) + 1))
  width, height = image.size
  if min(width, height) != short:
    if width < height:
      width, height = short, int(short * height / width)
    else:
      width, height = int(short * width / height), short
  size = min(width, LONGEST), min(height, LONGEST)
  return image.resize(size, Image.Resampling.BICUBIC)


def central(image: Image.Image, *, side: int) -> Image.Image:
  """The middle of a picture that is not smaller."""
  left, top = (round((length - side) / 2.0) for length in image.size)
  return image.crop((left, top, left + side, top + side))


def around(image: Image.Image, box: Box, draws: Draws, *, side: int) -> tuple[Image.Image, Box]:
  """A picture resized and cropped as far around a box's middle as it reaches.

  Args:
    image: whole.
    box: float32[4].
    draws: of the size.
    side: of the crop.

  Returns:
    The crop, and the box in it, float32[4], which ends at its edges.
  """
  scaled = resized(image, draws, side=side)
  box = box * np.float32([*_ratios(scaled.size, image.size)] * 2)
  x0, y0, x1, y1 = map(float, box)
  left, top = (
    max(middle - side / 2 + min(length - middle - side / 2, 0), 0)
    for middle, length in zip(((x0 + x1) / 2, (y0 + y1) / 2), scaled.size, strict=True)
  )
  return scaled.crop((left, top, left + side, top + side)), _inside(box, left, top, side=side)


def jittered(
  image: Image.Image, boxes: Box, draws: Draws, *, side: int
) -> tuple[Image.Image, Box, np.ndarray]:
  """A picture perhaps mirrored, made larger than `side` and cropped anywhere.

  Args:
    image: whole.
    boxes: float32[N, 4].
    draws: of all three.
    side: of the crop.

  Returns:
    The crop, the boxes float32[M, 4] that are not outside of it, and their numbers int[M].
  """
  if draws.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width = np.float32(image.size[0])
    boxes = boxes[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1]) + np.float32([width, 0, width, 0])
  low, high = JITTER
  size = np.array(image.size[::-1], np.float32)  # height, width
  target = np.round(
    (draws.uniform(1) * np.float32(high - low) + np.float32(low)) * np.float32(side)
  )
  whole = np.round(size * np.max(target / size)).astype(np.int32)
  scaled = image.resize((int(whole[1]), int(whole[0])), Image.Resampling.BICUBIC)
  ratios = (whole / size)[::-1].astype(np.float32)
  offset = np.floor((whole - side).astype(np.float32) * draws.uniform(2)).astype(np.int32)
  top, left = map(int, offset)
  boxes = _inside(boxes * np.tile(ratios, 2), left, top, side=side)
  kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
  return scaled.crop((left, top, left + side, top + side)), boxes[kept], kept


def _ratios(size: Sequence[int], before: Sequence[int]) -> tuple[float, float]:
  return size[0] / before[0], size[1] / before[1]


def _inside(boxes: Box, left: float, top: float, *, side: int) -> Box:
  """Boxes in the pixels of a crop, which they end with."""
  moved = boxes - np.float32([left, top, left, top])
  return np.minimum(moved, np.float32(side)).clip(min=0)
