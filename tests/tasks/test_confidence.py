import jax.numpy as jnp
import numpy as np

from ofa_jax.decode.beam import Hypotheses
from ofa_jax.tasks import confidence, glue, vqa

NONE = [np.nan] * 4


def test_names_say_the_task_and_how_answers_are_found():
  assert confidence.name_of(vqa.ANSWERING, chosen=False) == "vqa/generated"
  assert confidence.name_of(glue.answering("rte"), chosen=True) == "rte/chosen"


def test_chosen_answers_have_the_softmax_of_all_candidates():
  scores = np.array([[-1.0, -3.0, -0.5, -np.inf], [-2.0, -2.0, -2.0, -np.inf]], np.float32)
  found = np.exp(confidence.of_choices(jnp.asarray(scores), temperatures=(1.0, 2.0)))
  weights = [np.exp(scores / t) for t in (1, 2)]
  expected = np.stack([w.max(axis=1) / w.sum(axis=1) for w in weights], axis=1)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_generated_answers_have_the_probability_of_their_tokens():
  positional = np.array([[[-0.1, -0.2, 0.0], [-1.0, 0.0, 0.0]]], np.float32)
  hypotheses = Hypotheses(
    tokens=np.zeros((1, 2, 3), np.int32),
    lengths=np.array([[2, 0]]),
    scores=np.array([[-0.15, -np.inf]]),  # divided by lengths, which a probability is not
    positional_scores=positional,
  )
  logs = np.asarray(confidence.log_probabilities(hypotheses))
  np.testing.assert_allclose(logs, [[-0.3, -np.inf]], rtol=1e-6)
  found = confidence.probabilities(logs[0], temperatures=(1.0, 2.0))
  np.testing.assert_allclose(found, [[np.exp(-0.3), np.exp(-0.15)], [0, 0]], rtol=1e-6)
  assert confidence.probabilities(np.array([1e-7]), temperatures=(1.0,)) == 1


def test_boxes_that_are_nearly_the_same_are_one():
  boxes = np.array(
    [
      [0, 0, 10, 10],
      [50, 50, 60, 60],
      NONE,
      [0, 0, 10, 9],  # overlaps with the first by 0.9
      [50, 50, 60, 60],  # the very same as the second: a sample that was drawn twice
      [8, 0, 18, 10],  # overlaps with the first by a tenth
    ],
    np.float32,
  )
  logs = np.log([0.3, 0.25, 0.2, 0.1, 0.25, 0.05])
  (first, a), (second, b), (third, c) = confidence.merged(boxes, logs)
  assert (first, second, third) == (0, 1, 5)
  np.testing.assert_allclose(np.exp([a, b, c]), [0.4, 0.25, 0.05])
  assert [place for place, _ in confidence.merged(boxes, logs, overlap=0.05)] == [0, 1]
  assert confidence.merged(np.array([NONE, NONE]), logs[:2]) == []
  assert confidence.merged(np.zeros((0, 4)), np.zeros(0)) == []
  flat = np.array([[1, 1, 1, 5], [1, 1, 1, 5], [2, 2, 2, 2]], np.float32)  # without an area
  assert [place for place, _ in confidence.merged(flat, logs[:3])] == [0, 2]
