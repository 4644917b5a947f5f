"""Rows with pictures -> TSV files that appear whole; what was left out is counted and named."""

import collections
import concurrent.futures
import contextlib
import functools
import glob
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pybase64

from ofa_jax import storage, text_files
from ofa_jax.data import images, threads
from ofa_jax.files import written_whole

_CHUNK = 16  # rows that a thread takes at once
_RECENT = 256  # pictures that are kept for the rows that follow
_NAMED = 20  # rows of a kind that are named
_EVERY = 10  # seconds between lines of progress


class Picture(NamedTuple):
  """A column that is the base64 of an image: of a file, or as it was distributed.

  Attributes:
    path: of the file, or what to call it.
    encoded: its base64; None: it is in the file.
  """

  path: str
  encoded: str | None = None


Column = str | Picture


class Table(NamedTuple):
  """A TSV file to write.

  Attributes:
    name: its path in the output folder.
    rows: its columns.
    complete: whether a row that cannot be written is an error, since rows are known by number.
  """

  name: str
  rows: Iterable[Sequence[Column]]
  complete: bool = False


class Content(NamedTuple):
  """Another file to write: its path in the output folder, and its bytes."""

  name: str
  content: bytes


Files = Iterator[Table | Content]


class Skipped:
  """Counts what is left out by kind, and names the first ones of each.

  Args:
    say: called with a line.
  """

  def __init__(self, say: Callable[[str], None] | None = None):
    self.counts = collections.Counter()
    self.say = say or _to_stderr

  def add(self, kind: str, name: str) -> None:
    """One more of a kind, such as "missing picture"."""
    self.counts[kind] += 1
    if self.counts[kind] <= _NAMED:
      more = "; others are only counted" if self.counts[kind] == _NAMED else ""
      self.say(f"Skipped, {kind}: {text_files.shown(name, 300)}{more}")


class Pictures:
  """Finds picture files in the folders in which a data set may have them.

  Args:
    source: the data set.
    folders: below it, "" being itself; those that are there are looked through in order.
  """

  def __init__(self, source: pathlib.Path, *folders: str):
    places = [source / folder for folder in folders]
    self._places = [place for place in places if place.is_dir()] or places[:1]

  def __call__(self, name: str) -> Picture:
    """The picture of a file name; where no folder has it, of the path in the first one."""
    paths = [os.path.join(place, name) for place in self._places]
    return Picture(next((path for path in paths if os.path.exists(path)), paths[0]))


def write(
  file: Table | Content,
  output: str | os.PathLike,
  *,
  skipped: Skipped,
  limit: int | None = None,
  workers: int | None = None,
) -> int:
  """Writes a file; returns its rows.

  A row whose picture is missing or unreadable is left out. Of a picture the header is read, not
  the pixels.

  Args:
    file: what to write.
    output: the folder, in which folders are made.
    skipped: counts the rows that are left out.
    limit: the first so many rows are read; None: all.
    workers: threads that read pictures; None: one a core.

  Raises:
    ValueError: no row is left, or one of a complete table cannot be written.
  """
  path = pathlib.Path(output, file.name)
  with written_whole(path, replace=True) as made, open(made, "wb") as out:
    if isinstance(file, Content):
      out.write(file.content)
      return 0
    count, last = 0, time.monotonic()
    for line in _lines(itertools.islice(file.rows, limit), threads.number(workers)):
      if isinstance(line, Fault):
        if file.complete:
          raise ValueError(
            f"Expected all rows of {file.name}, which are known by their numbers, found one with "
            f"a {line.kind}: {line.name}"
          )
        skipped.add(line.kind, line.name)
        continue
      out.write(line)
      count += 1
      if time.monotonic() - last > _EVERY:
        last = time.monotonic()
        skipped.say(f"{path}: {count:,} rows")
    if not count:
      kinds = ", ".join(f"{n:,} {kind}" for kind, n in skipped.counts.items()) or "no rows at all"
      raise ValueError(f"Expected rows for {path}, found none that can be written ({kinds})")
  return count


class Fault(NamedTuple):
  """Why a row cannot be written: the kind, and what is to blame."""

  kind: str
  name: str


def clean(text: object) -> str:
  """A text as a column: white space, tabs and ends of lines among it, becomes single spaces."""
  return " ".join(str(text).split())


def joined(texts: Iterable[str]) -> str:
  """Several texts in one column, "&&" between them."""
  return "&&".join(clean(text).replace("&&", "&") for text in texts)


def find(source: pathlib.Path, *patterns: str) -> pathlib.Path | None:
  """The first file that one of the patterns finds in a folder, the earlier pattern first."""
  for pattern in patterns:
    names = sorted(glob.glob(pattern, root_dir=source))
    if names:
      return source / names[0]
  return None


def need(source: pathlib.Path, *patterns: str) -> pathlib.Path:
  """As `find`; ValueError where there is none."""
  path = find(source, *patterns)
  if path is None:
    there = sorted(os.listdir(source)) if source.is_dir() else []
    raise ValueError(
      f"Expected {' or '.join(patterns)} in {source}, found "
      f"{', '.join(there[:8]) or 'nothing'}. Give the folder of the data set in --source."
    )
  return path


def load_json(path: pathlib.Path) -> Any:
  """What a JSON file holds; ValueError, with its name, where it is damaged."""
  try:
    return json.loads(storage.read_bytes(path))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"Expected JSON in {path}, found {error}. Download it again.") from error


@contextlib.contextmanager
def reading(path: object, form: str) -> Iterator[None]:
  """Makes one message of records that are not as their makers describe them.

  Args:
    path: the file.
    form: what is expected in it.
  """
  try:
    yield
  except (KeyError, TypeError, AttributeError, IndexError) as error:
    raise ValueError(
      f"Expected {form} in {path}, found a record of another form "
      f"({type(error).__name__}: {text_files.shown(str(error))})"
    ) from error


def _lines(rows: Iterable[Sequence[Column]], workers: int) -> Iterator["bytes | Fault"]:
  """The lines of rows, in order, made by threads."""
  rows = iter(rows)
  with concurrent.futures.ThreadPoolExecutor(workers, "pictures") as pool:
    pending = collections.deque()
    try:
      while True:
        while len(pending) < 4 * workers and (chunk := list(itertools.islice(rows, _CHUNK))):
          pending.append(pool.submit(lambda chunk: [_line(row) for row in chunk], chunk))
        if not pending:
          return
        yield from pending.popleft().result()
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


def _line(row: Sequence[Column]) -> "bytes | Fault":
  columns = []
  for column in row:
    if isinstance(column, Picture):
      column = _encoded(column)
      if isinstance(column, Fault):
        return column
    else:
      column = column.encode("utf-8", "replace")
    columns.append(column)
  return b"\t".join(columns) + b"\n"


@functools.lru_cache(maxsize=_RECENT)
def _encoded(picture: Picture) -> "bytes | Fault":
  """The base64 of a picture whose header can be read."""
  try:
    if picture.encoded is None:
      data = storage.read_bytes(picture.path)
    else:
      data = pybase64.b64decode(picture.encoded, validate=True)
    images.size(data)
  except FileNotFoundError:
    return Fault("missing picture", picture.path)
  except (OSError, ValueError) as error:  # of which BadImage and binascii.Error are
    return Fault("unreadable picture", f"{picture.path}: {error}")
  return pybase64.b64encode(data)


def _to_stderr(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
