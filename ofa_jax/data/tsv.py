"""Random access to the originals' raw files: base64 images in TSV, captions in JSONL.

Chinese-CLIP's `{split}_imgs.tsv` holds one image a line, `<id>\\t<base64 of the image file>`, and
`{split}_texts.jsonl` one caption, `{"text_id": 1, "text": "...", "image_ids": [7, 9]}`; the
original turns both into LMDB before training. OFA's TSV has texts and the image in columns whose
order is the data set's own; the original reads it from top to bottom only. Here the TSV itself is
the store: it is scanned once for the places of lines and columns, which are kept in a small index
file, and a column of a row is then one positioned read.
"""

import binascii
import dataclasses
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pybase64

from ofa_jax import storage, text_files
from ofa_jax.data import index, values
from ofa_jax.text_files import shown

IMAGE = "image"  # what the column of base64 images is called

INDEX_VERSION = 3
MAX_COLUMNS = 16
MAX_ID_BYTES = 256  # more means that the columns are swapped


class BadRow(Exception):  # noqa: N818 (a fault of the data, not of the program)
  """A row that cannot be used; the pipeline skips, counts and names it."""

  def __init__(self, name: str, reason: str):
    super().__init__(name, reason)
    self.name = name
    self.reason = reason

  def __str__(self) -> str:
    return text_files.printable(f"{self.name}: {self.reason}")


class FaultyRowsError(ValueError):
  """Files that cannot be opened because of some of their rows.

  Args:
    text: the message, in which the first are named.
    faults: place and reason of every one.
  """

  def __init__(self, text: str, faults: Sequence[tuple[str, str]]):
    super().__init__(text)
    self.faults = tuple(faults)


class Table(index.Shards):
  """The rows of one or more TSV files, column by column.

  Args:
    paths: TSV files (shards), in order.
    columns: the number of each column that is read, from 0, by the name it is read as; "image" is
      the column of base64 images.
    width: how many columns a row has; None: as many as most rows have.
    index_dir: where index files go; default: beside each TSV, or the user's cache folder when that
      directory cannot be written.

  Raises:
    ValueError: a file is missing, has no rows or is no text; or rows have fewer columns than are
      read, or no tab.
  """

  def __init__(
    self,
    paths: Sequence[str | os.PathLike],
    *,
    columns: Mapping[str, int],
    width: int | None = None,
    index_dir: str | None = None,
  ):
    files = tuple(storage.absolute(path) for path in paths)
    check_files(files)
    shards = [_load_index(path, index_dir) for path in files]
    empty = [path for path, shard in zip(files, shards, strict=True) if not len(shard.starts)]
    if empty:
      raise ValueError(
        f"Expected TSV files with rows, found {len(empty)} without any: {', '.join(empty[:5])}. "
        "Remove them from the list, or write them again."
      )
    super().__init__(files, [len(shard.starts) for shard in shards])
    self.columns = dict(columns)
    self._starts = np.concatenate([shard.starts for shard in shards])
    self._lines = np.concatenate([shard.lines for shard in shards])
    self._ids = np.concatenate([shard.ids for shard in shards])
    self._widths = np.concatenate([shard.widths for shard in shards])
    self.width = int(np.bincount(self._widths).argmax()) if width is None else width
    self._ends = np.concatenate([_to_width(shard.ends, self.width) for shard in shards])
    self._check_tabs(least=max([1, *(n + 1 for n in self.columns.values())]))
    self._check_columns()

  def name(self, i: int) -> str:
    """`file:line id` of a row, for messages; the id is the first column."""
    shard = self._shard(i)
    place = f"{self.files[shard]}:{self._lines[i]}"
    return f"{place} {shown(self._ids[i].decode('utf-8', 'replace'))}".rstrip()

  def text(self, i: int, column: str) -> str:
    """One column of row `i`.

    Raises:
      BadRow: the line has a wrong number of columns, or the text is not UTF-8.
    """
    raw = self._column(i, column)
    try:
      return raw.decode("utf-8")
    except UnicodeDecodeError as error:
      reason = text_files.fault(raw) or error.reason
      raise BadRow(self.name(i), f"{column} is not UTF-8: {reason}") from error

  def encoded(self, i: int) -> bytes:
    """The bytes of image file `i`; base64 in the standard or the url-safe alphabet.

    Raises:
      BadRow: the line has a wrong number of columns, or its base64 is broken.
    """
    text = self._column(i, IMAGE)
    try:
      return decode_base64(text)
    except binascii.Error as error:
      raise BadRow(self.name(i), f"broken base64: {error}") from error

  def _column(self, i: int, column: str) -> bytes:
    if self._widths[i] != self.width:
      raise BadRow(self.name(i), self._expected(i))
    number = self.columns[column]
    begin = self._ends[i, number - 1] + 1 if number else 0
    return self._read(i, self._starts[i] + begin, self._ends[i, number] - begin)

  def _expected(self, i: int) -> str:
    width = f"{self._widths[i]}{' or more' if self._widths[i] > MAX_COLUMNS else ''}"
    return f"expected {self.width} columns separated by tabs, found {width}"

  def _check_tabs(self, *, least: int) -> None:
    """Files whose rows have no tab at all where columns are read behind one."""
    for shard, path in enumerate(self.files):
      rows = slice(self._begins[shard], self._begins[shard + 1])
      if least > 1 and (self._widths[rows] == 1).all():
        first = int(self._begins[shard])
        line = self._read(first, self._starts[first], 64)
        raise ValueError(
          f"Expected columns separated by tabs in {path}, found no tab in any of its "
          f"{self._begins[shard + 1] - first} rows; line {self._lines[first]} begins "
          f"{shown(line.splitlines()[0], 40)!r}. Write a tab (one character, 0x09) between the "
          "columns."
        )

  def _check_columns(self) -> None:
    outside = [f"{n} ({name})" for name, n in self.columns.items() if not 0 <= n < self.width]
    if outside:
      raise ValueError(
        f"Expected columns from 0 to {self.width - 1}, as most rows of {self.files[0]} have, found "
        f"{', '.join(outside)}. Check the numbers of the columns."
      )


class ImageTable(Table):
  """The images of one data set in one or more files of Chinese-CLIP: id, tab, base64.

  Args:
    paths, index_dir: as for `Table`.

  Raises:
    ValueError: a file is missing or has no rows, or an image id occurs twice.
  """

  def __init__(self, paths: Sequence[str | os.PathLike], *, index_dir: str | None = None):
    super().__init__(paths, columns={"id": 0, IMAGE: 1}, width=2, index_dir=index_dir)
    self._order = np.argsort(self._ids, kind="stable")
    self._sorted = self._ids[self._order]
    self._check_duplicates()

  @property
  def ids(self) -> list[str]:
    """The id of every image, in table order."""
    return [raw.decode("utf-8", "replace") for raw in self._ids.tolist()]

  def find(self, ids: Sequence[str]) -> np.ndarray:
    """The row of each id: int64[N], -1 where the table has no such image."""
    wanted = np.array([i.encode(errors="replace") for i in ids], dtype=bytes)
    if not len(wanted):
      return np.zeros(0, np.int64)
    place = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
    return np.where(self._sorted[place] == wanted, self._order[place], -1)

  def encoded(self, i: int) -> bytes:
    """As `Table.encoded`; a row needs an id."""
    if not self._ids[i]:
      raise BadRow(self.name(i), "expected 2 columns separated by one tab: id, base64 of the image")
    return super().encoded(i)

  def _check_duplicates(self) -> None:
    repeated = np.flatnonzero((self._sorted[1:] == self._sorted[:-1]) & (self._sorted[1:] != b""))
    if len(repeated):
      pairs = [(self._order[k], self._order[k + 1]) for k in repeated[:5]]
      raise ValueError(
        f"Expected every image id once in a data set, found {len(repeated)} repeated: "
        + "; ".join(f"{self.name(b)} (first at {self.name(a)})" for a, b in pairs)
        + ". Remove the repeated lines."
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
  """Captions and the ids of the images that they describe.

  Attributes:
    text_ids: one id a caption.
    texts: the captions.
    image_ids: for each caption the ids of its images, as strings; empty where the pairing is
      unknown.
    files: where they came from.
    places: int64[N, 2], file number and line (from 1) of each caption.
    notes: what a person should know of rows that were left out, one line each.
  """

  text_ids: list[int | str]
  texts: list[str]
  image_ids: list[tuple[str, ...]]
  files: tuple[str, ...]
  places: np.ndarray
  notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.texts)

  def name(self, i: int) -> str:
    """`file:line text_id` of a caption, for messages."""
    file, line = self.places[i]
    return f"{self.files[file]}:{line} {self.text_ids[i]}"


def read_texts(paths: Sequence[str | os.PathLike]) -> Texts:
  """Reads captions from JSONL files.

  Args:
    paths: JSONL files, perhaps compressed, in order, with the fields `text_id`, `text` and
      `image_ids` in each line. A number as text is the text that it is written as.

  Raises:
    ValueError: a file is missing, empty or not in UTF-8, or a line is not such an object (all are
      counted, the first five named).
  """
  files = tuple(storage.absolute(path) for path in paths)
  check_files(files)
  text_ids, texts, image_ids, places, faults, cure = [], [], [], [], [], ""
  for number, path in enumerate(files):
    before = len(texts) + len(faults)
    for line, raw in text_files.lines(path):
      if not raw.strip():
        continue
      try:
        text_id, text, images = _caption_of(raw.decode())
      except UnicodeDecodeError:
        reason = text_files.fault(raw) or "a character that is cut off"
        faults.append((f"{path}:{line}", f"is not UTF-8: {reason}"))
        cure = cure or text_files.iconv(path, reason)
      except KeyError as error:
        faults.append((f"{path}:{line}", f"has no field {error}"))
      except (ValueError, TypeError, RecursionError) as error:  # JSON: ValueError
        faults.append((f"{path}:{line}", shown(str(error), 200)))
      else:
        text_ids.append(text_id)
        texts.append(text)
        image_ids.append(images)
        places.append((number, line))
    if len(texts) + len(faults) == before:
      faults.append((path, "has no rows"))
  if faults:
    named = "; ".join(map(" ".join, faults[:5]))
    raise FaultyRowsError(
      'Expected one {"text_id": int, "text": str, "image_ids": [int, ...]} a line in UTF-8, found '
      f"{len(faults)} fault{'s' * (len(faults) > 1)}: {named}. Correct or remove "
      f"these lines{cure}.",
      faults,
    )
  return Texts(text_ids, texts, image_ids, files, np.array(places, np.int64))


def _caption_of(line: str) -> tuple[int | str, str, tuple[str, ...]]:
  """text_id, text and image_ids of a line; KeyError, TypeError or ValueError where they are not."""
  row = json.loads(line)
  if not isinstance(row, dict):
    raise TypeError(f"is {type(row).__name__}, not an object")
  text_id, text, images = row["text_id"], row["text"], row["image_ids"]
  if not isinstance(images, list):
    raise TypeError(f"image_ids is {type(images).__name__}, not a list")
  ids = tuple(str(values.identifier(i, "an entry of image_ids")) for i in images)
  return values.identifier(text_id, "text_id"), values.caption(text), ids


def decode_base64(text: bytes) -> bytes:
  """The bytes behind a base64 string in the standard or the url-safe alphabet.

  White space in it or around it is left out, as by the original's decoder.

  Raises:
    binascii.Error: a character outside the alphabet, or wrong padding.
  """
  if b"-" in text or b"_" in text:
    text = text.translate(_FROM_URL_SAFE)
  try:
    return pybase64.b64decode(text, validate=True)
  except binascii.Error:
    without = text.translate(None, _SPACE)
    if len(without) == len(text):
      raise
    return pybase64.b64decode(without, validate=True)


def check_files(paths: Sequence[str]) -> None:
  """Raises ValueError naming every path that is not a file."""
  missing = [path for path in paths if not storage.is_file(path)]
  if missing or not paths:
    raise ValueError(
      f"Expected data files, found {len(missing)} of {len(paths)} missing: "
      f"{', '.join(missing[:5]) or '(empty list)'}. Check the paths."
    )


_SPACE = b" \t\r\n\v\f"
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclasses.dataclass(frozen=True, eq=False)
class _Index:
  starts: np.ndarray  # int64[N], first byte of the line
  ends: np.ndarray  # int64[N, C], end of each column, counted from the line's first byte
  widths: np.ndarray  # int64[N], columns of each row; MAX_COLUMNS + 1: more than these
  lines: np.ndarray  # int64[N], from 1
  ids: np.ndarray  # bytes[N], the first column; empty where it is too long for an id


def _load_index(path: str, index_dir: str | None) -> _Index:
  version = (INDEX_VERSION,)
  return index.load(path, form=_Index, scan=_scan, version=version, index_dir=index_dir)


def _scan(path: str) -> _Index:
  text_files.check(path)
  starts, ends, lines, ids = [], [], [], []
  for line, (start, data, begin, end) in enumerate(_lines(path), 1):
    if end > begin and data[end - 1] == 13:  # a file written with CR LF
      end -= 1
    if end > begin:
      columns = _column_ends(data, begin, end)
      starts.append(start)
      ends.append([column - begin for column in columns])
      lines.append(line)
      ids.append(data[begin : columns[0]] if columns[0] - begin <= MAX_ID_BYTES else b"")
  widths = np.array([len(row) for row in ends], np.int64)
  if not len(widths):  # nothing but empty lines
    return _Index(widths, widths.reshape(0, 1), widths, widths, np.zeros(0, "S1"))
  places = np.zeros((len(ends), min(widths.max(), MAX_COLUMNS)), np.int64)
  for row, columns in zip(places, ends, strict=True):
    row[: len(columns)] = columns[:MAX_COLUMNS]
  return _Index(
    np.array(starts, np.int64), places, widths, np.array(lines, np.int64), np.array(ids, bytes)
  )


def _lines(path: str) -> Iterator[tuple[int, mmap.mmap | bytes, int, int]]:
  """Of each line its first byte in the file, and the bytes between two places in which it is."""
  if storage.in_bucket(path):
    with storage.opened(path) as file:
      start = len(text_files.MARK) * (file.peek(3)[:3] == text_files.MARK)
      file.seek(start)
      for raw in file:
        yield start, raw, 0, len(raw) - raw.endswith(b"\n")
        start += len(raw)
    return
  with open(path, "rb") as file:
    if not os.fstat(file.fileno()).st_size:
      return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      begin = len(text_files.MARK) * (data[:3] == text_files.MARK)
      while begin < len(data):
        newline = data.find(b"\n", begin)
        end = len(data) if newline < 0 else newline
        yield begin, data, begin, end
        begin = end + 1


def _column_ends(data: mmap.mmap | bytes, begin: int, end: int) -> list[int]:
  """Where the first `MAX_COLUMNS` + 1 columns of a line end."""
  ends, at = [], begin
  while len(ends) < MAX_COLUMNS:
    tab = data.find(b"\t", at, end)
    if tab < 0:
      break
    ends.append(tab)
    at = tab + 1
  return [*ends, end]


def _to_width(ends: np.ndarray, width: int) -> np.ndarray:
  """The same array with `width` columns; rows of another width are never read."""
  return np.pad(ends[:, :width], ((0, 0), (0, max(0, width - ends.shape[1]))))
