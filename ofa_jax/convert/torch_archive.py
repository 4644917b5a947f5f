"""The three containers of PyTorch: zip archives, those of TorchScript, and the format before 1.6.

Zip archives have a checksum (CRC-32) of every record, which is compared before a record is used;
the old format has none. Records are then mapped into memory, read-only.
"""

import concurrent.futures
import mmap
import pathlib
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ofa_jax.convert import file_kinds, torch_pickle
from ofa_jax.convert.torch_constructors import (
  RefusedError,
  TensorView,
  Unsupported,
  itemsize,
)
from ofa_jax.convert.torch_pickle import ScriptObject

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before 1.6
MAX_PICKLE, MAX_CODE = 64 << 20, 64 << 20  # bytes
MAX_MODULES = 100_000
MAX_EXPANDED = 1 << 20  # elements of a tensor that repeats a smaller one
_CHUNK = 1 << 20


class Archive:
  """An opened file: its content, with tensors as `TensorView`, and their numbers on demand."""

  def __init__(self, path: pathlib.Path):
    """Reads the pickle of a file.

    Raises:
      ValueError: no PyTorch file, a damaged one, or one that may want to run code.
    """
    self.path = path
    self._records: dict[str, tuple[int, int, int | None]] = {}  # key -> (start, bytes, CRC)
    self._checked: set[str] = set()
    with path.open("rb") as file:
      self.size = path.stat().st_size
      start = file_kinds.check(path, file, size=self.size)
      self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      self.content = self._open_zip(file) if start.startswith(b"PK\x03\x04") else self._open_old()

  def tensors(self, views: Mapping[str, TensorView], *, verify: bool) -> dict[str, np.ndarray]:
    """Makes arrays of tensors, as views of the file.

    Args:
      views: by name.
      verify: compare the checksums of their records first, where the file has them.

    Raises:
      ValueError: a record is damaged, or a tensor is not inside its record; all of them.
    """
    if verify:
      self._verify({view.storage.key for view in views.values()})
    arrays, problems = {}, []
    for name, view in views.items():
      try:
        arrays[name] = self._array(view)
      except ValueError as error:
        problems.append(f"{name}: {error}")
    if problems:
      raise ValueError(f"expected tensors inside the file, found {_first(problems)}")
    return arrays

  def _open_zip(self, file: Any) -> Any:
    entries = _entries(file, self._map)
    mains = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
    if not mains:
      raise ValueError(
        f"a zip archive without a data.pkl (it has {_first(sorted(entries), limit=3)}); expected "
        "what torch.save or torch.jit.save writes"
      )
    root = mains[0].removesuffix("data.pkl")
    for name, info in entries.items():
      if name.startswith(f"{root}data/"):
        key = name.removeprefix(f"{root}data/")
        if info.compress_type != zipfile.ZIP_STORED:
          raise ValueError(
            f"a zip archive with compressed tensors ({name[:80]}), which PyTorch does not write; "
            "load and save it with PyTorch once"
          )
        self._records[key] = (_record_start(file, info), info.file_size, info.CRC)
    order = entries.get(f"{root}byteorder")
    if order and _read(file, order, limit=100) != b"little":
      raise ValueError("numbers that are not little-endian; load and save them with PyTorch once")
    script = f"{root}constants.pkl" in entries
    pickled = _read(file, entries[mains[0]], limit=MAX_PICKLE)
    content, _ = torch_pickle.load(pickled, script=script)
    if not script:
      return content
    code = [e for n, e in entries.items() if n.startswith(f"{root}code/") and n.endswith(".py")]
    if sum(info.file_size for info in code) > MAX_CODE:
      raise ValueError("a TorchScript archive with more code than any model's")
    classes = {}
    for info in code:
      module = info.filename.removeprefix(f"{root}code/").removesuffix(".py").replace("/", ".")
      text = _read(file, info, limit=MAX_CODE).decode("utf-8", "replace")
      classes |= _classes(module, text)
    return _script_tensors(content, classes)

  def _open_old(self) -> Any:
    if self.size > 512 and self._map[257:262] == b"ustar":
      raise ValueError("the tar format of PyTorch before 0.2; load and save it with PyTorch once")
    window, at, values = self._map[: MAX_PICKLE + _CHUNK], 0, []
    for _ in range(3):
      value, at = torch_pickle.load(window, at)
      values.append(value)
      if type(values[0]) is not int or values[0] != MAGIC:
        raise ValueError("a pickle that torch.save has not written")
    if values[1] != PROTOCOL or type(values[2]) is not dict:
      raise ValueError(f"another format of PyTorch (protocol {str(values[1])[:20]})")
    if values[2].get("little_endian") is not True:
      raise ValueError("numbers that are not little-endian; load and save them with PyTorch once")
    storages: dict[str, str] = {}
    content, at = torch_pickle.load(window, at, storages=storages)
    keys, at = torch_pickle.load(window, at)
    if type(keys) is not list or not all(type(key) is str for key in keys):
      raise ValueError("a pickle without the list of its storages")
    for key in keys:
      if at + 8 > self.size or key not in storages:
        raise ValueError(f"a file that ends before its storage {key[:40]!r}")
      (numel,) = struct.unpack("<q", self._map[at : at + 8])
      at += 8
      size = numel * itemsize(storages[key])
      if numel < 0 or at + size > self.size:
        raise ValueError(f"a file that ends inside its storage {key[:40]!r}")
      self._records[key] = (at, size, None)
      at += size
    return content

  def _verify(self, keys: Iterable[str]) -> None:
    wanted = [key for key in keys if key in self._records and key not in self._checked]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      damaged = [
        key
        for key, whole in zip(wanted, pool.map(self._is_whole, wanted), strict=True)
        if not whole
      ]
    if damaged:
      names = _first([f"data/{key}" for key in sorted(damaged)])
      raise ValueError(
        f"{len(damaged)} of {len(wanted)} records that differ from their checksums ({names}); the "
        "file is damaged, get it again"
      )
    self._checked |= set(wanted)

  def _is_whole(self, key: str) -> bool:
    start, size, expected = self._records[key]
    if expected is None:
      return True
    # Read, not taken from the map: pages of it would count as memory of this process.
    crc = 0
    with self.path.open("rb", buffering=0) as file:
      file.seek(start)
      buffer = memoryview(bytearray(min(_CHUNK, max(size, 1))))
      while size:
        count = file.readinto(buffer[: min(size, _CHUNK)])
        if not count:
          return False
        crc = zlib.crc32(buffer[:count], crc)
        size -= count
    return crc == expected

  def _array(self, view: TensorView) -> np.ndarray:
    key, start = view.storage.key, view.storage.start
    if key not in self._records:
      raise ValueError(f"no record data/{key[:40]}")
    begin, size, _ = self._records[key]
    dtype = np.dtype(ml_dtypes.bfloat16 if view.dtype == "bfloat16" else view.dtype)
    if view.storage.numel * itemsize(view.storage.dtype) > size:
      raise ValueError(f"{view.storage.numel:,} elements in a record of {size:,} bytes")
    last = sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True))
    number = int(np.prod(view.shape, dtype=object)) if view.shape else 1
    offset = view.offset + start
    if not number:
      return np.zeros(view.shape, dtype)
    if (offset + last + 1) * dtype.itemsize > size:
      raise ValueError(f"{tuple(view.shape)} at {offset} in a record of {size:,} bytes")
    if number > max(size // dtype.itemsize, MAX_EXPANDED):
      raise ValueError(f"{number:,} elements that repeat those of {size:,} bytes")
    strides = tuple(step * dtype.itemsize for step in view.strides)
    at = begin + offset * dtype.itemsize
    return np.ndarray(view.shape, dtype, buffer=self._map, offset=at, strides=strides)


def _entries(file: Any, mapped: mmap.mmap) -> dict[str, zipfile.ZipInfo]:
  """The records of a zip archive by name."""
  try:
    with zipfile.ZipFile(file) as archive:
      infos = archive.infolist()
  except Exception as error:  # on damaged bytes it raises anything
    raise ValueError(f"a zip archive that is cut short{_cut_in(mapped)}; get it again") from error
  entries = {info.filename: info for info in infos}
  if len(entries) != len(infos):
    raise ValueError("a zip archive that holds a name twice")
  for info in infos:
    if info.flag_bits & 1:
      raise ValueError(f"an encrypted zip archive ({info.filename[:80]}); decrypt it first")
    if info.header_offset < 0 or info.header_offset + 30 + info.compress_size > len(mapped):
      raise ValueError(f"a zip archive that ends before its record {info.filename[:80]}")
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
      raise ValueError(f"a zip archive with two sizes of {info.filename[:80]}")
  return entries


def _record_start(file: Any, info: zipfile.ZipInfo) -> int:
  """Where the bytes of a record start: behind a header of its own."""
  file.seek(info.header_offset)
  header = file.read(30)
  if len(header) != 30 or header[:4] != b"PK\x03\x04":
    raise ValueError(f"a zip archive with a damaged header of {info.filename[:80]}")
  name, extra = struct.unpack("<HH", header[26:])
  stored = file.read(name)
  if stored not in (info.filename.encode(), info.filename.encode("cp437", "replace")):
    raise ValueError(f"a zip archive with two names of {info.filename[:80]}")
  return info.header_offset + 30 + name + extra


def _read(file: Any, info: zipfile.ZipInfo, *, limit: int) -> bytes:
  """A small record whole, compared with its checksum."""
  if info.file_size > limit:
    raise ValueError(f"{info.file_size:,} bytes of {info.filename[:80]}, more than any model's")
  file.seek(_record_start(file, info))
  data = file.read(info.compress_size)
  if info.compress_type == zipfile.ZIP_DEFLATED:  # of code
    try:
      data = zlib.decompressobj(-15).decompress(data, info.file_size + 1)
    except zlib.error:
      data = b""
  if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
    raise ValueError(
      f"a record that differs from its checksum ({info.filename[:80]}); the file is damaged, get "
      "it again"
    )
  return data


def _cut_in(mapped: mmap.mmap) -> str:
  """Says inside which record a zip archive ends, whose list of records was at its lost end."""
  at = len(mapped)
  for _ in range(1000):  # the four bytes may also be among a tensor's
    at = mapped.rfind(b"PK\x03\x04", 0, at)
    if at < 0:
      break
    length = int.from_bytes(mapped[at + 26 : at + 28], "little")
    name = mapped[at + 30 : at + 30 + length]
    if b"/" in name and name.isascii() and name.decode().isprintable():
      return f" in its record {name.decode()[:80]}"
  return ""


def _classes(module: str, text: str) -> dict[str, tuple[list[str] | None, bool]]:
  """By class of TorchScript code: its parameters and buffers, and whether code restores it.

  Only the lines that declare them are looked at; None: it declares none, as before PyTorch 1.5.
  """
  classes = {}
  for block in re.split(r"(?m)^class ", text)[1:]:
    name = re.match(r"\w+", block)
    lists = re.findall(r"(?m)^  __(?:parameters|buffers)__ = \[(.*)\]$", block)
    names = [n for line in lists for n in re.findall(r'"([^"\\]*)"', line)] if lists else None
    if name:
      restores = re.search(r"(?m)^  def __setstate__\(", block) is not None
      classes[f"{module}.{name[0]}"] = (names, restores)
  return classes


def _script_tensors(
  content: Any, classes: Mapping[str, tuple[list[str] | None, bool]]
) -> dict[str, Any]:
  """Parameters and buffers of a TorchScript module by dotted name, as its `state_dict` has them."""
  if type(content) is not ScriptObject:
    raise ValueError(f"a TorchScript archive of a {type(content).__name__}, expected a module")
  tensors, waiting, visited = {}, [("", content, 0)], 0
  while waiting:
    prefix, module, depth = waiting.pop()
    visited += 1
    names, restores = classes.get(module.kind, (None, False))
    if restores or module.attributes is None:
      raise RefusedError(
        f"{module.kind.removeprefix('__torch__.')[:80]}.__setstate__, code of the archive itself"
      )
    if visited > MAX_MODULES or depth > 100:
      raise ValueError("a TorchScript archive with more modules than any model's, or one in itself")
    inner = []
    for name, value in module.attributes.items():
      if type(value) is ScriptObject:
        inner.append((f"{prefix}{name}.", value, depth + 1))
      elif type(value) in (TensorView, Unsupported) and (names is None or name in names):
        tensors[f"{prefix}{name}"] = value
    waiting += reversed(inner)
  return tensors


def _first(items: list[str], *, limit: int = 5) -> str:
  more = f" and {len(items) - limit} more" if len(items) > limit else ""
  return "; ".join(items[:limit]) + more
