import collections
import itertools
import threading
import time

import numpy as np
import pytest

from ofa_jax.data.original_draws import epoch_of
from ofa_jax.data.pipeline import (
  BadRows,
  Mixture,
  TooManyBadRows,
  eval_batches,
  train_batches,
)
from ofa_jax.data.tsv import BadRow


class Numbers:
  """Rows that say who they are, some of them bad."""

  notes = ()

  def __init__(self, count, *, bad=(), first=0, delay=0.0):
    self.count, self.bad, self.first, self.delay = count, set(bad), first, delay

  def __len__(self):
    return self.count

  def example(self, i, rng):
    if self.delay:
      time.sleep(self.delay * (i % 3))
    if i in self.bad:
      raise BadRow(f"row {i}", "made so")
    draw = -1.0 if rng is None else rng.random()
    return {"row": np.int32(self.first + i), "draw": np.full(2, draw, np.float32)}

  def blank(self):
    return {"row": np.int32(0), "draw": np.zeros(2, np.float32)}

  def close(self):
    self.closed = True


def take(rows, steps, *, start=0, bad=None, seed=7, **options):
  bad = bad or BadRows(1.0)
  with train_batches(rows, seed=seed, start=start, bad=bad, **options) as batches:
    return list(itertools.islice(batches, steps))


def assert_equal(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      assert batch[key].dtype == other[key].dtype
      np.testing.assert_array_equal(batch[key], other[key])


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize(("count", "batch_size"), [(13, 4), (37, 12), (3, 8), (1, 4), (24, 8)])
def test_every_epoch_has_every_row_once(count, batch_size, hosts):
  epochs = 3
  steps = -(-count * epochs // batch_size)
  blocks = [
    take(Numbers(count), steps, batch_size=batch_size, host=host, hosts=hosts)
    for host in range(hosts)
  ]
  stream = [row for step in zip(*blocks, strict=True) for block in step for row in block["row"]]
  orders = [tuple(stream[e * count : (e + 1) * count]) for e in range(epochs)]
  for order in orders:
    assert sorted(order) == list(range(count))
  if count > 10:
    assert len({*orders, tuple(range(count))}) == epochs + 1  # shuffled, each time anew
  assert all(len(b["row"]) == batch_size // hosts for block in blocks for b in block)


@pytest.mark.parametrize("rows", [Numbers(37), Mixture([Numbers(5), Numbers(50)], [1, 2])])
def test_hosts_together_read_what_one_host_reads(rows):
  whole = take(rows, 9, batch_size=12)
  for hosts in (2, 3, 4):
    blocks = [take(rows, 9, batch_size=12, host=h, hosts=hosts) for h in range(hosts)]
    joined = [
      {key: np.concatenate([block[key] for block in step]) for key in step[0]}
      for step in zip(*blocks, strict=True)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("rows", [Numbers(37), Mixture([Numbers(5), Numbers(50)], [1, 2])])
def test_resume_gives_the_same_batches(rows):
  straight = take(rows, 12, batch_size=10)
  for start in (1, 3, 4, 11):
    assert_equal(take(rows, 12 - start, start=start, batch_size=10), straight[start:])


def test_workers_and_prefetch_change_nothing():
  rows = Numbers(40, bad=[3], delay=0.001)  # rows finish out of order
  reference = take(rows, 8, batch_size=24, workers=1)
  for workers, prefetch in ((2, 0), (7, 1), (None, 5)):
    assert_equal(take(rows, 8, batch_size=24, workers=workers, prefetch=prefetch), reference)


def test_seed_changes_order_and_draws_which_differ_between_epochs():
  first, second = (take(Numbers(16), 2, batch_size=16, seed=seed) for seed in (0, 1))
  assert not np.array_equal(first[0]["row"], second[0]["row"])
  draws = np.concatenate([batch["draw"][:, 0] for batch in first + second])
  assert len(set(draws.tolist())) == 64


class Epochs(Numbers):
  """Rows that say in which epoch they are read."""

  def example(self, i, rng):
    return {**super().example(i, rng), "draw": np.full(2, epoch_of(rng), np.float32)}


def test_a_rows_generator_tells_its_epoch():
  rows = {"pairs": Epochs(4), "text": Epochs(2)}
  batches = take(rows, 3, batch_size={"pairs": 4, "text": 4})
  for i, batch in enumerate(batches):
    assert batch["pairs"]["draw"][:, 0].tolist() == [i + 1] * 4
    assert batch["text"]["draw"][:, 0].tolist() == [2 * i + 1] * 2 + [2 * i + 2] * 2


def test_mixture_keeps_its_proportions_and_the_epochs_of_its_parts():
  parts = [Numbers(10), Numbers(1000, first=100)]
  mixture = Mixture(parts, [1.0, 3.0])
  assert len(mixture) == 1010
  rows = np.concatenate([b["row"] for b in take(mixture, 20, batch_size=100)])
  small, large = rows[rows < 100], rows[rows >= 100]
  assert (len(small), len(large)) == (500, 1500)
  for begin in range(0, 500, 10):
    assert sorted(small[begin : begin + 10]) == list(range(10))
  assert sorted(large[:1000]) == list(range(100, 1100))
  shares = [np.mean(rows[i : i + 100] < 100) for i in range(0, 2000, 100)]
  assert min(shares) > 0.05
  assert max(shares) < 0.5
  assert [mixture.example(i, None)["row"] for i in (9, 10)] == [9, 100]


class Pairs:
  """Rows of other fields."""

  notes = ()

  def __init__(self, count):
    self.count = count

  def __len__(self):
    return self.count

  def example(self, i, rng):
    return {"pair": np.full((2, 3), i, np.int64)}

  def blank(self):
    return {"pair": np.zeros((2, 3), np.int64)}

  def close(self):
    pass


STREAMS = {"numbers": Numbers(37), "pairs": Pairs(5), "more": Numbers(37)}
SIZES = {"numbers": 12, "pairs": 4, "more": 12}


def leaves(batch):
  return {f"{name}/{k}": v for name, fields in batch.items() for k, v in fields.items()}


def test_every_stream_has_its_fields_its_size_and_epochs_of_its_own():
  batches = take(STREAMS, 37, batch_size=SIZES)  # 12 epochs of the numbers, 29.6 of the pairs
  first = batches[0]
  assert {k: (v.shape, v.dtype.name) for k, v in leaves(first).items()} == {
    "numbers/row": ((12,), "int32"),
    "numbers/draw": ((12, 2), "float32"),
    "numbers/weight": ((12,), "float32"),
    "pairs/pair": ((4, 2, 3), "int64"),
    "pairs/weight": ((4,), "float32"),
    "more/row": ((12,), "int32"),
    "more/draw": ((12, 2), "float32"),
    "more/weight": ((12,), "float32"),
  }
  for name, field, count in (("numbers", "row", 37), ("pairs", "pair", 5)):
    rows = np.concatenate([b[name][field].reshape(SIZES[name], -1)[:, 0] for b in batches])
    epochs = rows[: len(rows) // count * count].reshape(-1, count)
    np.testing.assert_array_equal(np.sort(epochs), [range(count)] * len(epochs))
    assert len({tuple(epoch) for epoch in epochs}) > 1
  # Equal data under two names is drawn in two orders.
  assert not np.array_equal(first["numbers"]["row"], first["more"]["row"])
  assert not np.array_equal(first["numbers"]["draw"], first["more"]["draw"])


def test_a_stream_does_not_depend_on_the_others():
  alone = take({"pairs": STREAMS["pairs"]}, 6, batch_size={"pairs": 4})
  beside = take(STREAMS, 6, batch_size=SIZES)
  assert_equal([b["pairs"] for b in alone], [b["pairs"] for b in beside])


def test_streams_resume_and_are_the_same_on_other_numbers_of_hosts():
  whole = [leaves(batch) for batch in take(STREAMS, 9, batch_size=SIZES)]
  later = take(STREAMS, 5, start=4, batch_size=SIZES)  # amid an epoch of each
  assert_equal([leaves(batch) for batch in later], whole[4:])
  for hosts in (2, 4):
    blocks = [take(STREAMS, 9, batch_size=SIZES, host=h, hosts=hosts) for h in range(hosts)]
    joined = [
      {key: np.concatenate([leaves(block)[key] for block in step]) for key in whole[0]}
      for step in zip(*blocks, strict=True)
    ]
    assert_equal(joined, whole)


def test_faults_name_the_stream():
  with pytest.raises(ValueError, match=r"streams numbers, pairs that .*found one stream without"):
    take(Numbers(3), 1, batch_size={"numbers": 4, "pairs": 4})
  with pytest.raises(ValueError, match=r"the streams numbers that .*found streams numbers, p"):
    take({"numbers": Numbers(3), "pairs": Pairs(3)}, 1, batch_size={"numbers": 4})
  with pytest.raises(ValueError, match="of the stream 'pairs' that 3 hosts divide, found 4"):
    take(
      {"numbers": Numbers(3), "pairs": Pairs(3)}, 1, batch_size={"numbers": 3, "pairs": 4}, hosts=3
    )
  with pytest.raises(ValueError, match="an empty one of the stream 'pairs'"):
    take({"numbers": Numbers(3), "pairs": Pairs(0)}, 1, batch_size={"numbers": 3, "pairs": 4})


def test_a_small_stream_of_bad_rows_does_not_hide_behind_a_large_one():
  streams = {"numbers": Numbers(500), "few": Numbers(4, bad=range(4))}
  bad = BadRows(0.05, min_rows=10)
  with pytest.raises(TooManyBadRows, match="bad rows of the stream 'few', found"):
    take(streams, 20, batch_size={"numbers": 96, "few": 2}, bad=bad)
  assert bad.count / bad.seen < 0.05  # of all rows together they are few enough


def test_mixture_closes_its_parts():
  parts = [Numbers(3), Numbers(4)]
  Mixture(parts, [1, 1]).close()
  assert all(rows.closed for rows in parts)


def test_mixture_of_one_reads_like_its_part():
  assert_equal(
    take(Mixture([Numbers(23)], [0.3]), 7, batch_size=10), take(Numbers(23), 7, batch_size=10)
  )


def test_mixture_refuses_what_does_not_fit():
  class Others(Numbers):
    def blank(self):
      return {"row": np.int64(0)}

  for weights in ([1.0], [1.0, 0.0], [1.0, -1.0]):
    with pytest.raises(ValueError, match="one positive weight"):
      Mixture([Numbers(3), Numbers(3)], weights)
  with pytest.raises(ValueError, match="same fields"):
    Mixture([Numbers(3), Others(3)], [1, 1])
  with pytest.raises(ValueError, match="at least 1/1000"):
    take(Mixture([Numbers(3), Numbers(3)], [1, 10000]), 1, batch_size=4)


def test_bad_rows_weigh_nothing_and_are_named_once():
  messages = []
  bad = BadRows(0.5, messages.append)
  batches = take(Numbers(10, bad=[4, 7]), 4, batch_size=10, bad=bad, prefetch=0)
  for batch in batches:
    assert batch["weight"].dtype == np.float32
    assert batch["weight"].sum() == 8
    assert not batch["draw"][batch["weight"] == 0].any()
    assert set(batch["row"][batch["weight"] == 1]) == set(range(10)) - {4, 7}
  assert bad.count == 8
  assert bad.seen == 40
  assert sorted(bad.names) == ["row 4: made so", "row 7: made so"]
  assert sorted(messages) == [
    "Skipped a bad row: row 4: made so",
    "Skipped a bad row: row 7: made so",
  ]


def test_too_many_bad_rows_stop_the_run():
  bad = BadRows(0.1, min_rows=100)
  with pytest.raises(
    TooManyBadRows, match=r"at most 10\.00% bad rows, found 1\d among .*row \d+: made"
  ):
    take(Numbers(1000, bad=range(500)), 50, batch_size=10, bad=bad, workers=1)
  few = BadRows(0.1, min_rows=100)
  take(Numbers(20, bad=[3]), 30, batch_size=10, bad=few)
  with pytest.raises(TooManyBadRows):
    take(Numbers(10, bad=[3]), 1, batch_size=10, bad=BadRows(0.0))
  with (
    pytest.raises(TooManyBadRows),
    eval_batches(Numbers(10, bad=[3]), batch_size=4, bad=BadRows(0.0)) as batches,
  ):
    list(batches)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 8, 13, 16])
def test_evaluation_reads_every_row_once_in_order(count, hosts):
  rows = Numbers(count, bad=[5], delay=0.001)
  passes = []
  for host in range(hosts):
    with eval_batches(rows, batch_size=8, host=host, hosts=hosts, bad=BadRows(1.0)) as batches:
      passes.append(list(batches))
  assert {len(p) for p in passes} == {-(-count // 8)}
  assert all(len(b["index"]) == 8 // hosts for p in passes for b in p)
  index, weight, row, draw = (
    np.concatenate([block[key] for step in zip(*passes, strict=True) for block in step])
    for key in ("index", "weight", "row", "draw")
  )
  np.testing.assert_array_equal(index[:count], np.arange(count))
  assert (index[count:] == -1).all()
  assert index.dtype == np.int32
  np.testing.assert_array_equal(weight == 1, (index >= 0) & (index != 5))
  np.testing.assert_array_equal(row[weight == 1], index[weight == 1])
  assert (draw[weight == 1] == -1).all()  # no generator in evaluation


def test_errors_before_anything_is_read():
  with pytest.raises(ValueError, match="3 hosts divide, found 8"):
    train_batches(Numbers(9), batch_size=8, seed=0, start=0, hosts=3, bad=BadRows())
  with pytest.raises(ValueError, match="empty one"):
    eval_batches(Numbers(0), batch_size=8, bad=BadRows())


def test_examples_that_differ_from_blank_are_an_error():
  class Wide(Numbers):
    def example(self, i, rng):
      return super().example(i, rng) | {"draw": np.zeros(1, np.float32)}  # would broadcast

  with pytest.raises(ValueError, match=r"Expected draw: float32\[2\] .*found float32\[1\] in row"):
    take(Wide(9), 1, batch_size=4)


def test_other_errors_come_through():
  class Broken(Numbers):
    def example(self, i, rng):
      raise KeyError("a fault of the program")

  with pytest.raises(KeyError, match="a fault of the program"):
    take(Broken(9), 1, batch_size=4)


def test_closing_stops_the_threads_and_reads_no_further():
  read = collections.Counter()

  class Counted(Numbers):
    def example(self, i, rng):
      read[threading.current_thread().name] += 1
      return super().example(i, rng)

  before = set(threading.enumerate())  # some of which may end on their own meanwhile

  def started():
    return set(threading.enumerate()) - before

  batches = train_batches(
    Counted(100, delay=0.001), batch_size=16, seed=0, start=0, workers=3, bad=BadRows()
  )
  next(batches)
  assert started()
  batches.close()
  deadline = time.monotonic() + 10  # Grain's own threads end after it returns
  while started() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not started()
  assert sum(read.values()) <= 3 * 16  # the batch given and the two read ahead
  assert list(batches) == []
  batches.close()


def test_batches_do_not_share_memory():
  first, second = take(Numbers(9), 2, batch_size=9)
  assert not any(np.shares_memory(first[key], second[key]) for key in first)
