"""Small files of row offsets beside large data files, so that a row is one positioned read.

An index belongs to one state of its file (size and time of change) and is made anew for another.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from ofa_jax import staging, storage
from ofa_jax.files import written_whole

T = TypeVar("T")


class Shards:
  """Rows that lie in several files, in order, and are read by position.

  Args:
    files: their paths.
    counts: rows of each.
  """

  def __init__(self, files: Sequence[str], counts: Sequence[int]):
    self.files = tuple(files)
    self._begins = np.cumsum([0, *counts])
    self._open_files = {}

  def __len__(self) -> int:
    return int(self._begins[-1])

  def close(self) -> None:
    """Closes the files; the next read opens them again."""
    self._open_files = {}

  def __getstate__(self) -> dict:
    return self.__dict__ | {"_open_files": {}}  # a spawned process opens its own

  def _shard(self, i: int) -> int:
    return int(np.searchsorted(self._begins, i, side="right")) - 1

  def _read(self, i: int, start: int, size: int) -> bytes:
    """Bytes of the file of row `i`; OSError when they cannot be had."""
    file = self._file(self._shard(i))  # this reference keeps it open should `close` be called now
    if isinstance(file, str):
      return storage.read_range(file, int(start), int(size))
    return os.pread(file.fileno(), int(size), int(start))

  def _file(self, shard: int) -> io.FileIO | str:
    """An open file, or the name of an object whose ranges are asked for."""
    file = self._open_files.get(shard)
    if file is None:
      path = staging.staged(self.files[shard])
      opened = path if storage.in_bucket(path) else io.FileIO(path)
      file = self._open_files.setdefault(shard, opened)
    return file


def load(
  path: str,
  *,
  form: type[T],
  scan: Callable[[str], T],
  version: Sequence[int],
  index_dir: str | None = None,
) -> T:
  """Reads the index of a file, or scans the file and keeps what was found.

  Args:
    path: the data file.
    form: a dataclass of arrays, what an index is made of.
    scan: makes it from the path.
    version: whatever else the content of an index depends on.
    index_dir: where index files go; default: beside the file, or the user's cache folder when that
      directory cannot be written.
  """
  stamp = np.array([*version, *storage.stat(path)], np.int64)
  places = _places(path, index_dir)
  for place in places:
    try:
      with _load(place) as file:
        if np.array_equal(file["stamp"], stamp):
          return form(*(file[field.name] for field in dataclasses.fields(form)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      continue  # absent, half-written by another tool, or of another format: scan again
  index = scan(staging.staged(path))
  for place in places:
    try:
      save_atomically(place, stamp=stamp, **vars(index))
      break
    except OSError:
      continue  # cannot be written here; without any place the scan is repeated at each start
  return index


def save_atomically(place: str | os.PathLike, **arrays: np.ndarray) -> None:
  """Writes an `.npz` that appears whole or not at all."""
  with written_whole(place, replace=True) as made, open(made, "xb") as file:
    np.savez(file, **arrays)


def _load(place: pathlib.Path) -> np.lib.npyio.NpzFile:
  # Without pickles, which is the default.
  return np.load(io.BytesIO(storage.read_bytes(place)) if storage.in_bucket(place) else place)


def _places(path: str, index_dir: str | None) -> list[pathlib.Path]:
  name = os.path.basename(path) + ".index.npz"
  own = f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{name}"
  if index_dir is not None:
    return [storage.of(index_dir) / own]
  return [storage.of(path).with_name(name), storage.cache_home() / "index" / own]
