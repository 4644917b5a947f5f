"""Chinese-CLIP's LMDB folders, for those who have them already; nothing needs them.

`<split>/imgs` maps an image id to the base64 of its file, `<split>/pairs` maps "0", "1", ... to a
pickled `(image_id, text_id, text)`, one for each edge between a caption and an image. The pickles
are read by an unpickler that knows no class and no function, so that a file from elsewhere cannot
run anything.
"""

import binascii
import contextlib
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ofa_jax import staging
from ofa_jax.data import plain_pickle
from ofa_jax.data.tsv import BadRow, Texts, check_files, decode_base64

# LMDB refuses to open one environment twice in a process, and a training run reads the same folder
# as training and as evaluation data: the open ones are shared, and closed with their last user.
_ENVIRONMENTS = weakref.WeakValueDictionary()


class LmdbImages:
  """The images of one LMDB `imgs` folder, in the byte order of their ids, as the original has it.

  Args:
    directory: the folder with `data.mdb`.

  Raises:
    ValueError: no such folder, a file that is cut short, or no images in it.
    ImportError: the `lmdb` package is not installed.
  """

  def __init__(self, directory: str | os.PathLike):
    self._directory = os.path.realpath(staging.local_folder(directory))
    self.files = (os.path.join(self._directory, "data.mdb"),)
    self._environment = _open(self._directory)
    with _reading(self._environment, self._directory) as transaction:
      keys = [k for k in transaction.cursor().iternext(values=False) if k != b"num_images"]
    if not keys:
      raise ValueError(f"Expected images, found none in {self._directory}. Build the LMDB again.")
    self._keys = np.array(keys, dtype=bytes)

  def __len__(self) -> int:
    return len(self._keys)

  @property
  def ids(self) -> list[str]:
    """The id of every image, in table order."""
    return [key.decode("utf-8", "replace") for key in self._keys.tolist()]

  def find(self, ids: Sequence[str]) -> np.ndarray:
    """The row of each id: int64[N], -1 where the folder has no such image."""
    wanted = np.array([i.encode(errors="replace") for i in ids], dtype=bytes)
    if not len(wanted):
      return np.zeros(0, np.int64)
    place = np.searchsorted(self._keys, wanted).clip(max=len(self) - 1)
    return np.where(self._keys[place] == wanted, place, -1)

  def name(self, i: int) -> str:
    """`folder:id` of a row, for messages."""
    return f"{self._directory}:{self._keys[i].decode('utf-8', 'replace')}"

  def encoded(self, i: int) -> bytes:
    """The bytes of image file `i`.

    Raises:
      BadRow: its base64 is broken.
    """
    try:
      with _reading(self._environment, self._directory) as transaction:
        text = transaction.get(bytes(self._keys[i]))
    except ValueError as error:
      raise BadRow(self.name(i), str(error)) from error
    if text is None:
      raise BadRow(self.name(i), "its record is lost")
    try:
      return decode_base64(text.rstrip())
    except binascii.Error as error:
      raise BadRow(self.name(i), f"broken base64: {error}") from error

  def __getstate__(self) -> dict:
    return {"directory": self._directory}

  def __setstate__(self, state: dict) -> None:
    self.__init__(state["directory"])


def read_lmdb_pairs(directory: str | os.PathLike) -> Texts:
  """Reads the captions of one LMDB `pairs` folder; edges of one caption are put together again.

  Args:
    directory: the folder with `data.mdb`.

  Raises:
    ValueError: no such folder, fewer records than `num_samples` says, or a record that is not a
      plain `(image_id, text_id, text)` (all are counted, the first five named).
    ImportError: the `lmdb` package is not installed.
  """
  path = os.path.realpath(staging.local_folder(directory))
  text_ids, texts, image_ids, places, faults = [], [], [], [], []
  with _reading(_open(path), path) as transaction:
    count = transaction.get(b"num_samples")
    if count is None or not count.isdigit():
      raise ValueError(
        f"Expected the key num_samples, found {count!r} in {path}. Is this the `pairs` folder of a "
        "finished build? Build the LMDB again."
      )
    for i in range(int(count)):
      try:
        image_id, text_id, text = _load_plain(transaction.get(str(i).encode()))
      except ValueError as error:
        faults.append(f"record {i}: {error}")
        continue
      if texts and (text_ids[-1], texts[-1]) == (text_id, text):
        image_ids[-1] += (str(image_id),)
      else:
        text_ids.append(text_id)
        texts.append(text)
        image_ids.append((str(image_id),))
        places.append((0, i))
  if faults or not texts:
    raise ValueError(
      f"Expected pickled (image_id, text_id, text) records, found {len(faults)} faults among "
      f"{int(count)} in {path}: {'; '.join(faults[:5])}. Build the LMDB again from TSV and JSONL."
    )
  return Texts(text_ids, texts, image_ids, (path,), np.array(places, np.int64))


@contextlib.contextmanager
def _reading(environment: Any, directory: str) -> Iterator[Any]:
  """A transaction of LMDB; ValueError where it meets a damaged page."""
  import lmdb

  try:
    with environment.begin() as transaction:
      yield transaction
  except lmdb.Error as error:
    raise ValueError(
      f"Expected a whole LMDB environment in {directory}, found it damaged ({error}). Copy it "
      "again, or build it again."
    ) from error


def _load_plain(value: bytes | None) -> tuple[int | str, int | str, str]:
  if value is None:
    raise ValueError("missing")
  record = plain_pickle.load(value)
  if type(record) is not tuple or len(record) != 3:
    raise ValueError("not a tuple of three")
  image_id, text_id, text = (v.decode() if type(v) is bytes else v for v in record)
  if type(image_id) not in (int, str) or type(text_id) not in (int, str) or type(text) is not str:
    raise ValueError(f"has types {', '.join(type(v).__name__ for v in record)}")
  return image_id, text_id, text


def _open(directory: str):
  try:
    import lmdb
  except ImportError as error:
    raise ImportError("Reading LMDB folders needs `pip install lmdb`.") from error
  path = os.path.join(directory, "data.mdb")
  check_files([path])
  root = _check_length(path)
  environment = _ENVIRONMENTS.get(directory)
  if environment is None:
    _check_pages(path, *root)
    try:
      environment = lmdb.open(directory, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
      raise ValueError(
        f"Expected an LMDB environment, found {error}. Build the LMDB again, or use the TSV files."
      ) from error
    _ENVIRONMENTS[directory] = environment
  return environment


def _check_length(path: str) -> tuple[int, int, int, int]:
  """The file is mapped into memory: a page behind its end would end the process by a bus error.

  Returns:
    The size of a page, the root of the tree of pages, its levels, and the last page.

  Raises:
    ValueError: it is shorter than its own header says.
  """
  size = os.path.getsize(path)
  with open(path, "rb") as file:
    first = file.read(_META.size)
    if len(first) < _META.size or _META.unpack(first)[0] != _MAGIC:
      raise ValueError(
        f"Expected an LMDB environment, found another file: {path}. Build the LMDB again, or use "
        "the TSV files."
      )
    page = _META.unpack(first)[1]
    if not 2 * _META.size <= page <= 2**16:
      raise ValueError(_damaged(path, 0))
    file.seek(page)
    second = file.read(_META.size)
  metas = [_META.unpack(x) for x in (first, second) if len(x) == _META.size]
  metas = [x for x in metas if x[0] == _MAGIC]  # of the two, the later transaction's counts
  _, _, levels, root, last, _ = max(metas, key=lambda meta: meta[-1])
  needed = (last + 1) * page
  if size < max(needed, 2 * page):
    raise ValueError(
      f"Expected {needed:,} bytes of the LMDB environment in {path}, found {size:,}: it was cut "
      "short. Copy it again."
    )
  return page, root, levels, last


def _check_pages(path: str, size: int, root: int, levels: int, last: int) -> None:
  """Follows the tree of pages, for LMDB ends the process where a page of it is another one.

  A copy that was broken off often has its full length and zeros behind what was copied.

  Raises:
    ValueError: a page is damaged.
  """
  waiting, left = ([] if root == _NO_PAGE else [(root, 1)]), last
  with open(path, "rb", buffering=0) as file:
    while waiting:
      number, level = waiting.pop()
      page = os.pread(file.fileno(), size, number * size)
      left -= 1
      if len(page) < size or left < 0:
        raise ValueError(_damaged(path, number))
      own, kind, lower, upper = _PAGE.unpack_from(page)
      expected = _LEAF if level == levels else _BRANCH  # all leaves are on the last level
      if own != number or kind & ~_DIRTY != expected or not _PAGE.size < lower <= upper <= size:
        raise ValueError(_damaged(path, number))
      places = np.frombuffer(page, "<u2", (lower - _PAGE.size) // 2, _PAGE.size).astype(np.int64)
      if places.min() < upper or places.max() > size - _NODE or (places % 2).any():
        raise ValueError(_damaged(path, number))
      words = np.frombuffer(page, "<u2").astype(np.int64)
      first, second, third, key = (words[places // 2 + i] for i in range(4))
      ends = places + _NODE + key
      if kind & _BRANCH:
        waiting += [(child, level + 1) for child in (first | second << 16 | third << 32).tolist()]
      else:
        length, elsewhere = first | second << 16, third == _ELSEWHERE
        if (third & ~_ELSEWHERE).any() or (ends[elsewhere] > size - 8).any():
          raise ValueError(_damaged(path, number))
        for end, bytes_ in zip(ends[elsewhere].tolist(), length[elsewhere].tolist(), strict=True):
          (start,) = struct.unpack_from("<Q", page, end)
          if start + -(-(_PAGE.size + bytes_) // size) > last + 1:
            raise ValueError(_damaged(path, number))
        ends += np.where(elsewhere, 8, length)
      if (ends > size).any():
        raise ValueError(_damaged(path, number))


def _damaged(path: str, page: int) -> str:
  return f"Expected a whole LMDB environment in {path}, found page {page} damaged. Copy it again."


# Behind the 16 bytes of a page's header: magic; size of a page; levels; root; last page;
# transaction.
_META = struct.Struct("<16xI20xI50xH32xQQQ")
_MAGIC = 0xBEEFC0DE
_PAGE = struct.Struct("<Q2xHHH")  # a page's header: number, kind, end of the places, first node
# A node's header, four numbers before its key, the last of which is the key's length: of a branch
# the others are the number of a page, of a leaf the length of its value in two, and whether that
# lies on pages of its own.
_NODE = 8
_ELSEWHERE = 1
_BRANCH, _LEAF, _DIRTY = 1, 2, 16
_NO_PAGE = 2**64 - 1
