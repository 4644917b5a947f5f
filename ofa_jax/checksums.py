"""Checksums of the files of a folder, kept in it, so that a changed bit does not pass as a weight.

Model directories and the checkpoints of runs have them: size and CRC-32 of every file, written once
and compared when the folder is read. In a bucket the checksums are the service's own (GCS has
CRC-32C) and nothing is read to compare them; where it has none, or they are of the other kind
because the folder was copied, the sizes are compared. Folders without checksums, such as those of
older versions, are read as they are; so are all with the environment variable `OFA_JAX_VERIFY=0`.
"""

import concurrent.futures
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable

from ofa_jax import storage

NAME = "checksums.json"
_VARIABLE = "OFA_JAX_VERIFY"
ADVICE = f"if a file was edited on purpose, delete {NAME}; {_VARIABLE}=0 reads it as it is"
_OWN, _OF_SERVICE = "crc32", "crc32c"
_CHUNK = 1 << 20
_log = logging.getLogger(__name__)


def write(directory: str | os.PathLike) -> None:
  """Writes the checksums of all files of a folder and of those in it, in place of older ones.

  Raises:
    OSError: a file cannot be read, or the folder not be written to.
  """
  if storage.in_bucket(directory):
    there = storage.files_below(directory)
    sums = {n: [o.stat.size, o.crc32c] for n, o in there.items() if n != NAME}
    content = {"algorithm": _OF_SERVICE, "files": sums}
    storage.write_bytes(storage.of(directory) / NAME, _encoded(content))
    return
  directory = pathlib.Path(directory)
  for left in directory.glob(f".{NAME}.*"):  # by who was killed amid this
    left.unlink(missing_ok=True)
  names = sorted(
    path.relative_to(directory).as_posix()
    for path in directory.rglob("*")
    if path.is_file() and path != directory / NAME
  )
  sums = _sums(directory, names)
  content = {"algorithm": _OWN, "files": {name: list(sums[name]) for name in names}}
  made = directory / f".{NAME}.{os.getpid()}"
  made.write_bytes(_encoded(content))
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
  directory = storage.of(directory)
  stored = directory / NAME
  if os.environ.get(_VARIABLE) == "0" or not storage.is_file(stored):
    return []
  try:
    content = json.loads(storage.read_bytes(stored))
    form = str if content.get("algorithm") == _OF_SERVICE else int
    known = {
      str(name): (int(size), None if crc is None else form(crc))
      for name, (size, crc) in content["files"].items()
    }
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    return [f"{NAME}: expected checksums, found {error!r:.100}"]
  if any(pathlib.PurePosixPath(n).is_absolute() or ".." in n.split("/") for n in known):
    return [f"{NAME}: expected names of files in the folder, found others"]
  wanted, others = tuple(under), tuple(but)
  names = sorted(n for n in known if n.startswith(wanted) and not n.startswith(others))
  names = names[part[0] :: part[1]]
  sizes, sum_of = _sizes_and_sums(directory, names, of_service=form is str)
  lines, whole = [], []
  for name in names:
    size = sizes.get(name)
    if size != known[name][0]:
      was = "is missing" if size is None else f"has {size:,} bytes"
      lines.append(f"{name} {was}, expected {known[name][0]:,} bytes")
    else:
      whole.append(name)
  sums = sum_of(whole)
  lines += [
    f"{n} has another content (CRC-32)"
    for n in whole
    if None not in (known[n][1], sums[n]) and sums[n] != known[n][1]
  ]
  return lines


def _sizes_and_sums(
  directory: pathlib.Path, names: list[str], *, of_service: bool
) -> tuple[dict[str, int], Callable[[list[str]], dict[str, int | str | None]]]:
  """The sizes of those files that are there, and what gives the checksums of some of them."""
  if storage.in_bucket(directory):
    there = storage.files_below(directory)
    sizes = {name: there[name].stat.size for name in names if name in there}
    return sizes, lambda some: {n: there[n].crc32c if of_service else None for n in some}
  places = {name: directory / name for name in names}
  sizes = {name: path.stat().st_size for name, path in places.items() if path.is_file()}
  if of_service:
    return sizes, dict.fromkeys
  return sizes, lambda some: {name: crc for name, (_, crc) in _sums(directory, some).items()}


def _encoded(content: dict) -> bytes:
  return (json.dumps(content, indent=1) + "\n").encode()


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
