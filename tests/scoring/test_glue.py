from ofa_jax.scoring.glue import Counts, accuracy, count


def test_counts_and_what_is_made_of_them():
  answers = ["yes", "yes", "no", "no", "yes", "no"]
  labels = ["yes", "no", "no", "yes", "yes", "no"]
  assert accuracy(answers, labels) == 4 / 6
  counts = count(answers, labels, positive="yes")
  assert counts == Counts(2, 1, 1, 2)
  assert counts.f1 == 4 / 6
  assert counts.matthews == (2 * 2 - 1 * 1) / 9
  assert count(labels, labels, positive="no").matthews == 1.0
  opposite = ["no" if label == "yes" else "yes" for label in labels]
  assert count(opposite, labels, positive="yes").matthews == -1.0


def test_what_is_undefined_is_said_to_be():
  assert count(["no", "no"], ["yes", "no"], positive="yes").matthews is None
  assert count(["no", "yes"], ["no", "no"], positive="yes").matthews is None
  assert count(["no", "no"], ["no", "no"], positive="yes").f1 is None
  assert count(["no", "no"], ["yes", "no"], positive="yes").f1 == 0.0
