"""Image-text pairs in WebDataset's tar shards, read by random access.

A sample is the members of one shard that share a name up to its first dot: `0001.jpg` with
`0001.txt`, or with a field of `0001.json`. WebDataset reads shards from front to back, so that its
order is one of shards and of a buffer. Here each shard is scanned once for the places of its
members (`ofa_jax.data.index`), and every row can be read at any time, as from the other formats.
"""

import dataclasses
import functools
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from ofa_jax import storage, text_files
from ofa_jax.data import index, values
from ofa_jax.data.table import Captions
from ofa_jax.data.tsv import BadRow, Texts, check_files

IMAGES = ("jpg", "jpeg", "png", "webp")  # the first of these that a sample has
INDEX_VERSION = 2
_WITHOUT = "\0"  # in place of the captions' field: nothing but images is read


class TarImages(index.Shards):
  """The images of complete samples, shard after shard.

  The id of an image is `shard/key`, the number of the shard and the name of the sample.

  Args:
    files: the shards.
    shards: for each of them keys, offsets and sizes of its images.
  """

  def __init__(self, files: Sequence[str], shards: Sequence["_Index"]):
    super().__init__(files, [len(shard.keys) for shard in shards])
    self._keys = np.concatenate([shard.keys for shard in shards])
    self._starts = np.concatenate([shard.starts for shard in shards])
    self._sizes = np.concatenate([shard.sizes for shard in shards])

  @property
  def ids(self) -> list[str]:
    """The id of every image, in order."""
    shards = np.repeat(np.arange(len(self.files)), np.diff(self._begins))
    keys = zip(shards.tolist(), self._keys.tolist(), strict=True)
    return [_id(shard, key.decode()) for shard, key in keys]

  def find(self, ids: Sequence[str]) -> np.ndarray:
    """The row of each id: int64[N], -1 where the shards have no such image."""
    row = {image_id: i for i, image_id in enumerate(self.ids)}
    return np.array([row.get(image_id, -1) for image_id in ids], np.int64)

  def name(self, i: int) -> str:
    """`shard:key` of a row, for messages."""
    return f"{self.files[self._shard(i)]}:{self._keys[i].decode()}"

  def encoded(self, i: int) -> bytes:
    """The bytes of image file `i`; BadRow when the shard cannot be read."""
    try:
      return self._read(i, self._starts[i], self._sizes[i])
    except OSError as error:
      raise BadRow(self.name(i), str(error)) from error


def read_tar(
  paths: Sequence[str | os.PathLike], *, caption: str | None = None, index_dir: str | None = None
) -> tuple[TarImages, Texts]:
  """Reads images and captions of shards; samples that lack one of them are left out and named.

  Args:
    paths: `.tar` files, not compressed.
    caption: the field of `.json` members that holds the caption; None: it is in `.txt` members.
    index_dir: see `ofa_jax.data.index.load`.

  Raises:
    ValueError: a shard is missing, compressed or damaged (all are counted, the first five named),
      or no sample is complete.
  """
  files = tuple(storage.absolute(path) for path in paths)
  check_files(files)
  version = (INDEX_VERSION, zlib.crc32((caption or "").encode()))
  scan = functools.partial(_scan, caption=caption)
  shards, damaged = [], []
  for path in files:
    try:
      shards.append(index.load(path, form=_Index, scan=scan, version=version, index_dir=index_dir))
    except (tarfile.TarError, ValueError, OSError) as error:
      packed = text_files.compression(path)
      damaged.append(f"{path} ({f'compressed with {packed}' if packed else error})")
  if damaged:
    raise ValueError(
      f"Expected whole tar files that are not compressed, found {len(damaged)} others: "
      f"{', '.join(damaged[:5])}. Unpack compressed ones (gunzip); copy damaged ones again."
    )
  captions, faults = Captions(), []
  for number, shard in enumerate(shards):
    for row, (key, text) in enumerate(zip(shard.keys.tolist(), shard.captions(), strict=True)):
      captions.add(text, image=_id(number, key.decode()), place=(number, row))
    if shard.faults.size:
      lines = shard.faults.tobytes().decode().split("\n")
      faults += [f"{files[number]}:{line}" for line in lines]
  note = ""
  if faults:
    note = f"Left out {len(faults)} incomplete samples: {'; '.join(faults[:5])}"
    note += "; ..." if len(faults) > 5 else ""
  if not sum(len(shard.keys) for shard in shards):
    wanted = (
      ""
      if caption == _WITHOUT
      else (f" and a caption ({'.txt' if caption is None else f'{caption!r} in .json'})")
    )
    raise ValueError(
      f"Expected samples of an image ({', '.join(IMAGES)}){wanted}, found none in "
      f"{', '.join(files[:3])}. {note}"
    )
  return TarImages(files, shards), captions.texts(files, notes=(note,) if note else ())


def read_tar_images(
  paths: Sequence[str | os.PathLike], *, index_dir: str | None = None
) -> TarImages:
  """Reads the images of shards, whether or not they have captions; see `read_tar`."""
  return read_tar(paths, caption=_WITHOUT, index_dir=index_dir)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Index:
  keys: np.ndarray  # bytes[N], names of the complete samples
  starts: np.ndarray  # int64[N], first byte of the image
  sizes: np.ndarray  # int64[N], its bytes
  text: np.ndarray  # uint8[...], the captions one after the other in UTF-8
  ends: np.ndarray  # int64[N], end of each in `text`
  faults: np.ndarray  # uint8[...], a line `key reason` for each incomplete sample

  def captions(self) -> list[str]:
    """The caption of every sample."""
    text, begins = self.text.tobytes(), [0, *self.ends.tolist()]
    return [text[a:b].decode() for a, b in itertools.pairwise(begins)]


def _id(shard: int, key: str) -> str:
  return f"{shard}/{key}"


def _scan(path: str, *, caption: str | None) -> _Index:
  samples = {}  # key -> extension -> its members; keys in the order of their first one
  with storage.opened(path) as file:
    for member in _members(file):
      folder, _, name = member.name.removeprefix("./").rpartition("/")
      key, dot, extension = name.partition(".")
      if member.isreg() and not member.issparse() and dot and key:
        members = samples.setdefault(f"{folder}/{key}" if folder else key, {})
        members.setdefault(extension.lower(), []).append(member)
    keys, starts, sizes, texts, faults = [], [], [], [], []
    for key, members in samples.items():
      key = key.encode(errors="backslashreplace")
      try:
        image = _member(members, IMAGES)
        text = b"" if caption == _WITHOUT else _caption(file, members, caption).encode()
      except ValueError as error:
        faults.append(b"%s %s" % (key.replace(b"\n", b" "), str(error).encode()))
        continue
      keys.append(key)
      starts.append(image.offset_data)
      sizes.append(image.size)
      texts.append(text)
  return _Index(
    np.array(keys, dtype=bytes),
    np.array(starts, np.int64),
    np.array(sizes, np.int64),
    np.frombuffer(b"".join(texts), np.uint8),
    np.cumsum([len(text) for text in texts], dtype=np.int64),
    np.frombuffer(b"\n".join(faults), np.uint8),
  )


def _member(members: dict[str, list[tarfile.TarInfo]], kinds: Sequence[str]) -> tarfile.TarInfo:
  """The member of a sample with the first of these extensions; ValueError if it has none or two."""
  for kind in kinds:
    match members.get(kind):
      case [member]:
        return member
      case [_, *_]:
        raise ValueError(f"has .{kind} twice")
  raise ValueError(f"has no .{', .'.join(kinds)}")


def _caption(file: BinaryIO, members: dict[str, list[tarfile.TarInfo]], field: str | None) -> str:
  """The caption of a sample; ValueError where it has none."""
  kind = "txt" if field is None else "json"
  member = _member(members, [kind])
  file.seek(member.offset_data)
  try:
    content = text_files.text_of(file.read(member.size))
  except ValueError as reason:
    raise ValueError(f"has a .{kind} that is not UTF-8 ({reason})") from None
  try:
    text = content if field is None else json.loads(content)[field]
  except (ValueError, RecursionError):
    raise ValueError("has a .json that is none") from None
  except (KeyError, TypeError):
    raise ValueError(f"has no field {field!r} in its .json") from None
  text = values.caption(text).strip()
  if not text:
    raise ValueError("has an empty caption")
  return text


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
  """The members of a file, which may be several tar files one behind the other."""
  begin = 0
  while begin is not None:
    file.seek(begin)
    tar = tarfile.TarFile(fileobj=file)  # it does not close what it was given
    if begin and tar.firstmember is None:
      raise tarfile.ReadError(f"no tar file follows its end at byte {begin:,}")
    yield from tar
    # A tar file ends with a block of zeros; tarfile accepts any end that lies between members.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
      raise tarfile.ReadError(f"cut short at byte {tar.offset:,}")
    begin = _next_block(file, tar.offset)


def _next_block(file: BinaryIO, begin: int) -> int | None:
  """Where the first block from `begin` on lies that is not zeros; None: there is none."""
  file.seek(begin)
  while chunk := file.read(tarfile.RECORDSIZE):
    zeros = len(chunk) - len(chunk.lstrip(b"\0"))
    if zeros < len(chunk):
      return begin + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    begin += len(chunk)
  return None
