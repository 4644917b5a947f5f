"""Checksums of the files of a folder, kept in it, so that a changed bit does not pass as a weight.

Model directories and the checkpoints of runs have them: size and CRC-32 of every file, written once
and compared when the folder is read. Folders without them, such as those of older versions, are
read as they are; so are all with the environment variable `OFA_JAX_VERIFY=0`.
"""

import concurrent.futures
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Iterable

NAME = "checksums.json"
_VARIABLE = "OFA_JAX_VERIFY"
ADVICE = f"if a file was edited on purpose, delete {NAME}; {_VARIABLE}=0 reads it as it is"
_CHUNK = 1 << 20
_log = logging.getLogger(__name__)


def write(directory: str | os.PathLike) -> None:
  """Writes the checksums of all files of a folder and of those in it, in place of older ones.

  Raises:
    OSError: a file cannot be read, or the folder not be written to.
  """
  directory = pathlib.Path(directory)
  names = sorted(
    path.relative_to(directory).as_posix()
    for path in directory.rglob("*")
    if path.is_file() and path != directory / NAME
  )
  sums = _sums(directory, names)
  content = {"algorithm": "crc32", "files": {name: list(sums[name]) for name in names}}
  made = directory / f".{NAME}.{os.getpid()}"
  made.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
  made.replace(directory / NAME)


def faults(
  directory: str | os.PathLike,
  *,
  part: tuple[int, int] = (0, 1),
  under: Iterable[str] = ("",),
  but: Iterable[str] = (),
) -> list[str]:
  """Compares the files of a folder with its checksums.

  Args:
    directory: with or without checksums; without there are no faults.
    part: (i, n) looks at every n-th file only, from the i-th, for n processes that share the work.
    under, but: only files whose names, relative to the folder, start so, and not so.

  Returns:
    A line on every file that is missing, or of another size or content.
  """
  directory = pathlib.Path(directory)
  stored = directory / NAME
  if os.environ.get(_VARIABLE) == "0" or not stored.is_file():
    return []
  try:
    content = json.loads(stored.read_text(encoding="utf-8"))
    known = {str(name): (int(size), int(crc)) for name, (size, crc) in content["files"].items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    return [f"{NAME}: expected checksums, found {error!r:.100}"]
  if any(pathlib.PurePosixPath(n).is_absolute() or ".." in n.split("/") for n in known):
    return [f"{NAME}: expected names of files in the folder, found others"]
  wanted, others = tuple(under), tuple(but)
  names = sorted(n for n in known if n.startswith(wanted) and not n.startswith(others))
  names = names[part[0] :: part[1]]
  lines, whole = [], []
  for name in names:
    path = directory / name
    size = path.stat().st_size if path.is_file() else None
    if size != known[name][0]:
      was = "is missing" if size is None else f"has {size:,} bytes"
      lines.append(f"{name} {was}, expected {known[name][0]:,} bytes")
    else:
      whole.append(name)
  sums = _sums(directory, whole)
  lines += [f"{n} has another content (CRC-32)" for n in whole if sums[n] != known[n]]
  return lines


def verify(
  directory: str | os.PathLike, *, under: Iterable[str] = ("",), but: Iterable[str] = ()
) -> None:
  """Raises ValueError, with every fault, if a folder is not as its checksums say; see `faults`."""
  raise_faults(directory, faults(directory, under=under, but=but))


def raise_faults(directory: str | os.PathLike, lines: list[str]) -> None:
  """Raises ValueError if there are faults, the lines of `faults`."""
  if lines:
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    raise ValueError(
      f"{directory}: expected the files as they were written, found that {'; '.join(lines[:5])}"
      f"{more}. Get the folder again; {ADVICE}"
    )


def add(directory: str | os.PathLike) -> None:
  """Writes the checksums of a folder where that can be done, and warns where it cannot.

  They are an addition: without them the folder is as good as one of an older version.
  """
  try:
    write(directory)
  except FileNotFoundError:
    return  # an old checkpoint, deleted meanwhile
  except OSError as error:
    _log.warning("%s: no checksums were written (%s)", directory, error)


def _sums(directory: pathlib.Path, names: list[str]) -> dict[str, tuple[int, int]]:
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    return dict(zip(names, pool.map(_sum, (directory / name for name in names)), strict=True))


def _sum(path: pathlib.Path) -> tuple[int, int]:
  size = crc = 0
  buffer = memoryview(bytearray(_CHUNK))
  with path.open("rb", buffering=0) as file:
    while count := file.readinto(buffer):
      crc = zlib.crc32(buffer[:count], crc)
      size += count
  return size, crc
