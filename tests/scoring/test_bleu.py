import json
import pathlib

import numpy as np
import pytest

from ofa_jax.scoring.bleu import bleu

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/ofa/scoring"
CASES = json.loads((GOLDEN / "coco_caption.json").read_text())  # pycocoevalcap 1.2's scores


def test_equals_coco_caption():
  hypotheses, references = CASES["hypotheses"], CASES["references"]
  np.testing.assert_allclose(bleu(hypotheses, references), CASES["bleu"], rtol=1e-12)
  short = bleu(hypotheses[1::3], references[1::3])
  np.testing.assert_allclose(short, CASES["bleu_of_every_third"], rtol=1e-12)


def test_known_values():
  np.testing.assert_allclose(bleu(["a b c d"], [["x", "a b c d"]]), 1.0, rtol=1e-6)
  assert bleu(["a a a"], [["a b c"]])[0] == pytest.approx(1 / 3)  # clipped
  # Four of the nearest length, the shorter of 2 and 4, of a hypothesis of three: no penalty.
  assert bleu(["a b c"], [["a b", "a b c d"]])[0] == pytest.approx(1.0)
  assert bleu(["a b"], [["a b c d"]])[0] == pytest.approx(np.exp(1 - 2))
  np.testing.assert_allclose(bleu([""], [["a"]]), 0.0, atol=1e-12)


def test_groups_must_fit():
  with pytest.raises(ValueError, match="found 2 hypotheses and 1 groups"):
    bleu(["a", "b"], [["a"]])
  with pytest.raises(ValueError, match="found 0 hypotheses"):
    bleu([], [])
