"""Text files as people save them: UTF-8 with or without its mark, perhaps compressed.

Whatever is read by lines, as CSV or as JSON out of a person's hands is opened here, so that a file
saved by another program is read, or told as what it is: GBK, UTF-16, an archive. Nothing binary
gets into a message: `shown` escapes and cuts.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from ofa_jax import staging, storage

MARK = codecs.BOM_UTF8  # which Windows' programs write first
MAX_BYTES = 2**30  # of a file that is read whole

_SAMPLE = 2**16
_COMPRESSED = (
  (b"\x1f\x8b", "gzip"),
  (b"BZh", "bzip2"),
  (b"\xfd7zXZ", "xz"),
  (b"(\xb5/\xfd", "zstd"),
)
_OTHERS = (
  (b"PK\x03\x04", "a zip archive or a spreadsheet (.xlsx)"),
  (b"\xd0\xcf\x11\xe0", "a spreadsheet (.xls)"),
  (b"PAR1", "a Parquet file"),
  (b"Rar!", "a RAR archive"),
  (b"7z\xbc\xaf", "a 7z archive"),
  (b"%PDF", "a PDF"),
  (b"\x89PNG", "a PNG picture"),
  (b"\xff\xd8\xff", "a JPEG picture"),
)
_POINTER = b"version https://git-lfs"  # what stands in a clone for a large file
_PAGES = (b"<!doctype html", b"<html", b"<?xml")
_CURES = {
  "a file compressed": "Unpack it (gunzip, unzstd) and give the unpacked file",
  "a Git LFS pointer": "Fetch the file itself with: git lfs pull",
  "a web page": "Look at it, an error or a log-in perhaps, and download the file itself",
}


def shown(value: object, most: int = 80) -> str:
  """A value as part of a message: what cannot be printed is escaped, what is long is cut."""
  if isinstance(value, bytes):
    value = value[: 4 * most].decode("utf-8", "backslashreplace")
  text = value if isinstance(value, str) else repr(value)
  text = text[: most + 1]
  printed = printable(text[:most])
  return printed[:most] + ("..." if len(text) > most or len(printed) > most else "")


def printable(text: str, *, but: str = "") -> str:
  """A text with an escape for every character that a terminal would obey, those of `but` apart."""
  if text.isprintable():
    return text
  return "".join(c if c.isprintable() or c in but else ascii(c)[1:-1] for c in text)


def compression(path: str | os.PathLike) -> str | None:
  """What a file is compressed with, by its first bytes; None: nothing that is known."""
  with storage.opened(staging.staged(path)) as file:
    return _compression(file.read(8))


def fault(data: bytes) -> str | None:
  """Why the beginning of a file is no text in UTF-8, as "GBK, it seems"; None: it is such text.

  Args:
    data: the beginning, which may end inside a character.
  """
  begin = data[:8]
  if name := _compression(begin):
    return f"a file compressed with {name}"
  if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    return "UTF-16"
  for magic, name in _OTHERS:
    if begin.startswith(magic):
      return name
  if kind := in_place_of(data):
    return kind
  if 50 * data.count(b"\0") > len(data):  # fewer are a damaged row
    even, odd = data[::2].count(b"\0"), data[1::2].count(b"\0")
    return "UTF-16" if max(even, odd) > 4 * min(even, odd) + 1 else "binary data"
  if _decodes(data, "utf-8"):
    return None
  return "GBK, it seems" if _is_chinese(data) else "bytes that are not UTF-8"


def in_place_of(data: bytes) -> str | None:
  """What the beginning of a file says that it is in place of the file that is meant, or None."""
  if data.startswith(_POINTER):
    return "a Git LFS pointer, a few lines in place of the file (git lfs pull)"
  if data[:64].removeprefix(MARK).lstrip().lower().startswith(_PAGES):
    return "a web page"
  return None


def text_of(data: bytes) -> str:
  """The text that a whole small file is.

  Raises:
    ValueError: it is none; the message is what it seems to be.
  """
  reason = fault(data)
  if reason is None:
    try:
      return data.removeprefix(MARK).decode("utf-8")
    except UnicodeDecodeError:
      reason = "a character that is cut off"
  raise ValueError(reason)


def cure(path: str | os.PathLike, reason: str) -> str:
  """The message for a file that is no text in UTF-8, with what to do.

  Args:
    path: the file.
    reason: from `fault`.
  """
  name = shown(os.fspath(path), 300)
  how = 'Save it again as "CSV UTF-8", or "UTF-8" where no table is saved' + iconv(path, reason)
  how = next((c for kind, c in _CURES.items() if reason.startswith(kind)), how)
  return f"Expected {name} in UTF-8, found {reason}. {how}."


def iconv(path: str | os.PathLike, reason: str) -> str:
  """The command that makes UTF-8 of a file, as the end of a sentence; empty where none is known."""
  kind = next((k for k in ("GBK", "UTF-16") if reason.startswith(k)), None)
  name = shown(os.path.basename(path), 300)
  return f", or run: iconv -f {kind} -t UTF-8 {name} > NEW" if kind else ""


def check(path: str | os.PathLike) -> None:
  """Looks at the beginning of a file that is read in place, where single rows may be damaged.

  Raises:
    ValueError: it is compressed, in UTF-16 or binary, or most rows are in another encoding.
  """
  with storage.opened(staging.staged(path)) as file:
    data = file.read(16 * _SAMPLE)
  reason = fault(data)
  if reason and _only_rows(reason):
    rows = [row for row in data.split(b"\n")[:-1] if not row.isascii()]
    faulty = sum(not _decodes(row, "utf-8") for row in rows)
    # Two Chinese signs in GBK may happen to be UTF-8: rows that are do not acquit the file.
    if 2 * faulty < len(rows) or faulty < (2 if _is_chinese(data) else 3):
      return
  if reason:
    raise ValueError(cure(path, reason))


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """The bytes of a text file, unpacked (gzip, bzip2, xz, zstd) and without the mark of UTF-8.

  Raises:
    ValueError: UTF-16, binary or damaged; or packed by zstd without a package that reads it.
  """
  with contextlib.ExitStack() as stack:
    try:
      raw = stack.enter_context(storage.opened(staging.staged(path)))
      kind = _compression(raw.read(8))
      raw.seek(0)
      file = io.BufferedReader(stack.enter_context(_unpacked(raw, kind, path))) if kind else raw
      begin = file.peek(_SAMPLE)
      reason = fault(begin)
      if reason and not _only_rows(reason):  # lines are decoded one by one
        raise ValueError(cure(path, reason))
      if begin.startswith(MARK):
        file.read(len(MARK))
      yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
      raise ValueError(
        f"Expected {path} whole, found it damaged: {error}. Copy it again."
      ) from error


def lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
  """The lines of a file with their numbers, from 1; errors as `opened`."""
  with opened(path) as file:
    yield from enumerate(file, 1)


def decode(raw: bytes, path: str | os.PathLike) -> str:
  """A line, or all, of a file as text.

  Raises:
    ValueError: it is not UTF-8; the message names the file, what it seems to be, and the cure.
  """
  try:
    return raw.decode("utf-8")
  except UnicodeDecodeError as error:
    reason = fault(raw) or "a character that is cut off"
    where = f" (byte 0x{raw[error.start]:02x})" if reason.startswith("bytes") else ""
    raise ValueError(cure(path, reason + where)) from None


def read(path: str | os.PathLike) -> str:
  """The text of a whole file; errors as `opened` and `decode`, and for more than `MAX_BYTES`."""
  with opened(path) as file:
    data = file.read(MAX_BYTES + 1)
  if len(data) > MAX_BYTES:
    raise ValueError(f"Expected at most {MAX_BYTES:,} bytes of text in {path}, found more.")
  return decode(data, path)


def _only_rows(reason: str) -> bool:
  return reason.startswith(("GBK", "bytes"))


def _compression(begin: bytes) -> str | None:
  return next((name for magic, name in _COMPRESSED if begin.startswith(magic)), None)


def _unpacked(raw: BinaryIO, kind: str, path: str | os.PathLike) -> BinaryIO:
  if kind == "zstd":
    try:
      import zstandard
    except ImportError:
      raise ValueError(
        f"Expected a package that unpacks {path}, which is compressed with zstd, found none. "
        "unzstd it, or pip install zstandard"
      ) from None
    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
  return {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[kind](
    **{"fileobj" if kind == "gzip" else "filename": raw}
  )


def _decodes(data: bytes, encoding: str) -> bool:
  try:
    codecs.getincrementaldecoder(encoding)().decode(data)
  except UnicodeDecodeError:
    return False
  return True


def _is_chinese(data: bytes) -> bool:
  """Whether bytes that are not UTF-8 read as Chinese in GBK, most of whose signs are common."""
  if not _decodes(data, "gbk"):
    return False
  text = codecs.getincrementaldecoder("gbk")().decode(data)
  others = [c for c in text if ord(c) > 127]
  common = sum("\u4e00" <= c <= "\u9fff" or "\u3000" <= c <= "\uffef" for c in others)
  return 2 * common > len(others)
