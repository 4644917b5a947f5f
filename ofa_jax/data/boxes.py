"""Boxes as OFA says them: four numbered bins; as its files have them: x0,y0,x1,y1 in pixels."""

import numpy as np

BOX_SIZE = 512  # pixels that the bins divide, whatever the image's size: --max-image-size
SLACK = 0.0005  # of a side: what a rounded box may reach over, half of one of a thousand bins


def read(text: str, *, size: tuple[int, int], clip: bool = False) -> np.ndarray:
  """Reads a box "x0,y0,x1,y1".

  Args:
    text: four numbers in pixels of the picture.
    size: width and height of the picture, from where on a box is outside.
    clip: whether a box that reaches over the edge ends there, and is no fault.

  Returns:
    float32[4].

  Raises:
    ValueError: there are not four finite numbers, they enclose nothing, or reach outside.
  """
  parts = text.strip().split(",")
  try:
    box = np.array([float(part) for part in parts], np.float32)
  except ValueError:
    box = np.full(len(parts), np.nan, np.float32)
  if box.shape != (4,) or not np.isfinite(box).all():
    raise ValueError(f"expected a box x0,y0,x1,y1 of four numbers, found {text[:60]!r}")
  edges = np.tile(np.array(size, np.float32), 2)
  whole = np.clip(box, 0, edges)
  if clip:
    box = whole
  if (box[2:] <= box[:2]).any():
    raise ValueError(f"expected a box with x0 < x1 and y0 < y1, found {text!r}, which has no area")
  if (np.abs(box - whole) > SLACK * edges).any():
    width, height = size
    raise ValueError(
      f"the box {text!r} reaches outside of the picture of {width} x {height} pixels"
    )
  return box


def to_bins(
  boxes: np.ndarray, *, num_bins: int, scale: np.ndarray, box_size: int = BOX_SIZE
) -> np.ndarray:
  """Returns the bins int32[..., 4] of boxes; halves go to the even one, as in the original.

  Args:
    boxes: float32[..., 4] = x0, y0, x1, y1 in pixels of the image before it is resized.
    num_bins: into how many `box_size` is divided.
    scale: float32[..., 2], width and height after, divided by those before resizing.
    box_size: pixels.
  """
  moved = boxes * np.concatenate([scale, scale], axis=-1).astype(np.float32)
  bins = np.round(moved / np.float32(box_size) * np.float32(num_bins - 1))
  return bins.astype(np.int32)


def from_bins(
  bins: np.ndarray, *, num_bins: int, scale: np.ndarray, box_size: int = BOX_SIZE
) -> np.ndarray:
  """Returns boxes float32[..., 4] = x0, y0, x1, y1 in pixels of the image before it was resized.

  Args:
    bins: int[..., 4], from 0 to num_bins - 1.
    num_bins: into how many `box_size` is divided.
    scale: float[..., 2], width and height before, divided by those after resizing.
    box_size: pixels.
  """
  boxes = bins.astype(np.float32) / (num_bins - 1) * box_size
  return boxes * np.concatenate([scale, scale], axis=-1).astype(np.float32)


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Intersection over union float32[N] of boxes float32[N, 4]; 0 where they do not meet, or NaN."""
  low, high = np.maximum(boxes[:, :2], others[:, :2]), np.minimum(boxes[:, 2:], others[:, 2:])
  sides = high - low
  common = sides[:, 0] * sides[:, 1]
  areas = [np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (boxes, others)]
  ratio = common / (areas[0] + areas[1] - common + np.float32(1e-6))
  return np.where((sides > 0).all(axis=1), ratio, np.float32(0))


def hits(boxes: np.ndarray, others: np.ndarray, *, threshold: float = 0.5) -> np.ndarray:
  """bool[N]: where boxes float32[N, 4] overlap by the threshold at least: accuracy's numerator."""
  return overlaps(boxes, others) >= threshold
