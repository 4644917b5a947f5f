import json
import pathlib
import sys

import numpy as np
import pytest

from ofa_jax.scoring import rouge

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/ofa/scoring"
COCO = json.loads((GOLDEN / "coco_caption.json").read_text())  # pycocoevalcap 1.2's scores
CASES = json.loads((GOLDEN / "rouge.json").read_text())


def test_captions_equal_coco_caption():
  scores = rouge.rouge_l(COCO["hypotheses"], COCO["references"])
  np.testing.assert_allclose(scores, COCO["rouge_l"], rtol=1e-12)
  assert rouge.rouge_l([], []).shape == (0,)
  with pytest.raises(ValueError, match="each of 1 hypotheses, found 2"):
    rouge.rouge_l(["a"], [["a"], ["b"]])


@pytest.mark.parametrize(
  ("stem", "key"), [(False, "per_sample_P_R_F"), (True, "per_sample_stemmer")]
)
def test_summaries_equal_the_original(stem, key):
  scores = rouge.summary_scores(CASES["preds"], CASES["refs"], stem=stem)
  assert tuple(scores) == rouge.KINDS
  for kind in rouge.KINDS:
    np.testing.assert_allclose(scores[kind], CASES[key][kind], rtol=1e-12)


def test_bootstrap_equals_the_original_and_leaves_the_generator_alone():
  scores = rouge.summary_scores(CASES["preds"], CASES["refs"])
  np.random.seed(5)
  expected = np.random.random(3)
  np.random.seed(5)
  middle = rouge.bootstrap(scores)
  np.testing.assert_array_equal(np.random.random(3), expected)
  for kind in rouge.KINDS:
    np.testing.assert_allclose(middle[kind], CASES["bootstrap_seed0_mid"][kind], rtol=1e-12)
    assert scores[kind][:, 2].mean() == pytest.approx(CASES["mean_F"][kind])


def test_the_missing_package_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, "rouge_score", None)
  with pytest.raises(ImportError, match=r"pip install rouge-score"):
    rouge.summary_scores(["a"], ["a"])
