"""Image-text pairs from tables that name image files: CSV or TSV with a header.

  filepath,title
  photos/1.jpg,一只猫
  photos/1.jpg,"猫, 坐着"

The columns' names are those of open_clip. A row is one caption of one image; several rows may name
one image, and a caption that stands in several rows belongs to all of their images.
"""

import csv
import difflib
import io
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ofa_jax import staging, storage, text_files
from ofa_jax.data.folder import ImageFiles
from ofa_jax.data.tsv import FaultyRowsError, Texts, check_files

EXTENSIONS = (".csv", ".tsv")
IMAGE, CAPTION = "filepath", "title"
_DELIMITERS = {".csv": ",\t;", ".tsv": "\t"}  # .csv: whichever the header has most of

_LONGEST_HEADER = 65_536  # a line of base64 may be megabytes


def read_table(
  paths: Sequence[str | os.PathLike],
  *,
  image: str = IMAGE,
  caption: str = CAPTION,
  root: str | os.PathLike | None = None,
) -> tuple[ImageFiles, Texts]:
  """Reads images and captions of tables.

  Args:
    paths: `.csv` or `.tsv` files in UTF-8, with a header.
    image: the column of the images' paths.
    caption: the column of the captions.
    root: the folder that the paths are relative to; None: each table's own.

  Raises:
    ValueError: a table or a column is missing; or rows have no caption, another number of columns
      than the header or name an image that is not there (all are counted, the first five named).
  """
  files = tuple(storage.absolute(path) for path in paths)
  check_files(files)
  images, captions = {}, Captions()
  faults = {"without a caption": [], **_faults()}
  for place, file, (text,) in _records(files, columns=(image, caption), root=root, faults=faults):
    if text:
      images[file] = None  # a set that keeps the order
      captions.add(text, image=file, place=place)
    else:
      faults["without a caption"].append(f"{files[place[0]]}:{place[1]}")
  _raise(faults, files)
  if not images:
    raise ValueError(f"Expected rows below the header, found none in {', '.join(files[:5])}.")
  return ImageFiles(images), captions.texts(files)


def read_columns(
  paths: Sequence[str | os.PathLike],
  columns: Sequence[str],
  *,
  root: str | os.PathLike | None = None,
  skip: Callable[[str, str], None] | None = None,
) -> list[tuple[str, ...]]:
  """The rows of tables: the path of an image, and the texts of other columns as they are.

  Args:
    paths: as for `read_table`.
    columns: that of the images first.
    root: as for `read_table`.
    skip: called with what is wrong with a row, and where, instead of raising; the row is left out.

  Raises:
    ValueError: as `read_table`, but that any text may be empty.
  """
  files = tuple(storage.absolute(path) for path in paths)
  check_files(files)
  faults = _faults()
  records = _records(files, columns=columns, root=root, faults=faults)
  rows = [(file, *texts) for _, file, texts in records]
  if skip is None:
    _raise(faults, files)
  else:
    for kind, places in faults.items():
      for place in places:
        skip(f"row {kind}", place)
  if not rows:
    raise ValueError(f"Expected rows below the header, found none in {', '.join(files[:5])}.")
  return rows


def header(path: str) -> list[str]:
  """The names of a table's columns; of what is no text, none."""
  try:
    with storage.opened(staging.staged(path)) as raw:
      file = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
      line = file.readline(_LONGEST_HEADER)
  except UnicodeDecodeError:
    return []
  return [name.strip() for name in next(csv.reader([line], delimiter=_delimiter(path, line)), [])]


class Captions:
  """Collects captions one by one; equal ones become one with several images."""

  def __init__(self):
    self._rows = {}
    self._places = []
    self._images = []

  def add(self, text: str, *, image: str, place: tuple[int, int]) -> None:
    """Adds a caption of an image, found in a file (number) at a line or row."""
    row = self._rows.setdefault(text, len(self._rows))
    if row == len(self._places):
      self._places.append(place)
      self._images.append({})
    self._images[row][image] = None  # a set that keeps the order

  def texts(self, files: Sequence[str], *, notes: Sequence[str] = ()) -> Texts:
    """Everything added, numbered from 0."""
    return Texts(
      text_ids=list(range(len(self._rows))),
      texts=list(self._rows),
      image_ids=[tuple(images) for images in self._images],
      files=tuple(files),
      places=np.array(self._places, np.int64).reshape(-1, 2),
      notes=tuple(notes),
    )


def _faults() -> dict[str, list[str]]:
  """Places of rows that cannot be used, by what is wrong with them."""
  return {"not like the header": [], "whose image is missing": []}


def _records(
  files: Sequence[str],
  *,
  columns: Sequence[str],
  root: str | os.PathLike | None,
  faults: dict[str, list[str]],
) -> Iterator[tuple[tuple[int, int], str, list[str]]]:
  """Of each row its file's number and line, the path of its image, and its other columns."""
  exists, there = {}, storage.looker()
  for number, path in enumerate(files):
    folder = os.path.dirname(path) if root is None else storage.absolute(root)
    for line, row in _rows(path, columns=columns):
      if isinstance(row, str):
        faults["not like the header"].append(f"{path}:{line} ({row})")
        continue
      name, *texts = row
      file = storage.normal(os.path.join(folder, name))
      if file not in exists:
        exists[file] = there(file)
      if exists[file]:
        yield (number, line), file, texts
      else:
        faults["whose image is missing"].append(f"{path}:{line} ({text_files.shown(file, 300)})")


def _delimiter(path: str, line: str) -> str:
  return max(_DELIMITERS[os.path.splitext(path)[1].lower()], key=line.count)


def _rows(path: str, *, columns: Sequence[str]) -> Iterator[tuple[int, list[str] | str]]:
  """The line and the wanted columns of each row, or what is wrong with it."""
  with text_files.opened(path) as raw:
    file = io.TextIOWrapper(raw, encoding="utf-8", newline="")
    try:
      yield from _parsed(file, path, columns=columns)
    except UnicodeDecodeError as error:
      reason = text_files.fault(error.object) or error.reason
      raise ValueError(text_files.cure(path, reason)) from error


def _parsed(file: io.TextIOBase, path: str, *, columns: Sequence[str]):
  header = file.readline()
  delimiter = _delimiter(path, header)
  names = next(csv.reader([header], delimiter=delimiter), [])
  at = [_find(name, names, path) for name in columns]
  rows = csv.reader(file, delimiter=delimiter, strict=True)
  while True:
    line = rows.line_num + 2
    try:
      row = next(rows)
    except StopIteration:
      return
    except csv.Error as error:
      yield line, f"{error}; write quotes inside a quoted field twice"
      continue
    if not row:
      continue
    if len(row) == len(names):
      yield line, [row[i].strip() for i in at]
    else:
      yield line, f"{len(row)} columns instead of {len(names)}"


def _find(name: str, names: Sequence[str], path: str) -> int:
  """The number of a column."""
  names = [n.strip() for n in names]
  if name in names:
    return names.index(name)
  near = difflib.get_close_matches(name, names, n=2)
  hint = f"; did you mean {' or '.join(near)}?" if near else "."
  raise ValueError(
    f"Expected a column {name!r} in the first line of {path}, found "
    f"{', '.join(repr(n[:40]) for n in names[:12]) or 'nothing'}{hint} Columns are chosen by "
    "PairData.of(..., image=..., caption=...); base64 images need their captions as `texts`."
  )


def _raise(faults: dict[str, list[str]], files: Sequence[str]) -> None:
  lines = [
    f"{len(places)} {kind}: {', '.join(places[:5])}{', ...' if len(places) > 5 else ''}"
    for kind, places in faults.items()
    if places
  ]
  if lines:
    raise FaultyRowsError(
      "Expected an image that is there and a caption in every row, found rows\n  "
      + "\n  ".join(lines)
      + f"\nCorrect or remove these rows of {', '.join(files[:3])}; paths are relative to the "
      "table, or to PairData.of(..., root=...).",
      [(place, f"a row {kind}") for kind, places in faults.items() for place in places],
    )
