"""Metrics of zero-shot classification: Chinese-CLIP's top-1 and those of the ELEVATER benchmark.

The original prints plain top-1 for every data set. The official figures of six data sets use
another metric (Li et al. 2022, "ELEVATER"), computed here as its toolkit does.
"""

from collections.abc import Callable

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]


def metric_for(dataset: str) -> Metric:
  """Returns the official metric of a data set of ELEVATER, by its name; `top1` for all others."""
  match dataset:
    case (
      "caltech-101" | "fgvc-aircraft-2013b-variants102" | "oxford-flower-102" | "oxford-iiit-pets"
    ):
      return mean_per_class
    case "voc-2007-classification":
      return mean_average_precision
    case "hateful-memes":
      return roc_auc
    case _:
      return top1


def top1(scores: np.ndarray, labels: np.ndarray) -> float:
  """Returns the share of examples whose highest score is the label's, in 0..1.

  Args:
    scores: float[N, C].
    labels: int[N], the classes.

  Raises:
    ValueError: shapes or labels do not fit.
  """
  _check(scores, labels)
  return float(np.mean(np.argmax(scores, axis=1) == labels))


def top_k(scores: np.ndarray, labels: np.ndarray, *, k: int) -> float:
  """Returns the share of examples whose label is among the k highest scores, in 0..1.

  Equal scores keep the classes' order; what is NaN stands before the label.

  Args:
    scores: float[N, C].
    labels: int[N], the classes.
    k: at least 1.

  Raises:
    ValueError: shapes or labels do not fit.
  """
  _check(scores, labels)
  scores, labels = np.asarray(scores), np.asarray(labels)
  own = np.take_along_axis(scores, labels[:, None], axis=1)
  earlier = np.arange(scores.shape[1]) < labels[:, None]
  before = ~(scores <= own) | ((scores == own) & earlier)
  return float(np.mean(before.sum(axis=1) < k))


def mean_per_class(scores: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean of the classes' own top-1; classes without examples are left out.

  Args and raises: as `top1`.
  """
  _check(scores, labels)
  right = np.bincount(labels, weights=np.argmax(scores, axis=1) == labels)
  total = np.bincount(labels)
  return float(np.mean(right[total > 0] / total[total > 0]))


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
  """Returns the 11-point interpolated average precision of VOC 2007, mean over the classes.

  As in the toolkit, the curve ends at recall 0 with precision 1, whatever the scores.

  Args:
    scores: float[N, C].
    labels: bool[N, C], an example may belong to several classes.

  Raises:
    ValueError: shapes do not fit.
  """
  from sklearn.metrics import precision_recall_curve  # slow to import, and rarely needed

  if np.shape(scores) != np.shape(labels) or np.ndim(scores) != 2:
    raise ValueError(
      "expected scores and labels, both [N, C] (an example may belong to several classes), "
      f"found {list(np.shape(scores))} and {list(np.shape(labels))}"
    )
  precisions = []
  for score, label in zip(np.transpose(scores), np.transpose(labels), strict=True):
    precision, recall, _ = precision_recall_curve(label, score)
    precisions += [precision[recall >= level].max() for level in np.linspace(1, 0, 11)]
  return float(np.mean(precisions))


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
  """Returns the area under the ROC curve of the second of two classes.

  Args:
    scores: float[N, 2].
    labels: int[N], 0 or 1, both present.

  Raises:
    ValueError: shapes or labels do not fit.
  """
  from sklearn.metrics import roc_auc_score  # slow to import, and rarely needed

  _check(scores, labels)
  if np.shape(scores)[1] != 2 or len(np.unique(labels)) != 2:
    raise ValueError(
      "ROC-AUC needs scores [N, 2] and labels of both classes, "
      f"found scores {list(np.shape(scores))} and labels {np.unique(labels).tolist()}"
    )
  return float(roc_auc_score(labels, np.asarray(scores)[:, 1]))


def _check(scores: np.ndarray, labels: np.ndarray) -> None:
  if np.ndim(scores) != 2 or np.shape(labels) != np.shape(scores)[:1] or not len(labels):
    raise ValueError(
      "expected scores [N, C] and labels [N] with N > 0, "
      f"found {list(np.shape(scores))} and {list(np.shape(labels))}"
    )
  classes = np.shape(scores)[1]
  if np.min(labels) < 0 or np.max(labels) >= classes:
    raise ValueError(
      f"expected labels in 0..{classes - 1}, found {np.min(labels)}..{np.max(labels)}: "
      "are there as many class names as class folders?"
    )
