"""Decoded images kept on a local disk, so that every epoch after the first decodes nothing.

One file holds a byte a row ("filled") and then the pixels of all rows. Its name is made of what the
pixels are made of: another transform is another file, a changed source replaces the old file.
Pixels are written and synced *before* their flag, so a flag never claims pixels that are not there,
whenever the process dies. Two processes may fill one file at once: they write the same bytes.
"""

import hashlib
import os
import pathlib
import threading
import time
from collections.abc import Sequence

import numpy as np
import PIL
import simplejpeg

from ofa_jax.data.images import BadImage, decode, random_crop_flip
from ofa_jax.data.tsv import BadRow

CACHE_VERSION = 1
DEFAULT_MAX_BYTES = 64 * 2**30
SYNC_BYTES = 256 * 2**20  # at most so much decoding is lost when the process is killed
SYNC_SECONDS = 10.0
AUGMENT_MARGIN = 1.15  # side of the stored image over the side of the random crop


class DecodeCache:
  """A file of uint8 images addressed by row.

  Args:
    directory: a folder on a local disk; made if it is not there.
    key: (what, version) from `cache_key`; files of the same `what` and another version are removed.
    num_rows: rows of the image table.
    size: side of the stored images in pixels.
    max_bytes: rows beyond this size are not stored, `get` gives None for them.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    key: tuple[str, str],
    num_rows: int,
    size: int,
    max_bytes: int = DEFAULT_MAX_BYTES,
  ):
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    self.path = folder / f"{key[0]}-{key[1]}.pixels"
    for stale in folder.glob(f"{key[0]}-*.pixels"):
      if stale != self.path:
        stale.unlink(missing_ok=True)
    self._shape = (size, size, 3)
    self._row_bytes = size * size * 3
    self._offset = -(-num_rows // 4096) * 4096
    self.capacity = max(0, min(num_rows, (max_bytes - self._offset) // self._row_bytes))
    self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
    self._reserve(num_rows)
    self._on_disk = np.memmap(self.path, np.uint8, mode="r", shape=(num_rows,)).view(np.ndarray)
    self._here = np.zeros(num_rows, bool)  # written by this process, perhaps not yet synced
    self._pending = []
    self._synced_at = time.monotonic()
    self._lock = threading.Lock()

  def get(self, i: int) -> np.ndarray | None:
    """uint8[size, size, 3] of row `i`, or None when it is not stored."""
    if not (self._here[i] or self._on_disk[i]):
      return None
    image = np.empty(self._shape, np.uint8)
    # A read, not a memory map: it takes the row in one request, and does not hold the interpreter
    # while the disk works.
    read = os.preadv(self._file, [image], self._offset + i * self._row_bytes)
    return image if read == self._row_bytes else None

  def put(self, i: int, image: np.ndarray) -> None:
    """Stores row `i`, uint8[size, size, 3]; beyond the capacity or on a full disk does nothing."""
    if i >= self.capacity or self._here[i]:
      return
    try:
      os.pwrite(self._file, np.ascontiguousarray(image), self._offset + i * self._row_bytes)
    except OSError:
      self.capacity = 0  # a full disk must not stop the training
      return
    self._here[i] = True
    with self._lock:
      self._pending.append(i)
      full = len(self._pending) * self._row_bytes >= SYNC_BYTES
      if not full and time.monotonic() - self._synced_at < SYNC_SECONDS:
        return
      rows, self._pending = self._pending, []
      self._synced_at = time.monotonic()
    self._publish(rows)

  def close(self) -> None:
    """Syncs what is not yet synced and closes the file."""
    with self._lock:
      rows, self._pending = self._pending, []
      file, self._file = self._file, -1
    if file >= 0:
      self._publish(rows, file)
      os.close(file)

  def _publish(self, rows: list[int], file: int | None = None) -> None:
    file = self._file if file is None else file
    try:
      os.fdatasync(file)
      for i in rows:
        os.pwrite(file, b"\1", i)
    except OSError:
      self.capacity = 0

  def _reserve(self, num_rows: int) -> None:
    """Makes the file long enough; flags beyond its old end cannot be true."""
    end = self._offset + self.capacity * self._row_bytes
    length = os.fstat(self._file).st_size
    if length >= end:
      return
    present = max(0, length - self._offset) // self._row_bytes
    os.ftruncate(self._file, end)
    if length:
      os.pwrite(self._file, bytes(num_rows - present), present)
