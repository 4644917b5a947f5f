"""What features of pictures say of all of them: Frechet inception distance and inception score.

The distance (arXiv 1706.08500) is between two normal distributions with the means and covariances
of features. Of a set of pictures it needs sums only, which hosts can add up (`Moments`). Features
of torchvision's Inception give OFA's own number, those of pytorch-fid's the one of papers
(`ofa_jax.models.inception`); neither may be compared with the other.
"""

import dataclasses
import os
import warnings
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.special

from ofa_jax import files, storage

OFFSET = 1e-6  # on the diagonals where the product has no finite root, as in the original
_IMAGINARY = 1e-3  # of the root's diagonal, above which the original gives up


class Statistics(NamedTuple):
  """Mean float64[D] and covariance float64[D, D] of features."""

  mean: np.ndarray
  covariance: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Sums over pictures: how many, their features float64[D], the products of these float64[D, D].

  Those of parts add up to those of the whole: `a + b`.
  """

  count: int
  total: np.ndarray
  products: np.ndarray

  @classmethod
  def of(cls, features: np.ndarray) -> "Moments":
    """The sums of features float[N, D]; ValueError for another shape."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
      raise ValueError(f"Expected features [N, D], found {list(features.shape)}")
    return cls(len(features), features.sum(0), features.T @ features)

  def __add__(self, other: "Moments") -> "Moments":
    if self.total.shape != other.total.shape:
      raise ValueError(
        f"Expected features of one width, found {len(self.total)} and {len(other.total)}"
      )
    return Moments(
      self.count + other.count, self.total + other.total, self.products + other.products
    )

  @property
  def statistics(self) -> Statistics:
    """Mean and unbiased covariance; ValueError of fewer than two pictures, or of broken ones."""
    if self.count < 2:
      raise ValueError(f"Expected at least two pictures for a covariance, found {self.count}")
    mean = self.total / self.count
    covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
      raise ValueError("Expected finite features, found some that are not; check the model")
    return Statistics(mean, covariance)


def load(path: str | os.PathLike) -> Statistics:
  """Reads reference statistics: an npz file with `mu` [D] and `sigma` [D, D].

  Raises:
    ValueError: no such file, or other arrays in it.
  """
  try:
    with storage.opened(path) as file, np.load(file) as arrays:
      mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
  except FileNotFoundError as error:
    raise ValueError(f"{path}: expected reference statistics (.npz), found no file") from error
  except Exception as error:  # a file that is anybody's: of zip, of NumPy, of a dtype
    raise ValueError(
      f"{path}: expected an .npz with the arrays mu and sigma, found {type(error).__name__}: "
      f"{error!s:.200}"
    ) from error
  if mean.ndim != 1 or covariance.shape != mean.shape * 2:
    raise ValueError(
      f"{path}: expected mu [D] and sigma [D, D], found {list(mean.shape)} and "
      f"{list(covariance.shape)}"
    )
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise ValueError(f"{path}: expected finite statistics, found some that are not")
  return Statistics(mean, covariance)


def save(path: str | os.PathLike, statistics: Statistics) -> None:
  """Writes statistics as `load` and the originals' scripts read them."""
  with files.written_whole(path, replace=True) as made, open(made, "wb") as file:
    np.savez(file, mu=statistics.mean, sigma=statistics.covariance)


def frechet_distance(real: Statistics, fake: Statistics) -> float:
  """The distance of two sets of pictures, as the originals' scripts compute it.

  Args:
    real, fake: of features of one width; scalars stand for a width of 1.

  Raises:
    ValueError: the widths differ, or the root of the covariances' product is not real.
  """
  (mu1, sigma1), (mu2, sigma2) = (
    (np.atleast_1d(np.asarray(mean, np.float64)), np.atleast_2d(np.asarray(cov, np.float64)))
    for mean, cov in (real, fake)
  )
  if not mu1.shape * 2 == mu2.shape * 2 == sigma1.shape == sigma2.shape:
    raise ValueError(
      f"Expected statistics of one width, found mean {list(mu1.shape)} with covariance "
      f"{list(sigma1.shape)} and mean {list(mu2.shape)} with {list(sigma2.shape)}; they are of "
      "features of different models or blocks"
    )
  root = _root(sigma1 @ sigma2)
  if not np.isfinite(root).all():
    offset = OFFSET * np.eye(len(sigma1))
    root = _root((sigma1 + offset) @ (sigma2 + offset))
  if np.iscomplexobj(root):
    imaginary = np.abs(np.diagonal(root).imag).max()
    if not imaginary <= _IMAGINARY:
      raise ValueError(
        f"Expected covariances whose product has a real root, found an imaginary part of "
        f"{imaginary:.3g}; there are too few pictures, or the statistics are damaged"
      )
    root = root.real
  difference = mu1 - mu2
  return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root))


def inception_score(probabilities: np.ndarray, *, splits: int = 1) -> tuple[float, float]:
  """How sure a classifier is of a picture, and how different pictures are (arXiv 1606.03498).

  Args:
    probabilities: float[N, C] of the classes of every picture.
    splits: parts of N // splits pictures that are scored apart; the last N % splits pictures are
      left out, as in the original.

  Returns:
    The mean of the parts' scores, and their standard deviation.

  Raises:
    ValueError: fewer pictures than parts.
  """
  probabilities = np.asarray(probabilities, np.float64)
  size = len(probabilities) // splits
  if probabilities.ndim != 2 or not size:
    raise ValueError(
      f"Expected probabilities [N, C] of at least {splits} pictures, found "
      f"{list(probabilities.shape)}"
    )
  scores = []
  for start in range(0, size * splits, size):
    part = probabilities[start : start + size]
    part = part / part.sum(1, keepdims=True)
    marginal = part.mean(0)
    marginal = marginal / marginal.sum()
    scores.append(np.exp(scipy.special.rel_entr(part, marginal).sum(1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def _root(matrix: np.ndarray) -> np.ndarray:
  """The matrix square root; not finite where there is none."""
  with np.errstate(all="ignore"), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of singular matrices, whose results are looked at
    return scipy.linalg.sqrtm(matrix)
