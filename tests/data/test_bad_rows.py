"""How many rows may be unreadable: the same rule for 12 rows and for 10^8."""

import numpy as np
import pytest

from ofa_jax.data.bad_rows import BadRows, Pass, TooManyBadRows
from ofa_jax.data.pipeline import eval_batches, train_batches
from ofa_jax.data.tsv import BadRow


class Rows:
  notes = ()

  def __init__(self, count, bad):
    self._count, self._bad = count, frozenset(bad)

  def __len__(self):
    return self._count

  def example(self, i, rng):
    if i in self._bad:
      raise BadRow(f"a.tsv:{i}", "made bad")
    return {"x": np.int32(i)}

  def blank(self):
    return {"x": np.int32(-1)}

  def close(self):
    pass


def seen_before_the_end(rows, *, rate=0.01, batch_size=4, steps=10**4, **options):
  """Rows of the steps given before the run was stopped, and the message; None: it was not."""
  told, given, lines = None, 0, []
  bad = BadRows(rate, lines.append)
  try:
    with train_batches(
      rows, batch_size=batch_size, seed=0, start=0, bad=bad, workers=1, prefetch=1, **options
    ) as batches:
      for _ in range(steps):
        next(batches)
        given += batch_size
  except TooManyBadRows as error:
    told = str(error)
  return given, told, lines


@pytest.mark.parametrize(
  ("count", "bad"), [(12, 8), (40, 2), (40, 1), (4, 4), (999, 10), (1000, 11), (3000, 31)]
)
def test_training_is_stopped_within_the_first_pass_and_a_batch(count, bad):
  rows = Rows(count, range(0, count, count // bad)[:bad])
  given, told, lines = seen_before_the_end(rows)
  assert given <= count + 4 * 8
  if bad <= 10:  # more are not waited for
    assert f"found {bad} among all {count}" in told
    assert len(lines) == bad  # each is named before
  else:
    assert "found 11 among" in told


@pytest.mark.parametrize(("count", "bad"), [(100, 1), (200, 2), (1000, 10), (12, 0)])
def test_a_share_that_is_allowed_never_stops_a_run(count, bad):
  rows = Rows(count, range(bad))
  given, told, lines = seen_before_the_end(rows, steps=5 * count // 4)
  assert told is None
  assert given >= 5 * count - 4
  assert len(lines) == bad


def test_what_several_hosts_see_is_judged_by_the_whole():
  rows = Rows(40, [3, 7])
  for host in range(4):
    _, told, _ = seen_before_the_end(rows, rate=0.05, steps=80, host=host, hosts=4)
    assert told is None
  stopped = [
    seen_before_the_end(Rows(40, range(20)), steps=80, host=host, hosts=4)[1] for host in range(4)
  ]
  assert all(stopped)


def pass_over(rows, *, rate=0.01, batch_size=4, **options):
  bad = BadRows(rate, (lines := []).append)
  try:
    with eval_batches(rows, batch_size=batch_size, bad=bad, **options) as batches:
      list(batches)
  except TooManyBadRows as error:
    return str(error), lines
  return None, lines


@pytest.mark.parametrize(("count", "bad"), [(12, 8), (12, 1), (9, 9), (1, 1), (99, 1)])
def test_an_evaluation_names_all_and_stops_at_its_end(count, bad):
  told, lines = pass_over(Rows(count, range(bad)))
  assert f"found {bad} among all {count}: a.tsv:0: made bad" in told
  assert len(lines) == bad
  told, others = pass_over(Rows(count, range(bad)), rate=1.0)
  assert told is None and sorted(others) == sorted(lines)
  assert pass_over(Rows(100, [5]))[0] is None


def test_an_evaluation_on_several_hosts_is_stopped_by_the_one_that_sees_too_many():
  told = [pass_over(Rows(13, range(4)), host=h, hosts=2)[0] for h in range(2)]
  assert any(told)


def test_large_sets_are_stopped_long_before_their_end():
  bad = BadRows(0.01)
  whole = Pass(10**8, 10**8)
  with pytest.raises(TooManyBadRows, match="found 11 among 11"):
    bad.add([BadRow(str(i), "x") for i in range(11)], seen=11, rows=range(11), whole=whole)
  bad = BadRows(0.01)
  for i in range(100):  # one in a thousand: never
    bad.add([BadRow(str(i), "x")], seen=1000, rows=[i], whole=whole)


def test_what_a_run_before_met_counts():
  whole = Pass(6, 6)
  for carried, stops in ((0, False), (1, True)):
    bad = BadRows(0.1)
    bad.carry(carried, seen=6)
    faults = {"seen": 6, "rows": [3], "whole": whole}
    if stops:
      with pytest.raises(TooManyBadRows, match="found 2 among all 12"):
        bad.add([BadRow("a", "x")], **faults)
    else:
      bad.add([BadRow("a", "x")], **faults)


def test_reasons_are_those_of_the_very_row():
  bad = BadRows(1.0)
  bad.add([BadRow("a.tsv:10", "broken base64"), BadRow("a.tsv:1", "truncated")], seen=2)
  assert bad.reasons["a.tsv:1"] == "truncated"
  assert bad.names == ["a.tsv:10: broken base64", "a.tsv:1: truncated"]


def test_rows_that_were_told_are_not_told_again():
  known, lines = set(), []
  for _ in range(2):
    bad = BadRows(1.0, lines.append, known=known)
    bad.add([BadRow("a", "x")], seen=1)
    assert bad.count == 1 and bad.reasons == {"a": "x"}
  assert lines == ["Skipped a bad row: a: x"]
