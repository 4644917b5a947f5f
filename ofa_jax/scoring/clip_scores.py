"""What a CLIP's features say of drawn pictures: CLIPSIM and CMMD.

CMMD (arXiv 2401.09603) is the maximum mean discrepancy between the features of two sets of
pictures, by a Gaussian kernel. It assumes no distribution, and is unbiased from a handful of
pictures on, where a Frechet distance is far too large.
"""

from collections.abc import Iterator

import numpy as np

SIGMA = 10.0  # of the kernel, for features of unit length (the paper, section 4)
SCALE = 1000.0  # by which its numbers are readable
_ROWS = 1024  # of the kernel's matrix that stand in memory at once


def cmmd(real: np.ndarray, fake: np.ndarray, *, unbiased: bool = True) -> float:
  """The squared discrepancy of two sets of pictures, times 1000.

  Args:
    real, fake: float[N, E] and float[M, E], features of a CLIP's image tower, of any length; the
      paper's are of ViT-L/14@336px.
    unbiased: leave out what compares a picture with itself; the result may then be below 0. False:
      as the paper's published code computes it.

  Raises:
    ValueError: the widths differ, or fewer than two pictures on a side.
  """
  real, fake = _unit(real), _unit(fake)
  if real.shape[1] != fake.shape[1]:
    raise ValueError(
      f"Expected features of one CLIP, found widths {real.shape[1]} and {fake.shape[1]}"
    )
  least = 2 if unbiased else 1
  if min(len(real), len(fake)) < least:
    raise ValueError(
      f"Expected at least {least} pictures on each side, found {len(real)} and {len(fake)}"
    )
  within = []
  for x in (real, fake):
    total = sum(kernel.sum() for kernel in _kernels(x, x))
    number = len(x)
    within.append((total - number) / (number * (number - 1)) if unbiased else total / number**2)
  between = sum(kernel.sum() for kernel in _kernels(real, fake)) / (len(real) * len(fake))
  return float(SCALE * (sum(within) - 2 * between))


def clipsim(image_features: np.ndarray, text_features: np.ndarray) -> float:
  """The mean cosine between pictures and their captions; papers often write it times 100.

  Args:
    image_features, text_features: float[N, E], of any length, row by row of one picture.

  Raises:
    ValueError: no rows, or different shapes.
  """
  if np.shape(image_features) != np.shape(text_features) or not len(image_features):
    raise ValueError(
      f"Expected features of as many pictures as captions, found {list(np.shape(image_features))} "
      f"and {list(np.shape(text_features))}"
    )
  return float((_unit(image_features) * _unit(text_features)).sum(1).mean())


def _unit(features: np.ndarray) -> np.ndarray:
  """Features of unit length, float64[N, E]."""
  features = np.asarray(features, np.float64)
  if features.ndim != 2:
    raise ValueError(f"Expected features [N, E], found {list(features.shape)}")
  return features / np.linalg.norm(features, axis=1, keepdims=True)


def _kernels(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
  """The kernel between all rows of both, some rows of x at a time."""
  for start in range(0, len(x), _ROWS):
    # Of unit length: |a - b|^2 = 2 - 2 a b.
    yield np.exp((x[start : start + _ROWS] @ y.T - 1) / SIGMA**2)
