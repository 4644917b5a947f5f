"""Decoded images kept on a local disk, so that every epoch after the first decodes nothing.

One file holds a byte a row ("filled") and then the pixels of all rows. Its name is made of what the
pixels are made of: another transform is another file, a changed source replaces the old file.
Pixels are written and synced *before* their flag, so a flag never claims pixels that are not there,
whenever the process dies. Two processes may fill one file at once: they write the same bytes.
"""

import errno
import hashlib
import os
import pathlib
import threading
import time
import warnings
import weakref
from collections.abc import Sequence

import numpy as np
import PIL
import simplejpeg

from ofa_jax import storage
from ofa_jax.data.augment import auto_augment
from ofa_jax.data.images import BadImage, decode, random_crop_flip
from ofa_jax.data.protocols import EncodedImages
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
    max_bytes: rows beyond this size are not stored, `get` gives None for them. On a disk that is
      full nothing is stored any more, with one warning.

  Raises:
    ValueError: the folder cannot be made or written.
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
    if storage.in_bucket(directory):
      raise ValueError(
        f"Expected a folder of a local disk for the decode cache, found {os.fspath(directory)}"
      )
    folder = pathlib.Path(directory)
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ValueError(f"Expected a folder for the decode cache, found: {error}") from error
    self.path = folder / f"{key[0]}-{key[1]}.pixels"
    for stale in folder.glob(f"{key[0]}-*.pixels"):
      if stale != self.path:
        stale.unlink(missing_ok=True)
    self._shape = (size, size, 3)
    self._row_bytes = size * size * 3
    self._offset = -(-num_rows // 4096) * 4096
    self.capacity = max(0, min(num_rows, (max_bytes - self._offset) // self._row_bytes))
    try:
      self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
      raise ValueError(f"Expected a folder for the decode cache, found: {error}") from error
    # Not in `close`: a thread still reading could meet another file under the same number.
    weakref.finalize(self, os.close, self._file)
    self._here = np.zeros(num_rows, bool)  # written by this process, perhaps not yet synced
    try:
      self._reserve(num_rows)
      flags = np.memmap(self.path, np.uint8, mode="r", shape=(num_rows,))
      self._on_disk = flags.view(np.ndarray)
    except OSError as error:
      self._on_disk = np.zeros(num_rows, np.uint8)
      self._stop(error)
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
      place = self._offset + i * self._row_bytes
      written = os.pwrite(self._file, np.ascontiguousarray(image), place)
      if written != self._row_bytes:  # the last that the disk had room for
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
      self._stop(error)
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
    """Syncs what is not yet synced and stores no more; rows may still be read."""
    self.capacity = 0
    with self._lock:
      rows, self._pending = self._pending, []
    self._publish(rows)

  def _publish(self, rows: list[int]) -> None:
    try:
      os.fsync(self._file)
      for i in rows:
        os.pwrite(self._file, b"\1", i)
    except OSError as error:
      self._stop(error)

  def _stop(self, error: OSError) -> None:
    """Stores no more: a full disk must not stop the training."""
    if self.capacity:
      warnings.warn(
        f"The decode cache {self.path} stores no more images ({error.strerror}); they are decoded "
        "every time from now on"
      )
    self.capacity = 0

  def _reserve(self, num_rows: int) -> None:
    """Makes the file long enough; flags beyond its old end cannot be true.

    The flags are mapped into memory, so that the disk must have given them room: on a full one
    reading a hole of the file would end the process by a bus error. OSError where it has none.
    """
    end = self._offset + self.capacity * self._row_bytes
    length = os.fstat(self._file).st_size
    if length >= end:
      os.posix_fallocate(self._file, 0, max(self._offset, 1))
      return
    present = max(0, length - self._offset) // self._row_bytes
    os.ftruncate(self._file, end)
    os.posix_fallocate(self._file, 0, max(self._offset, 1))
    if length:
      os.pwrite(self._file, bytes(num_rows - present), present)


class ImageReader:
  """Reads the images of a table as square uint8 pixels, through the decode cache when there is one.

  Args:
    table: the images, encoded.
    size: side of the images given, in pixels.
    exact, rgb_first: see `ofa_jax.data.images.decode`.
    augment: "none"; "crop": in training, decode `AUGMENT_MARGIN` larger and take a random crop,
      mirrored at random; "auto": `ofa_jax.data.augment.auto_augment` of such a larger image.
    cache_dir: folder of the decode cache on a local disk; None decodes every time.
    cache_bytes: the most that the cache of this table may take.
  """

  def __init__(
    self,
    table: EncodedImages,
    *,
    size: int,
    exact: bool = True,
    rgb_first: bool = False,
    augment: str = "none",
    cache_dir: str | os.PathLike | None = None,
    cache_bytes: int = DEFAULT_MAX_BYTES,
  ):
    self.table = table
    self.size = size
    self._how = {"exact": exact, "rgb_first": rgb_first}
    self._augment = {"none": None, "crop": random_crop_flip, "auto": auto_augment}[augment]
    self._stored_size = round(size * AUGMENT_MARGIN) if self._augment else size
    self._cache = None
    if cache_dir is not None:
      self._cache = DecodeCache(
        cache_dir,
        key=cache_key(table.files, size=self._stored_size, **self._how),
        num_rows=len(table),
        size=self._stored_size,
        max_bytes=cache_bytes,
      )

  def read(self, i: int, rng: np.random.Generator | None) -> np.ndarray:
    """uint8[size, size, 3] of image `i`; augmented when `rng` is given and `augment` is set.

    Raises:
      BadRow: the image cannot be read.
    """
    if self._augment and rng is None:
      return self._decode(i, self.size)
    image = self._cache.get(i) if self._cache else None
    if image is None:
      image = self._decode(i, self._stored_size)
      if self._cache:
        self._cache.put(i, image)
    return self._augment(image, rng, size=self.size) if self._augment else image

  def close(self) -> None:
    """Closes the cache."""
    if self._cache:
      self._cache.close()

  def _decode(self, i: int, size: int) -> np.ndarray:
    encoded = self.table.encoded(i)
    try:
      return decode(encoded, size=size, **self._how)
    except BadImage as error:
      raise BadRow(self.table.name(i), str(error)) from error


def cache_key(
  files: Sequence[str], *, size: int, exact: bool, rgb_first: bool = False
) -> tuple[str, str]:
  """(what, version): sources and transform; state of the sources and versions of the decoders."""
  stats = [storage.stat(path) for path in files]
  what = (tuple(files), size, exact, rgb_first)
  version = (
    CACHE_VERSION,
    PIL.__version__,
    simplejpeg.__version__,
    tuple(map(tuple, stats)),
  )
  return _digest(what), _digest(version)


def _digest(value: tuple) -> str:
  return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
