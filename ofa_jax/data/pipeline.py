"""Rows -> host batches: ordered by a pure function of the step, decoded by threads.

The stream of training rows is epoch after epoch of seeded permutations; batch `s` of a global batch
size `B` is positions `[s * B, (s + 1) * B)`, and host `h` of `H` takes the `h`-th contiguous block
of it. There is no iterator state: a run resumed at step `s`, or on another number of hosts, reads
the very rows that the straight run reads, and the last batch of an epoch runs on into the next one,
so that no row is dropped or repeated.

The elements of the Grain data set are whole host batches, found by their step; inside one, threads
write decoded rows straight into their places. Grain with single rows as elements, stacked
afterwards, gave 2,200 to 3,300 images/s where this gives over 10,000 (two cores, 224 pixels, decode
cache warm): the rows of a batch are copied once.

Several streams, each with its own rows, fields and batch size, are read side by side: a batch is
then a dictionary of batches. The order of a stream depends on the seed and its name alone.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Union

import grain
import numpy as np

from ofa_jax.data import threads
from ofa_jax.data.bad_rows import BadRows, Pass, of_stream
from ofa_jax.data.bad_rows import TooManyBadRows as TooManyBadRows
from ofa_jax.data.protocols import Rows
from ofa_jax.data.streams import Streams, unnamed
from ofa_jax.data.tsv import BadRow

CHUNK = 8  # rows a thread takes at once
_FOREVER = 2**62  # steps of training data

# Fields with a leading axis of rows; of several streams, the batch of each by name.
Batch = Mapping[str, Union[np.ndarray, "Batch"]]
# The fields that come with a batch, and its slots: (row or -1 for padding, key of its generator).
Plan = Callable[[int], tuple[dict[str, np.ndarray], list[tuple[int, tuple | None]]]]


class Mixture:
  """Several data sets drawn from in fixed proportions.

  Batches follow a pattern of `SLOTS` draws in which every data set has its share, shuffled once by
  the seed; each data set runs through epochs of its own.

  Args:
    parts: rows with the same fields, shapes and dtypes.
    weights: positive, one for each part; only their ratios matter.

  Raises:
    ValueError: a weight is missing, not positive, or too small to be drawn; examples differ.
  """

  SLOTS = 1000

  def __init__(self, parts: Sequence[Rows], weights: Sequence[float]):
    self.parts = tuple(parts)
    self.notes = [note for rows in self.parts for note in rows.notes]
    if len(weights) != len(self.parts) or not self.parts or min(weights) <= 0:
      raise ValueError(
        f"Expected one positive weight for each of {len(self.parts)} data sets, found {weights}."
      )
    fields = [{k: (v.shape, v.dtype) for k, v in rows.blank().items()} for rows in self.parts]
    if any(f != fields[0] for f in fields):
      raise ValueError(f"Expected data sets with the same fields, found {fields}.")
    self.weights = np.array(weights) / sum(weights)
    self.begins = np.cumsum([0] + [len(rows) for rows in self.parts])

  def __len__(self) -> int:
    return int(self.begins[-1])

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """The example of row `i` of the concatenated parts; row numbers in it are of these, too."""
    part = int(np.searchsorted(self.begins, i, side="right")) - 1
    begin = self.begins[part].astype(np.int32)
    example = self.parts[part].example(i - int(begin), rng)
    return {k: v + begin if k.endswith("_index") else v for k, v in example.items()}

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch where a row is bad."""
    return self.parts[0].blank()

  def close(self) -> None:
    """Closes the parts."""
    for rows in self.parts:
      rows.close()


class Batches:
  """An iterator of host batches; `close()`, or leaving a `with` block, stops its threads."""

  def __init__(self, source: "_BatchSource", *, start: int, prefetch: int):
    # Two of Grain's threads, so that the end of one batch does not keep the next one waiting.
    options = grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
    self._source = source
    self._iterator = iter(grain.MapDataset.source(source)[start:].to_iter_dataset(options))

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> Batch:
    if self._iterator is None:
      raise StopIteration
    return next(self._iterator)

  def close(self) -> None:
    """Stops the threads; rows that are being read are finished first."""
    if self._iterator is not None:
      self._source.close()
      self._iterator.close()
      self._iterator = None

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def train_batches(
  rows: Rows | Mapping[str, Rows],
  *,
  batch_size: int | Mapping[str, int],
  seed: int,
  start: int,
  bad: BadRows,
  host: int = 0,
  hosts: int = 1,
  workers: int | None = None,
  prefetch: int = 2,
) -> Batches:
  """Endless batches of shuffled rows from step `start` on.

  Args:
    rows: the data set, or a `Mixture`; of several streams, that of each by name.
    batch_size: rows of a global batch; this host gives `batch_size // hosts` of them. Of several
      streams, that of each by name.
    seed: of the order and of the examples' generators, `default_rng((seed, epoch, row))`; a named
      stream has a seed of its own made of this and its name.
    start: the step of the first batch.
    bad: counts the bad rows of this host.
    host, hosts: which block of the global batch to give, and of how many.
    workers: decoding threads; default: one a core.
    prefetch: batches read ahead of the one given.

  Returns:
    Batches of the rows' fields with a leading axis b = batch_size // hosts, and
    `weight: float32[b]`, 0 where a bad row was replaced by `blank()`. Of several streams, a
    dictionary of such batches, each with its own b; every stream goes through epochs of its own.

  Raises:
    ValueError: no rows, a batch size that the hosts do not divide, or streams without one.
    TooManyBadRows: from `bad`, while iterating.
  """
  streams = Streams.of(rows, batch_size)
  planned = {
    name: _Stream(
      streams.rows[name],
      _train_plan(streams, name, seed, (host, hosts)),
      Pass(len(streams.rows[name]), -(-len(streams.rows[name]) // hosts)),
    )
    for name in streams.sizes
  }
  source = _BatchSource(planned, length=_FOREVER, workers=workers, bad=bad)
  return Batches(source, start=start, prefetch=prefetch)


def eval_batches(
  rows: Rows,
  *,
  batch_size: int,
  bad: BadRows,
  host: int = 0,
  hosts: int = 1,
  workers: int | None = None,
  prefetch: int = 2,
) -> Batches:
  """One pass over all rows in order; every host gives the same number of full batches.

  Args: as `train_batches`, of one stream.

  Returns:
    Batches of the rows' fields, `index: int32[b]` (the row; -1 for padding) and
    `weight: float32[b]` (0 for padding and bad rows).

  Raises: as `train_batches`.
  """
  block = _block(rows, batch_size, host, hosts)

  def plan(step):
    positions = step * batch_size + block
    index = np.where(positions < len(rows), positions, -1)
    return {"index": index.astype(np.int32)}, [(row, None) for row in index.tolist()]

  length = -(-len(rows) // batch_size)
  own = (length - 1) * len(block)
  own += int(((length - 1) * batch_size + block < len(rows)).sum())
  stream = _Stream(rows, plan, Pass(len(rows), own))
  source = _BatchSource({None: stream}, length=length, workers=workers, bad=bad)
  return Batches(source, start=0, prefetch=prefetch)


def _train_plan(streams: Streams, name: str | None, seed: int, block: tuple[int, int]) -> Plan:
  """Which rows each step takes of a stream; `block` is the host and the number of hosts."""
  rows, batch_size = streams.rows[name], streams.sizes[name]
  if name is not None:
    # Streams that come or go do not change the order of the others, and equal ones differ.
    words = np.random.SeedSequence((seed, *name.encode())).generate_state(2)
    seed = int(words[0]) << 32 | int(words[1])
  mine = _block(rows, batch_size, *block, name=name)
  order = _order(rows, seed)

  def plan(step):
    epochs, numbers = (values.tolist() for values in order(step * batch_size + mine))
    return {}, [(row, (seed, epoch, row)) for epoch, row in zip(epochs, numbers, strict=True)]

  return plan


def _block(
  rows: Rows, batch_size: int, host: int, hosts: int, *, name: str | None = None
) -> np.ndarray:
  """The positions of this host within a global batch: int64[batch_size // hosts]."""
  if batch_size % hosts or batch_size < 1:
    raise ValueError(
      f"Expected a batch size{of_stream(name)} that {hosts} hosts divide, found {batch_size}. It "
      "counts the rows of all hosts together."
    )
  if not len(rows):
    raise ValueError(f"Expected a data set with rows, found an empty one{of_stream(name)}.")
  return np.arange(host * batch_size // hosts, (host + 1) * batch_size // hosts)


def _order(rows: Rows, seed: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """The function from stream positions to (epochs, rows): int64[b] -> int64[b], int64[b]."""
  mixture = rows if isinstance(rows, Mixture) else Mixture([rows], [1.0])
  sizes = np.diff(mixture.begins)
  pattern, counts = _pattern(mixture.weights, seed)
  rank = np.empty_like(pattern)  # how often the same part was drawn before, within the pattern
  for part, count in enumerate(counts):
    rank[pattern == part] = np.arange(count)

  @functools.lru_cache(maxsize=2 * len(sizes))  # a batch straddles two epochs of a data set
  def permutation(part: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, part, epoch)).permutation(sizes[part])

  def locate(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cycle, slot = np.divmod(positions, Mixture.SLOTS)
    part = pattern[slot]
    epoch, place = np.divmod(cycle * counts[part] + rank[slot], sizes[part])
    row = [permutation(p, e)[k] for p, e, k in zip(part, epoch, place, strict=True)]
    return epoch, mixture.begins[part] + row

  return locate


def _pattern(weights: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """The part drawn in each slot, and how many slots each part has (largest remainders)."""
  exact = weights * Mixture.SLOTS
  counts = np.floor(exact).astype(np.int64)
  counts[np.argsort(counts - exact, kind="stable")[: Mixture.SLOTS - counts.sum()]] += 1
  if not counts.all():
    raise ValueError(
      f"Expected weights of at least 1/{Mixture.SLOTS} of their sum, found shares {weights}."
    )
  drawn = np.repeat(np.arange(len(counts)), counts)
  return np.random.default_rng((seed, len(counts))).permutation(drawn), counts


class _Stream(NamedTuple):
  """Rows, and which of them each step takes."""

  rows: Rows
  plan: Plan
  whole: Pass


class _BatchSource:
  """Host batches by step: the random-access source that Grain slices and reads ahead."""

  def __init__(
    self,
    streams: Mapping[str | None, _Stream],
    *,
    length: int,
    workers: int | None,
    bad: BadRows,
  ):
    self._streams, self._length, self._bad = streams, length, bad
    self._blanks = {name: stream.rows.blank() for name, stream in streams.items()}
    self._pool = concurrent.futures.ThreadPoolExecutor(threads.number(workers), "data")

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, step: int) -> Batch:
    batches, chunks = {}, []
    for name in self._streams:
      batches[name], begun = self._begin(name, step)
      chunks += begun
    for chunk in chunks:
      chunk.result()  # raises what the thread raised
    return unnamed(batches)

  def close(self) -> None:
    """Drops the rows that no thread has begun."""
    self._pool.shutdown(wait=True, cancel_futures=True)

  def _begin(self, name: str | None, step: int) -> tuple[Batch, list[concurrent.futures.Future]]:
    """A stream's batch, and the work that is going to fill it."""
    rows, plan, whole = self._streams[name]
    blank = self._blanks[name]
    fields, slots = plan(step)
    # New memory for each batch: JAX on a CPU may use an aligned array without copying it.
    batch = {k: np.empty((len(slots), *v.shape), v.dtype) for k, v in blank.items()}
    batch |= fields | {"weight": np.ones(len(slots), np.float32)}
    note = functools.partial(self._bad.add, stream=name, whole=whole)
    known = {"rows": rows, "blank": blank, "note": note, "stream": name}
    fill = functools.partial(_fill, batch, slots, **known)
    return batch, [self._pool.submit(fill, begin=begin) for begin in range(0, len(slots), CHUNK)]


def _fill(
  batch: dict[str, np.ndarray],
  slots: list,
  *,
  begin: int,
  rows: Rows,
  blank: dict[str, np.ndarray],
  note: Callable[..., None],
  stream: str | None,
) -> None:
  """Reads the rows of `CHUNK` slots into their places of the batch."""
  faults, numbers, seen = [], [], 0
  for place in range(begin, min(begin + CHUNK, len(slots))):
    row, key = slots[place]
    example = blank
    if row >= 0:
      seen += 1
      try:
        example = rows.example(row, None if key is None else np.random.default_rng(key))
      except BadRow as fault:
        faults.append(fault)
        numbers.append(row)
    if example is blank:
      batch["weight"][place] = 0
    for field, like in blank.items():
      value = example[field]
      if value.shape != like.shape or value.dtype != like.dtype:  # numpy would broadcast or cast
        raise ValueError(
          f"Expected {field}: {like.dtype}{list(like.shape)} as in `blank()`, found "
          f"{value.dtype}{list(value.shape)} in row {row}{of_stream(stream)}."
        )
      batch[field][place] = value
  note(faults, seen=seen, rows=numbers)
