"""Boxes as OFA says them: four numbered bins."""

import numpy as np

BOX_SIZE = 512  # pixels that the bins divide, whatever the image's size: --max-image-size


def from_bins(bins: np.ndarray, *, num_bins: int, scale: np.ndarray) -> np.ndarray:
  """Returns boxes float32[..., 4] = x0, y0, x1, y1 in pixels of the image before it was resized.

  Args:
    bins: int[..., 4], from 0 to num_bins - 1.
    num_bins: into how many `BOX_SIZE` is divided.
    scale: float[..., 2], width and height before, divided by those after resizing.
  """
  boxes = bins.astype(np.float32) / (num_bins - 1) * BOX_SIZE
  return boxes * np.concatenate([scale, scale], axis=-1).astype(np.float32)
