"""The rows of a data set shared among jobs that know nothing of each other, and put together again.

Bounds lie between batches, so that every batch is one of the whole job: the parts, one after the
other, have its very bytes. Beside a part stands a note of its work, so that parts of different
works do not become one.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from ofa_jax import files, partial, staging, storage

ARRAY = "SLURM_ARRAY_TASK_ID"


@dataclasses.dataclass(frozen=True)
class Shard:
  """A share of the rows, or all of them to be put together.

  Attributes:
    index: which, from 0; None: the parts are to be put together.
    num: of how many.
  """

  index: int | None
  num: int

  def rows(self, total: int, *, batch_size: int) -> tuple[int, int]:
    """The first row, and the first that is not of this share; without any where batches are few."""
    batches = -(-total // batch_size)
    begin, end = (batches * i // self.num * batch_size for i in (self.index, self.index + 1))
    return min(begin, total), min(end, total)

  def work(self) -> dict[str, str]:
    """What `partial.taken_up` is to know of it."""
    return {"shard": f"{self.index}/{self.num}"}

  def place(self, output: str | os.PathLike) -> pathlib.Path:
    """Where this share of an output is written: F.jsonl is F.00001-of-00004.jsonl."""
    return self.places(output)[self.index]

  def places(self, output: str | os.PathLike) -> list[pathlib.Path]:
    """Where all of them are."""
    output = storage.of(output)
    return [
      output.with_name(f"{output.stem}.{i:05d}-of-{self.num:05d}{output.suffix}")
      for i in range(self.num)
    ]


def parse(text: str | None, *, environ: Mapping[str, str]) -> Shard | None:
  """The shard of a flag: I/N, array/N (I is SLURM's `SLURM_ARRAY_TASK_ID`) or merge/N.

  Raises:
    ValueError: it is none of these.
  """
  if not text:
    return None
  expected = "Expected --shard=I/N with I from 0 to N - 1, array/N or merge/N, found"
  which, slash, num = text.partition("/")
  if which == "array" and slash:
    which = environ.get(ARRAY, "")
    if not which:
      raise ValueError(f"{expected} {text} without {ARRAY}. Start it with sbatch --array=0-N")
    expected = f"Expected {ARRAY} from 0 to N - 1 for --shard={text}, found"
  if not num.isdecimal() or not int(num) or not re.fullmatch(r"\d+|merge", which):
    raise ValueError(f"{expected} {text}")
  if which == "merge":
    return Shard(None, int(num))
  if int(which) >= int(num):
    raise ValueError(f"{expected} {which}/{num}")
  return Shard(int(which), int(num))


def note(part: pathlib.Path, work: Mapping[str, Any]) -> None:
  """Writes what a part depends on beside it, before it takes its name."""
  files.write_text(_note_of(part), json.dumps(work, indent=1, ensure_ascii=False) + "\n")


def merge(
  output: str | os.PathLike,
  shard: Shard,
  *,
  join: Callable[[Sequence[pathlib.Path], BinaryIO], None] | None = None,
) -> int:
  """Puts the parts of an output together; returns how many. They stay where they are.

  Args:
    output: the whole.
    shard: of how many parts.
    join: writes files of a form whose bytes cannot just follow each other.

  Raises:
    ValueError: parts are missing or were made of different works.
  """
  places = shard.places(output)
  missing = [
    str(place)
    for place in places
    if not (storage.exists(place) and storage.exists(_note_of(place)))
  ]
  if missing:
    raise ValueError(
      f"Expected {shard.num} whole parts of {output}, found no {', '.join(missing[:5])}"
      f"{', ...' if len(missing) > 5 else ''} with its note. Run --shard=I/{shard.num} for these."
    )
  works = [_read(place) for place in places]
  other = sorted({name for work in works for name in work | works[0]
                  if work.get(name) != works[0].get(name)})  # fmt: skip
  if other:
    raise ValueError(
      f"Expected the parts of {output} to be of one work, found different {', '.join(other)}. Make "
      "them again with the same input, model and options."
    )
  places = [staging.local(place) for place in places]
  with files.written_whole(output, replace=True) as made, open(made, "wb") as whole:
    if join is not None:
      join(places, whole)
    else:
      for place in places:
        with open(place, "rb") as part:
          shutil.copyfileobj(part, whole)
  return len(places)


def _note_of(part: pathlib.Path) -> pathlib.Path:
  return part.with_name(f"{part.name}.work.json")


def _read(part: pathlib.Path) -> dict[str, Any]:
  work = json.loads(storage.read_bytes(_note_of(part)))
  del work["shard"]
  if work["input"]["bytes"] > partial.CONTENT:
    del work["input"]["sha256"]  # of times, too, which copies on several hosts do not share
  return work
