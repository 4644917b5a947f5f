import json
import pathlib

import numpy as np
import pytest

from ofa_jax.scoring import zeroshot

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/cnclip/zeroshot/vit"


# Images per class and the printed top-1 of the original's runs.
@pytest.mark.parametrize(
  ("dataset", "per_class", "expected"),
  [
    ("cifar-10", [3] * 4, 0.16666666666666666),
    ("country211", [2] * 3, 0.3333333333333333),
    ("eurosat_clip", [2] * 5, 0.3),
    ("oxford-flower-102", [1] * 12, 0.08333333333333333),
  ],
)
def test_top1_equals_the_original(dataset, per_class, expected):
  scores = np.array(json.loads((GOLDEN / f"{dataset}.json").read_text())["predictions"][0])
  labels = np.repeat(np.arange(len(per_class)), per_class)
  assert zeroshot.top1(scores, labels) == expected
  assert zeroshot.mean_per_class(scores, labels) == pytest.approx(expected)  # even classes


def test_top_k_equals_a_stable_sort_with_many_ties():
  rng = np.random.default_rng(0)
  scores, labels = rng.integers(0, 4, (200, 12)).astype(np.float32), rng.integers(0, 12, 200)
  order = np.argsort(-scores, axis=1, kind="stable")
  for k in (1, 5, 12):
    expected = np.mean((order[:, :k] == labels[:, None]).any(1))
    assert zeroshot.top_k(scores, labels, k=k) == expected
  assert zeroshot.top_k(scores, labels, k=1) == zeroshot.top1(scores, labels)
  assert zeroshot.top_k(np.full((3, 12), np.nan), np.zeros(3, int), k=5) == 0.0
  with pytest.raises(ValueError, match="labels in"):
    zeroshot.top_k(scores, labels + 1, k=5)


def test_mean_per_class_weighs_classes_and_not_examples():
  scores = np.eye(4)[[0, 0, 0, 1, 3]]
  labels = np.array([0, 0, 0, 0, 3])  # three of four, one of one; classes 1 and 2 have none
  assert zeroshot.top1(scores, labels) == 0.8
  assert zeroshot.mean_per_class(scores, labels) == 0.875


def test_mean_average_precision_by_hand():
  # Falling scores: right, wrong, right. Precision is 1 up to recall 1/2, then 2/3: levels
  # 0, 0.1, ..., 0.5 and 0.6, ..., 1.
  one = [0.9, 0.8, 0.7], [True, False, True]
  assert zeroshot.mean_average_precision(
    np.transpose([one[0]]), np.transpose([one[1]])
  ) == pytest.approx((6 + 5 * 2 / 3) / 11)
  # The worst order: precision 1/3 at all levels but recall 0, which counts as 1.
  worst = [0.9, 0.8, 0.7], [False, False, True]
  both = np.transpose([one[0], worst[0]]), np.transpose([one[1], worst[1]])
  assert zeroshot.mean_average_precision(*both) == pytest.approx(
    ((6 + 5 * 2 / 3) / 11 + (1 + 10 / 3) / 11) / 2
  )


def test_roc_auc_by_hand():
  second = np.array([0.1, 0.4, 0.35, 0.8, 0.4])
  scores = np.stack([1 - second, second], axis=1)
  # Of the six pairs 0.35 wins one (against 0.1) and 0.8 all three.
  assert zeroshot.roc_auc(scores, np.array([0, 0, 1, 1, 0])) == pytest.approx(4 / 6)


def test_metric_for():
  assert zeroshot.metric_for("fgvc-aircraft-2013b-variants102") is zeroshot.mean_per_class
  assert zeroshot.metric_for("oxford-iiit-pets") is zeroshot.mean_per_class
  assert zeroshot.metric_for("voc-2007-classification") is zeroshot.mean_average_precision
  assert zeroshot.metric_for("hateful-memes") is zeroshot.roc_auc
  assert zeroshot.metric_for("cifar-100") is zeroshot.top1


def test_what_does_not_fit():
  scores = np.eye(3)
  for metric in (zeroshot.top1, zeroshot.mean_per_class, zeroshot.roc_auc):
    with pytest.raises(ValueError, match=r"found \[3, 3\] and \[2\]"):
      metric(scores, np.array([0, 1]))
    with pytest.raises(ValueError, match=r"labels in 0\.\.2, found 1\.\.3: are there as many"):
      metric(scores, np.array([1, 2, 3]))
  with pytest.raises(ValueError, match="needs scores"):
    zeroshot.roc_auc(scores, np.array([0, 1, 1]))
  with pytest.raises(ValueError, match=r"labels of both classes.* \[1\]"):
    zeroshot.roc_auc(scores[:, :2], np.array([1, 1, 1]))
  with pytest.raises(ValueError, match=r"found \[3, 3\] and \[3\]"):
    zeroshot.mean_average_precision(scores, np.array([0, 1, 2]))
