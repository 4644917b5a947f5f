"""Rows of several clients are computed together, and none of them costs another its answer."""

import threading
import time
from concurrent.futures import wait

import pytest

from ofa_jax.serving.batcher import Batcher, Closed, Full, Late, worthwhile

NEVER = float("inf")


class Doubling:
  """Doubles numbers; remembers batches; waits at "slow" until it is let go; fails at negatives."""

  def __init__(self):
    self.batches, self.go, self.begun = [], threading.Event(), threading.Event()

  def __call__(self, key, rows):
    self.batches.append((key, list(rows)))
    self.begun.set()
    if key == "slow":
      self.go.wait(20)
    if min(rows) < 0:
      raise ValueError(f"negative: {min(rows)}")
    return [2 * row for row in rows]


@pytest.fixture
def double():
  run = Doubling()
  yield run
  run.go.set()


def blocked(run, **options):
  """A batcher whose thread is busy, so that what comes now waits."""
  batcher = Batcher(run, **({"most": 4, "wait": 0.0, "room": 100} | options))
  batcher.submit("slow", [0], deadline=NEVER)
  run.begun.wait(20)
  return batcher


def test_rows_that_wait_are_computed_together_and_come_back_in_order(double):
  batcher = blocked(double)
  futures = [batcher.submit("a", [i, 10 * i], deadline=NEVER) for i in range(5)]
  other = batcher.submit("b", [7], deadline=NEVER)
  assert batcher.waiting == 11
  double.go.set()
  assert [f.result(20) for f in futures] == [[2 * i, 20 * i] for i in range(5)]
  assert other.result(20) == [14]
  sizes = [(key, len(rows)) for key, rows in double.batches]
  assert sizes == [("slow", 1), ("a", 4), ("a", 4), ("a", 2), ("b", 1)]
  assert batcher.waiting == 0


def test_the_first_row_waits_for_others_and_not_longer():
  run = Doubling()
  batcher = Batcher(run, most=3, wait=30.0, room=10)
  futures = [batcher.submit("a", [i], deadline=NEVER) for i in range(3)]
  assert [f.result(20) for f in futures] == [[0], [2], [4]]  # a whole batch waits for nobody
  batcher = Batcher(run, most=3, wait=0.05, room=10)
  begin = time.monotonic()
  assert batcher.submit("a", [5], deadline=NEVER).result(20) == [10]
  assert time.monotonic() - begin >= 0.05
  assert [len(rows) for _, rows in run.batches] == [3, 1]


def test_a_batch_is_not_mostly_padding(double):
  assert [worthwhile(n) for n in range(1, 13)] == [1, 2, 3, 4, 4, 6, 7, 8, 8, 8, 8, 12]
  batcher = blocked(double, most=16)
  future = batcher.submit("a", list(range(9)), deadline=NEVER)
  double.go.set()
  assert future.result(20) == list(range(0, 18, 2))
  assert [len(rows) for _, rows in double.batches] == [1, 8, 1]


def test_the_kind_that_waits_longest_comes_first(double):
  batcher = blocked(double, most=2)
  first = batcher.submit("a", [1], deadline=NEVER)
  later = batcher.submit("b", [2, 3, 4, 5], deadline=NEVER)
  double.go.set()
  wait([first, later], 20)
  assert [key for key, _ in double.batches] == ["slow", "a", "b", "b"]


def test_no_more_rows_wait_than_there_is_room_for(double):
  batcher = blocked(double, room=3)
  kept = batcher.submit("a", [1, 2], deadline=NEVER)
  with pytest.raises(Full, match="2 rows are waiting, and there is room for 3"):
    batcher.submit("a", [3, 4], deadline=NEVER)
  batcher.submit("a", [3], deadline=NEVER)
  assert batcher.submit("a", [], deadline=NEVER).result(0) == []
  double.go.set()
  assert kept.result(20) == [2, 4]


def test_what_nobody_waits_for_is_not_computed(double):
  batcher = blocked(double)
  gone = batcher.submit("a", [1], deadline=NEVER)
  late = batcher.submit("a", [2], deadline=time.monotonic() - 1)
  kept = batcher.submit("a", [3], deadline=NEVER)
  assert gone.cancel()
  double.go.set()
  assert kept.result(20) == [6]
  with pytest.raises(Late):
    late.result(20)
  assert double.batches[1:] == [("a", [3])]


def test_a_fault_is_told_to_the_one_whose_it_is(double):
  batcher = blocked(double)
  good, bad, fine = (batcher.submit("a", [i], deadline=NEVER) for i in (1, -1, 2))
  double.go.set()
  assert (good.result(20), fine.result(20)) == ([2], [4])
  with pytest.raises(ValueError, match="negative: -1"):
    bad.result(20)
  assert batcher.alive and batcher.submit("a", [4], deadline=NEVER).result(20) == [8]


def test_closing_finishes_what_is_there_and_takes_no_more(double):
  batcher = blocked(double)
  left = batcher.submit("a", [1], deadline=NEVER)
  assert not batcher.close(within=0.01)
  with pytest.raises(Closed):
    batcher.submit("a", [1], deadline=NEVER)
  double.go.set()
  assert batcher.close(within=20) and not batcher.alive
  assert left.result(0) == [2]
