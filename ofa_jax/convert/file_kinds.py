"""What a file is that was meant to hold weights, told by its first bytes."""

import os
import pathlib
import stat
from typing import BinaryIO

_KINDS: tuple[tuple[bytes, str], ...] = (
  (
    b"version https://git-lfs",
    "a Git LFS pointer, a few lines of text in place of the weights; fetch them with: git lfs pull",
  ),
  (b"\x1f\x8b", "a gzip file; unpack it with: gunzip"),
  (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it with: zstd -d"),
  (b"\xfd7zXZ", "an xz file; unpack it with: unxz"),
  (b"BZh", "a bzip2 file; unpack it with: bunzip2"),
  (b"Rar!", "a RAR archive; unpack it"),
  (b"7z\xbc\xaf", "a 7-Zip archive; unpack it"),
  (b"\x89HDF", "an HDF5 file, which PyTorch has not written"),
  (b"\x93NUMPY", "a NumPy array, which PyTorch has not written"),
  (b"GGUF", "a GGUF file, which PyTorch has not written"),
  (b"PK\x05\x06", "an empty zip archive"),
  (b"\x89PNG", "a picture"),
  (b"\xff\xd8\xff", "a picture"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


def check(path: pathlib.Path, file: BinaryIO, *, size: int) -> bytes:
  """Returns the first bytes of a file.

  Raises:
    ValueError: they are of something that holds no weights, with what to do.
  """
  require_regular(path)
  start = file.read(512)
  file.seek(0)
  if not size:
    raise ValueError("an empty file; get it again")
  for magic, kind in _KINDS:
    if start.startswith(magic):
      raise ValueError(kind)
  if not any(start):
    raise ValueError("zeros, as a download leaves that was broken off; get it again")
  text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
  if text.startswith(_PAGES):
    raise ValueError(
      "a web page in place of the weights, such as an error or a log-in; look at it, and download "
      "the file itself"
    )
  if text.startswith((b"{", b"[")) and not is_safetensors(start, size=size):
    raise ValueError("JSON text in place of the weights; look at it, and download the file itself")
  return start


def is_safetensors(start: bytes, *, size: int) -> bool:
  """Whether a file with these first bytes is of the safetensors format."""
  header = int.from_bytes(start[:8], "little")
  return len(start) > 8 and start[8:9] == b"{" and 2 <= header <= size - 8


def require_regular(path: str | os.PathLike) -> int:
  """Returns the size of a file in bytes.

  Raises:
    ValueError: there is none, or it is a device, a pipe or a folder, which may have no end.
  """
  try:
    status = os.stat(path)
  except OSError as error:
    raise ValueError(f"nothing that can be opened ({error.strerror})") from error
  if not stat.S_ISREG(status.st_mode):
    raise ValueError("a folder, device or pipe, expected a file")
  return status.st_size
