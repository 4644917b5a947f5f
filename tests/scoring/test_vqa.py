"""VQA's answers and score."""

import pytest

from ofa_jax.scoring import vqa


def test_answers_have_confidences():
  said = vqa.confidences("0.3|!+2&&0.9|!+red and white&&0.9|!+red&&0.6|!+2")
  assert said == {"2": 0.6, "red and white": 0.9, "red": 0.9}
  assert vqa.best(said) == "red and white"  # the first of equal ones
  assert vqa.confidences(" ") == {}


@pytest.mark.parametrize("text", ["no", "much|!+no", "inf|!+no", "-1|!+no", "1|!+", "1|!+a&&"])
def test_what_is_no_answer_is_told(text):
  with pytest.raises(ValueError, match="expected answers as confidence"):
    vqa.confidences(text)


def test_the_score_is_the_mean_confidence():
  references = [{"no": 0.6}, {"tennis racket": 1.0, "frisbee": 0.3}, {"2": 0.3}]
  assert vqa.score(["no", "frisbee", "3"], references) == pytest.approx(0.3)
