"""Feature files of Chinese-CLIP's retrieval evaluation, read whole and written resumably.

JSONL is the original's format, `{"image_id": 7, "feature": [0.12, ...]}` a line. `.npy` is one
structured array with the fields `id` (int64) and `feature` (float32[E]): a fifth of the size, and
memory-mapped instead of parsed. A plain [N, E] `.npy` has its row numbers as ids.
"""

import dataclasses
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import orjson

from ofa_jax import partial, staging, storage, text_files
from ofa_jax.data import values
from ofa_jax.data.tsv import check_files

FORMATS = ("jsonl", "npy")

_BLOCK = 8192  # rows checked at a time
_ADVANCE = 2**20  # bytes between two calls of `advance`


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """The features of one file.

  Attributes:
    path: the file.
    ids: int64[N], all different; Python integers (dtype object) where one is beyond int64.
    vectors: float[N, E]; memory-mapped for `.npy`.
  """

  path: str
  ids: np.ndarray
  vectors: np.ndarray

  def __len__(self) -> int:
    return len(self.ids)


def read_features(
  path: str | os.PathLike, *, kind: str, advance: Callable[[int], None] = lambda size: None
) -> Features:
  """Reads a feature file.

  Args:
    path: a `.jsonl` file, perhaps compressed (`.jsonl.gz`), or a `.npy` file.
    kind: "image" or "text"; JSONL lines hold `image_id` or `text_id`.
    advance: called with the number of bytes read since its last call.

  Raises:
    ValueError: the file is missing, empty or of another form; rows differ in width, are not finite
      or share an id (all are counted, the first five named by file and line).
  """
  path = os.fspath(path)
  check_files([path])
  if path.endswith(".npy"):
    ids, vectors = _load_npy(path)
  elif ".jsonl" in os.path.basename(path):
    ids, vectors = _parse_jsonl(path, f"{kind}_id", advance)
  else:
    raise ValueError(f"Expected a .jsonl or .npy file of features, found {path}.")
  _check(path, ids, vectors)
  return Features(path, ids, vectors)


class FeatureWriter:
  """Writes a feature file that a killed run can continue; use as a context manager.

  Rows go to `<path>.partial`, which takes the name `path` in `finish`. Whether what a killed run
  has left there is of the same work is for `partial.taken_up` to say, before.

  Args:
    path: the file to write, its suffix telling the format.
    kind: "image" or "text".
    width: E.

  Attributes:
    count: rows written, those of a killed run included.
    header: bytes of the file before its first row.
  """

  def __init__(self, path: str | os.PathLike, *, kind: str, width: int):
    self.path = storage.of(path)
    self.partial = partial.place_of(self.path)
    self.kind = kind
    self._format, self._width = form_of(path), width
    self._file, self.count = None, 0
    self.header = len(self._header(0))

  def __enter__(self) -> "FeatureWriter":
    self.partial.parent.mkdir(parents=True, exist_ok=True)
    self._file = open(self.partial, "r+b" if self.partial.exists() else "w+b")
    return self

  def __exit__(self, *_) -> None:
    self._file.close()

  def encode(self, ids: Sequence[int], vectors: np.ndarray) -> list[bytes]:
    """Returns the bytes of each row; JSONL has the digits that Python's `json` would write.

    Args:
      ids: of the rows.
      vectors: float32[N, E], finite.
    """
    if self._format == "npy":
      rows = np.empty(len(ids), _row_dtype(self._width))
      rows["id"], rows["feature"] = ids, vectors
      return [row.tobytes() for row in rows]
    if not len(ids):
      return []
    text = orjson.dumps(vectors.tolist())[2:-2].replace(b",", b", ")
    text = _OTHER_DIGITS.sub(lambda match: repr(float(match[0])).encode(), text)
    line = b'{"%b_id": %%d, "feature": [%%b]}\n' % self.kind.encode()
    return [line % row for row in zip(ids, text.split(b"], ["), strict=True)]

  def resume(self, ids: Sequence[int], *, first: Sequence[bytes], multiple: int) -> int:
    """Keeps what a killed run has left, if it is the beginning of this very run.

    Args:
      ids: of all rows in order; those of unreadable images may be missing in the file.
      first: the rows that this run begins with; a file that begins otherwise is written anew.
      multiple: rows of a batch.

    Returns:
      How many of `ids` are done, a multiple of `multiple`; what was left beyond is cut off.
    """
    begin = self.header
    expected = b"".join(first)
    self._file.seek(begin)
    places, ends = [], []
    if expected and self._file.read(len(expected)) == expected:
      place = {row_id: i for i, row_id in enumerate(ids)}
      for row_id, end in self._whole_rows(begin):
        if place.get(row_id, -1) <= (places[-1] if places else -1):
          break
        places.append(place[row_id])
        ends.append(end)
    done = (places[-1] + 1) // multiple * multiple if places else 0
    kept = int(np.searchsorted(places, done))
    self._file.seek(0)
    self._file.write(self._header(0))
    self._file.seek(ends[kept - 1] if kept else begin)
    self._file.truncate()
    self.count = kept
    return done

  def write(self, rows: Sequence[bytes]) -> None:
    """Appends rows made by `encode`."""
    self.count += len(rows)
    self._file.write(b"".join(rows))
    self._file.flush()  # a killed run loses the batch at hand and no more

  def finish(self) -> int:
    """Gives the file its name; returns the number of its rows.

    Raises:
      ValueError: it has not the rows that were written, another process having written to it.
    """
    rows = sum(1 for _ in self._whole_rows(self.header))
    if rows != self.count:
      raise ValueError(
        f"Expected {self.count} rows in {self.partial}, found {rows}. Does another run write to "
        "it? Remove it and run again."
      )
    self._file.seek(0)
    self._file.write(self._header(rows))
    self._file.flush()
    partial.finish(self.partial, self.path)
    return rows

  def _header(self, count: int) -> bytes:
    """The beginning of the file, of the same length for every count."""
    return b"" if self._format == "jsonl" else _npy_header(_row_dtype(self._width), count)

  def _whole_rows(self, begin: int) -> Iterator[tuple[int, int]]:
    """The id of each row that is written to its end, and the offset of that end."""
    self._file.seek(begin)
    if self._format == "jsonl":
      end, start = begin, b'{"%b_id": ' % self.kind.encode()
      for line in self._file:
        number = line[len(start) : line.find(b",")]
        if not (
          line.startswith(start) and line.endswith(b"]}\n") and number.lstrip(b"-").isdigit()
        ):
          return
        end += len(line)
        yield int(number), end
    else:
      dtype = _row_dtype(self._width)
      while len(row := self._file.read(dtype.itemsize)) == dtype.itemsize:
        begin += dtype.itemsize
        yield int(np.frombuffer(row, dtype)["id"][0]), begin


def join_of(
  path: str | os.PathLike,
) -> Callable[[Sequence[pathlib.Path], BinaryIO], None] | None:
  """What `shards.merge` puts files of this form together with."""
  return _join_npy if form_of(path) == "npy" else None


def form_of(path: str | os.PathLike) -> str:
  """Which of `FORMATS` a feature file is written in, by its name."""
  return pathlib.Path(path).suffix[1:]


def check_ids(ids: Sequence[int], names: Sequence[str], *, form: str) -> None:
  """Checks, before anything is computed, that a format can hold all ids.

  Args:
    ids: of the rows.
    names: where each stands, for the message.
    form: one of `FORMATS`; `.npy` holds 64 bits, JSONL any integer.

  Raises:
    ValueError: ids beyond 64 bits.
  """
  if form == "npy":
    faults = [
      f"{name} ({text_files.shown(str(i), 40)})"
      for i, name in zip(ids, names, strict=True)
      if not -(2**63) <= i < 2**63
    ]
    raise_faults(faults, "ids from -2^63 to 2^63 - 1 with the format npy (jsonl holds any)")


def raise_faults(faults: Sequence[str], expected: str) -> None:
  """Raises ValueError for a file's faults: how many, and the first five."""
  if faults:
    more = "; ..." if len(faults) > 5 else ""
    raise ValueError(
      f"Expected {expected}, found {len(faults)} fault{'s' * (len(faults) > 1)}: "
      f"{'; '.join(faults[:5])}{more}"
    )


# Where `orjson` and Python's `json` write the same number in another form: below 1e-4.
_OTHER_DIGITS = re.compile(rb"(?<![\d.])-?(?:0\.0000\d+|\d[.\d]*e-\d+)")


def _row_dtype(width: int) -> np.dtype:
  return np.dtype([("id", "<i8"), ("feature", "<f4", (width,))])


def _npy_header(dtype: np.dtype, count: int) -> bytes:
  header = io.BytesIO()
  described = np.lib.format.dtype_to_descr(dtype)
  np.lib.format.write_array_header_1_0(
    header, {"descr": described, "fortran_order": False, "shape": (count,)}
  )
  return header.getvalue()


def _join_npy(paths: Sequence[pathlib.Path], whole: BinaryIO) -> None:
  rows = [np.load(path, mmap_mode="r") for path in paths]
  whole.write(_npy_header(rows[0].dtype, sum(map(len, rows))))
  for part in rows:
    for begin in range(0, len(part), _BLOCK):
      whole.write(part[begin : begin + _BLOCK].tobytes())


def _load_npy(path: str) -> tuple[np.ndarray, np.ndarray]:
  try:
    array = np.load(staging.local(path), mmap_mode="r")  # allow_pickle is off
  except (ValueError, OSError, EOFError) as error:
    raise ValueError(f"Expected a NumPy array in {path}, found: {error}") from error
  if array.dtype.names and {"id", "feature"} <= set(array.dtype.names):
    ids, vectors = np.array(array["id"]), array["feature"]
  else:
    ids, vectors = np.arange(len(array)), array
  if vectors.ndim != 2 or vectors.dtype.kind != "f" or not vectors.size:
    raise ValueError(
      f"Expected float features [N, E], or the fields id and feature, in {path}, found "
      f"{array.dtype}{list(array.shape)}."
    )
  return ids, vectors


def _parse_jsonl(path, id_field, advance) -> tuple[np.ndarray, np.ndarray]:
  with text_files.opened(path) as file, np.errstate(over="ignore"):  # infinity is found afterwards
    begin = file.tell()  # behind a mark
    count = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**24), b"")) + 1
    file.seek(begin)
    ids, vectors, faults, number, size = [0] * count, None, [], 0, 0
    for number, line in enumerate(file, 1):
      try:
        row = orjson.loads(line)
        if type(row) is dict and type(row.get(id_field)) is float:  # also for one beyond 64 bits
          row[id_field] = json.loads(line)[id_field]
        ids[number - 1], feature = _integer(row[id_field]), row["feature"]
        if vectors is None:
          vectors = np.zeros((count, len(feature)), np.float32)
        if len(feature) != vectors.shape[1]:
          raise ValueError(f"has {len(feature)} numbers, the lines before {vectors.shape[1]}")
        vectors[number - 1] = feature
      except orjson.JSONDecodeError as error:
        text_files.decode(line, path)
        faults.append(f"{path}:{number} is not JSON: {error.msg}, column {error.colno}")
      except KeyError as error:
        faults.append(f"{path}:{number} has no field {error}")
      except (ValueError, TypeError) as error:
        faults.append(f"{path}:{number} {text_files.shown(str(error), 200)}")
      size += len(line)
      if size > _ADVANCE:
        advance(size)
        size = 0
  advance(size)
  if not number:
    faults.append(f"{path} has no rows")
  raise_faults(faults, f'{{"{id_field}": int, "feature": [floats of one width]}} in every line')
  inside = min(ids) >= -(2**63) and max(ids) < 2**63
  return np.array(ids[:number], np.int64 if inside else object), vectors[:number]


def _check(path: str, ids: np.ndarray, vectors: np.ndarray) -> None:
  row = ":{}".format if path.endswith(".jsonl") else " row {}".format
  faults = []
  for begin in range(0, len(ids), _BLOCK):
    finite = np.isfinite(vectors[begin : begin + _BLOCK]).all(1)
    faults += [f"{path}{row(begin + i + 1)} has NaN or infinity" for i in np.flatnonzero(~finite)]
  order = np.argsort(ids, kind="stable")
  for i in np.flatnonzero(ids[order][1:] == ids[order][:-1]):
    first, again = order[i], order[i + 1]
    faults.append(f"{path}{row(again + 1)} repeats the id {ids[again]} of row {first + 1}")
  raise_faults(faults, "finite features with different ids")


def _integer(value) -> int:
  number = values.whole(value)
  if number is None:
    raise ValueError(f"has the id {text_files.shown(repr(value))}, not an integer")
  return number
