"""Chinese-CLIP's LMDB folders, for those who have them already; nothing needs them.

`<split>/imgs` maps an image id to the base64 of its file, `<split>/pairs` maps "0", "1", ... to a
pickled `(image_id, text_id, text)`, one for each edge between a caption and an image. The pickles
are read by an unpickler that knows no class and no function, so that a file from elsewhere cannot
run anything.
"""

import binascii
import os
import struct
import weakref
from collections.abc import Sequence

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
    with self._environment.begin() as transaction:
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
    with self._environment.begin() as transaction:
      text = transaction.get(bytes(self._keys[i]))
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
  with _open(path).begin() as transaction:
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
  check_files([os.path.join(directory, "data.mdb")])
  _check_length(os.path.join(directory, "data.mdb"))
  environment = _ENVIRONMENTS.get(directory)
  if environment is None:
    try:
      environment = lmdb.open(directory, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
      raise ValueError(
        f"Expected an LMDB environment, found {error}. Build the LMDB again, or use the TSV files."
      ) from error
    _ENVIRONMENTS[directory] = environment
  return environment


def _check_length(path: str) -> None:
  """The file is mapped into memory: a page behind its end would end the process by a bus error.

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
    file.seek(page)
    second = file.read(_META.size)
  metas = [_META.unpack(x) for x in (first, second) if len(x) == _META.size]
  metas = [x for x in metas if x[0] == _MAGIC]  # of the two, the later transaction's counts
  needed = (max(metas, key=lambda meta: meta[3])[2] + 1) * page
  if size < max(needed, 2 * page):
    raise ValueError(
      f"Expected {needed:,} bytes of the LMDB environment in {path}, found {size:,}: it was cut "
      "short. Copy it again."
    )


# Behind the 16 bytes of a page's header: magic; size of a page; last page; transaction.
_META = struct.Struct("<16xI20xI92xQQ")
_MAGIC = 0xBEEFC0DE
