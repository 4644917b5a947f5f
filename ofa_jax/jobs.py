"""Work over the rows of files that writes a line for each, and can be killed and started again.

What is written stands in `F.partial` until it is whole; the same command goes on behind its last
whole batch, and the end has the very bytes of a run that nobody stopped.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ofa_jax import cli, partial, shards
from ofa_jax.data import pipeline

# (first row, counter of bad rows) -> lines of the batches from there on.
Batches = Callable[[int, pipeline.BadRows], Iterator[list[bytes]]]


def write_lines(
  output: str | os.PathLike,
  batches: Batches,
  *,
  total: int,
  batch_size: int,
  work: Mapping[str, Any],
  title: str,
  unit: str,
  max_bad_rate: float,
  is_bad: Callable[[bytes], bool],
  shard: shards.Shard | None = None,
  kept: Callable[[bytes], bool] | None = None,
) -> list[bytes]:
  """Writes a line a row; returns them all.

  Args:
    output: the file; until it is complete its name ends with ".partial", and what a killed run has
      left there of the same work is taken up, if its first batch is what would be written now.
    batches: gives the lines, `batch_size` of each batch but the last.
    total: rows.
    batch_size: rows of a batch.
    work: see `partial.taken_up`.
    title, unit: of the progress bar.
    max_bad_rate: the largest share of bad rows; see `pipeline.BadRows`.
    is_bad: whether a line is one of a row that could not be read.
    shard: the rows are of this one, for a note beside the file.
    kept: which lines stay in the end; None: all.

  Raises:
    TooManyBadRows: more rows are bad.
  """
  left = partial.place_of(output)
  left.parent.mkdir(parents=True, exist_ok=True)
  done = 0
  if partial.taken_up(left, work):
    lines = left.read_bytes().splitlines(keepends=True)
    done = sum(line.endswith(b"\n") for line in lines) // batch_size * batch_size
    # What is there is taken up if today's first batch is the same.
    if done:
      with contextlib.closing(batches(0, pipeline.BadRows(1.0))) as first:
        if next(first) != lines[:batch_size]:
          print(f"Starting anew: the first rows of {left} would be others now")
          done = 0
    with open(left, "r+b") as file:
      file.truncate(sum(map(len, lines[:done])))
  bad = pipeline.BadRows(max_bad_rate, print)
  bad.carry(sum(map(is_bad, lines[:done])) if done else 0, seen=done)
  with (
    partial.tidied(left),
    open(left, "ab") as file,
    cli.progress(title, total=total, done=done, unit=unit) as advance,
  ):
    for lines in batches(done, bad) if done < total else ():
      file.writelines(lines)
      file.flush()
      advance(len(lines))
  written = left.read_bytes().splitlines(keepends=True)
  made = None
  if kept is not None:  # beside what was left: with fewer lines in that, a row would be another's
    made = left.with_name(f"{left.name}.kept")
    with open(made, "wb") as file:
      file.writelines(filter(kept, written))
  if shard is not None:
    shards.note(output, work)
  partial.finish(left, output, made=made)
  return written
