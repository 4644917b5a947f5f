r"""Checks every row of the data that a config reads, before anything is trained on it.

  python -m ofa_jax.validate_data --config=configs/ofa_vqa.py:base [--config.task.train=...]

Each row is made into an example exactly as training or an evaluation makes it: training rows with
random numbers, those of evaluations without. A fault is one line on the standard output: file, line
and id, and what is wrong; the summary counts them by kind. Ends with status 1 where there was one.
No model is built. A split that the config names and does not read is checked where its files exist.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ofa_jax import cli, storage
from ofa_jax.config import Config
from ofa_jax.data import threads
from ofa_jax.data.pairs import PairData, expand
from ofa_jax.data.protocols import Rows
from ofa_jax.data.streams import by_name
from ofa_jax.data.tsv import BadRow, FaultyRowsError
from ofa_jax.engine.processes import describe
from ofa_jax.text_files import printable

SPLITS = ("train", "valid", "test")

_CHUNK = 32  # rows that a thread takes at once
_EVERY = 10  # seconds between lines of progress
_MOST_IN_KIND = 80  # characters of a kind of fault
_PARTICULARS = (
  (re.compile(r",? found .*", re.DOTALL), ""),
  (re.compile(r"'[^']*'|\"[^\"]*\""), "..."),
  (re.compile(r"\d+"), "N"),
)


class Fault(NamedTuple):
  """Something that training or an evaluation would stop at, or leave out.

  Attributes:
    place: the file and the row.
    reason: what is wrong.
  """

  place: str
  reason: str

  @property
  def kind(self) -> str:
    """The reason without what is this row's own."""
    kind = self.reason.splitlines()[0] if self.reason else ""
    for pattern, other in _PARTICULARS:
      kind = pattern.sub(other, kind)
    return kind[:_MOST_IN_KIND].strip(" ,:;") or self.reason[:_MOST_IN_KIND]

  def __str__(self) -> str:
    return printable(" ".join(f"{self.place}: {self.reason}".split()))


@dataclasses.dataclass
class Part:
  """Rows that are read in one way.

  Attributes:
    name: such as "train", "valid" or "valid/image".
    rows: they; None: they cannot be opened.
    learnt: whether they are read as in training.
    faults: why they cannot be opened.
  """

  name: str
  rows: Rows | None = None
  learnt: bool = False
  faults: Sequence[Fault] = ()


def parts(config: Config) -> Iterator[Part]:
  """Opens what a config reads: training data, evaluations, and splits that are only named."""
  task = config.task
  yield from _opened("train", lambda: by_name(_uncached(task).examples("train")), learnt=True)
  seen = []
  for evaluation in config.evals:
    if (evaluation.task, evaluation.split) in seen:
      continue
    seen.append((evaluation.task, evaluation.split))
    name = evaluation.split if evaluation.task == task else f"{evaluation.title}:{evaluation.split}"
    yield from _opened(name, lambda e=evaluation: _uncached(e.task).streams(e.split))
  for split in SPLITS[1:]:
    if (task, split) not in seen and hasattr(task, "streams") and _there(getattr(task, split, ())):
      yield from _opened(split, lambda s=split: _uncached(task).streams(s))


def faults(part: Part, *, seed: int = 0, workers: int | None = None) -> Iterator[Fault | None]:
  """Reads every row of a part, on all cores, in order.

  Args:
    part: of `parts`.
    seed: of the rows' random numbers.
    workers: threads; None: one a core.

  Yields:
    For every row its fault, or None. An image that several rows have is told with each of them.
  """
  if part.rows is None:
    yield from part.faults
    return
  blank = part.rows.blank()
  workers = threads.number(workers)
  chunks = iter(range(0, len(part.rows), _CHUNK))
  with concurrent.futures.ThreadPoolExecutor(workers, "data") as pool:
    pending = collections.deque()

    def submit():
      begin = next(chunks, None)
      if begin is not None:
        pending.append(pool.submit(_check, part, blank, begin, seed))

    for _ in range(4 * workers):
      submit()
    try:
      while pending:
        yield from pending.popleft().result()
        submit()
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


def validate_data(config: Config) -> int:
  """Prints one line a fault and a summary; returns the number of faults, equal lines counted once.

  Args:
    config: whose data is read; its model is not built.

  Raises:
    ValueError: the config's `workers` is no number of threads.
  """
  threads.number(config.workers)  # before anything is opened
  kinds, told, checked = collections.Counter(), set(), 0
  # On a terminal the bar takes over what is printed, which then goes where the bar is; elsewhere it
  # is to go where it was sent.
  out = None if sys.stdout.isatty() else sys.stdout
  for part in parts(config):
    rows, done, bad = 0 if part.rows is None else len(part.rows), 0, 0
    last = time.monotonic()
    with contextlib.closing(part.rows) if part.rows is not None else contextlib.nullcontext():
      for note in part.rows.notes if part.rows is not None else ():
        print(f"{part.name}: {note}", file=sys.stderr)
      with cli.progress(f"Checking {part.name}", total=rows, unit="rows") as advance:
        for fault in faults(part, seed=config.seed, workers=config.workers):
          advance(1)
          done += 1
          if time.monotonic() - last > _EVERY and not sys.stderr.isatty():
            last = time.monotonic()
            print(f"{part.name}: {done:,} of {rows:,} rows", file=sys.stderr, flush=True)
          if fault is None:
            continue
          bad += 1
          if str(fault) not in told:
            told.add(str(fault))
            kinds[fault.kind] += 1
            print(fault, file=out, flush=True)
    checked += rows
    seen = "cannot be opened" if part.rows is None else f"{rows:,} rows checked"
    print(f"{part.name}: {seen}, {bad:,} faulty", file=sys.stderr, flush=True)
  for kind, count in kinds.most_common():
    print(f"{count:,} x {printable(kind)}")
  print(f"{checked:,} rows checked, {kinds.total():,} faults")
  return kinds.total()


def _check(part: Part, blank: Mapping[str, Any], begin: int, seed: int) -> list[Fault | None]:
  """The faults of `_CHUNK` rows."""
  rows = part.rows
  return [
    _fault(part, i, blank, np.random.default_rng((seed, 0, i)) if part.learnt else None)
    for i in range(begin, min(begin + _CHUNK, len(rows)))
  ]


def _fault(part, i, blank, rng) -> Fault | None:
  try:
    example = part.rows.example(i, rng)
  except BadRow as fault:
    return Fault(fault.name, fault.reason)
  except Exception as error:  # a run would end at it; the other rows are still worth looking at
    return Fault(f"row {i} of {part.name}", describe(error))
  for field, like in blank.items():
    value = example.get(field)
    if value is None or value.shape != like.shape or value.dtype != like.dtype:
      told = "nothing" if value is None else f"{value.dtype}{list(value.shape)}"
      return Fault(
        f"row {i} of {part.name}", f"expected {field}: {like.dtype}{list(like.shape)}, found {told}"
      )
  return None


def _opened(name, make, *, learnt=False) -> Iterator[Part]:
  """The rows that `make` gives by the names of their streams."""
  try:
    streams = make()
  except (ValueError, OSError) as error:
    rows = error.faults if isinstance(error, FaultyRowsError) else ((name, describe(error)),)
    yield Part(name, faults=[Fault(*fault) for fault in rows])
    return
  for stream, rows in streams.items():
    plain = stream in (None, "examples")
    yield Part(name if plain else f"{name}/{stream}", rows=rows, learnt=learnt)


def _uncached(task):
  """The task without a decode cache: every picture is decoded here, and none is kept."""
  if getattr(task, "cache_dir", None) is None:
    return task
  return dataclasses.replace(task, cache_dir=None)


def _there(sources: Any) -> bool:
  """Whether the files of a split exist; a data set of TensorFlow Datasets is none."""
  sources = (sources,) if isinstance(sources, str | PairData) else tuple(sources or ())
  paths = [p for s in sources for p in (s.images if isinstance(s, PairData) else (s,))]
  try:
    return bool(paths) and all(storage.exists(path) for path in expand(paths))
  except ValueError:  # a pattern that no file has
    return False


def main() -> None:
  """Runs the command."""
  config = cli.define_config()
  cli.define_stage()
  cli.run(lambda: _main(config.value))


def _main(config):
  if validate_data(config):
    raise SystemExit(1)


if __name__ == "__main__":
  main()
