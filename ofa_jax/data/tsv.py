"""Random access to Chinese-CLIP's raw files: base64 images in TSV, captions in JSONL.

`{split}_imgs.tsv` holds one image a line, `<id>\\t<base64 of the image file>`, and
`{split}_texts.jsonl` one caption, `{"text_id": 1, "text": "...", "image_ids": [7, 9]}`. The
original turns both into LMDB before training. Here the TSV itself is the store: it is scanned once
for line offsets, the offsets are kept in a small index file, and a row is then one positioned read.
"""

import binascii
import dataclasses
import json
import mmap
import os
from collections.abc import Sequence

import numpy as np
import pybase64

from ofa_jax.data import index

INDEX_VERSION = 1
MAX_ID_BYTES = 256  # more means that the columns are swapped


class BadRow(Exception):  # noqa: N818 (a fault of the data, not of the program)
  """A row that cannot be used; the pipeline skips, counts and names it."""

  def __init__(self, name: str, reason: str):
    super().__init__(name, reason)
    self.name = name
    self.reason = reason

  def __str__(self) -> str:
    return f"{self.name}: {self.reason}"


class ImageTable(index.Shards):
  """The images of one data set in one or more base64 TSV files.

  Args:
    paths: TSV files (shards), in order.
    index_dir: where index files go; default: beside each TSV, or the user's cache folder when that
      directory cannot be written.

  Raises:
    ValueError: a file is missing or has no rows, or an image id occurs twice.
  """

  def __init__(self, paths: Sequence[str | os.PathLike], *, index_dir: str | None = None):
    files = tuple(os.path.abspath(path) for path in paths)
    check_files(files)
    shards = [_load_index(path, index_dir) for path in files]
    empty = [path for path, shard in zip(files, shards, strict=True) if not len(shard.ids)]
    if empty:
      raise ValueError(
        f"Expected TSV files with image rows, found {len(empty)} without any: "
        f"{', '.join(empty[:5])}. Remove them from the list, or write them again."
      )
    super().__init__(files, [len(shard.ids) for shard in shards])
    self._starts = np.concatenate([shard.starts for shard in shards])
    self._sizes = np.concatenate([shard.sizes for shard in shards])
    self._lines = np.concatenate([shard.lines for shard in shards])
    self._ids = np.concatenate([shard.ids for shard in shards])
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

  def name(self, i: int) -> str:
    """`file:line id` of a row, for messages."""
    shard = self._shard(i)
    return f"{self.files[shard]}:{self._lines[i]} {self._ids[i].decode('utf-8', 'replace')}"

  def encoded(self, i: int) -> bytes:
    """The bytes of image file `i`; base64 in the standard or the url-safe alphabet.

    Raises:
      BadRow: the line has a wrong number of columns, or its base64 is broken.
    """
    if self._sizes[i] < 0:
      raise BadRow(self.name(i), "expected 2 columns separated by one tab: id, base64 of the image")
    try:
      return decode_base64(self._read(i, self._starts[i], self._sizes[i]))
    except binascii.Error as error:
      raise BadRow(self.name(i), f"broken base64: {error}") from error

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
    paths: JSONL files, in order, with the fields `text_id`, `text` and `image_ids` in each line.

  Raises:
    ValueError: a file is missing or empty, or a line is not such an object (all are counted, the
      first five named).
  """
  files = tuple(os.path.abspath(path) for path in paths)
  check_files(files)
  text_ids, texts, image_ids, places, faults = [], [], [], [], []
  for number, path in enumerate(files):
    before = len(texts) + len(faults)
    with open(path, "rb") as lines:
      for line, raw in enumerate(lines, start=1):
        if not raw.strip():
          continue
        try:
          row = json.loads(raw)
          text_id, text, images = row["text_id"], row["text"], row["image_ids"]
          if not isinstance(images, list):
            raise TypeError(f"image_ids is {type(images).__name__}, not a list")
          if not isinstance(text_id, int | str) or text is None:
            raise TypeError("text_id is neither a number nor a string, or text is null")
        except KeyError as error:
          faults.append(f"{path}:{line} has no field {error}")
        except (ValueError, TypeError, RecursionError) as error:  # JSON and UTF-8: ValueError
          faults.append(f"{path}:{line} {error}")
        else:
          text_ids.append(text_id)
          texts.append(str(text))
          image_ids.append(tuple(str(i) for i in images))
          places.append((number, line))
    if len(texts) + len(faults) == before:
      faults.append(f"{path} has no rows")
  if faults:
    raise ValueError(
      'Expected one {"text_id": int, "text": str, "image_ids": [int, ...]} a line in UTF-8, found '
      f"{len(faults)} faults: {'; '.join(faults[:5])}. Correct or remove these lines."
    )
  return Texts(text_ids, texts, image_ids, files, np.array(places, np.int64))


def decode_base64(text: bytes) -> bytes:
  """The bytes behind a base64 string in the standard or the url-safe alphabet.

  Raises:
    binascii.Error: a character outside the alphabet, or wrong padding.
  """
  if b"-" in text or b"_" in text:
    return pybase64.b64decode(text.translate(_FROM_URL_SAFE), validate=True)
  return pybase64.b64decode(text, validate=True)


def check_files(paths: Sequence[str]) -> None:
  """Raises ValueError naming every path that is not a file."""
  missing = [path for path in paths if not os.path.isfile(path)]
  if missing or not paths:
    raise ValueError(
      f"Expected data files, found {len(missing)} of {len(paths)} missing: "
      f"{', '.join(missing[:5]) or '(empty list)'}. Check the paths."
    )


_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclasses.dataclass(frozen=True, eq=False)
class _Index:
  starts: np.ndarray  # int64[N], first byte of the base64
  sizes: np.ndarray  # int64[N], bytes of base64; -1: wrong columns
  lines: np.ndarray  # int64[N], from 1
  ids: np.ndarray  # bytes[N]


def _load_index(path: str, index_dir: str | None) -> _Index:
  version = (INDEX_VERSION,)
  return index.load(path, form=_Index, scan=_scan, version=version, index_dir=index_dir)


def _scan(path: str) -> _Index:
  starts, sizes, lines, ids = [], [], [], []
  with open(path, "rb") as file:
    if not os.fstat(file.fileno()).st_size:
      return _Index(*(np.zeros(0, np.int64) for _ in range(3)), np.zeros(0, "S1"))
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      begin, line = 0, 0
      while begin < len(data):
        line += 1
        newline = data.find(b"\n", begin)
        following = len(data) if newline < 0 else newline + 1
        end = len(data) if newline < 0 else newline
        if end > begin and data[end - 1] == 13:  # a file written with CR LF
          end -= 1
        if end > begin:
          tab = data.find(b"\t", begin, min(end, begin + MAX_ID_BYTES + 1))
          good = tab > begin and data.find(b"\t", tab + 1, end) < 0
          ids.append(data[begin:tab] if tab >= 0 else b"")
          starts.append(tab + 1)
          sizes.append(end - tab - 1 if good else -1)
          lines.append(line)
        begin = following
  as_int = (np.array(values, np.int64) for values in (starts, sizes, lines))
  return _Index(*as_int, np.array(ids, dtype=bytes))
