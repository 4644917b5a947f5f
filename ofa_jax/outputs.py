"""Places where a command will write are looked at before its work begins, not after hours of it."""

import errno
import os
import pathlib
import stat
from collections.abc import Iterable

from ofa_jax import files, storage

_PROBE = bytes(64 << 10)  # written and removed: a full disk often has a few bytes left


def check_file(
  path: str | os.PathLike,
  *,
  flag: str = "--output",
  inputs: Iterable[str | os.PathLike | None] = (),
  makes_parents: bool = True,
) -> None:
  """Makes sure that a file can be written, in place of one that is there.

  Args:
    path: the file; "": a fault.
    flag: what a person gave it as.
    inputs: what the command reads, which must not be the same.
    makes_parents: folders that are missing will be made.

  Raises:
    ValueError: it is a folder or a device, an input, a folder on the way is missing, or nothing can
      be written there.
  """
  expected = f"Expected a file that can be written in {flag}, found"
  if _is_url(path, expected):
    _check_object(os.fspath(path), expected, inputs=inputs)
    return
  place = pathlib.Path(path)
  if not place.name or os.fspath(path).endswith("/"):
    raise ValueError(f"{expected} the folder {os.fspath(path)!r}. Name a file in it")
  mode = _mode(place, expected)
  if mode is not None and stat.S_ISDIR(mode):
    raise ValueError(f"{expected} the folder {path}. Name a file in it, or another place")
  if mode is not None and not stat.S_ISREG(mode):
    raise ValueError(f"{expected} {path}, a device or pipe: what is written appears as a whole")
  for other in inputs:
    if other is not None and _same(place, other):
      raise ValueError(f"{expected} {path}, which is read too. Choose another name")
  real = pathlib.Path(os.path.realpath(place))
  _check_below(real.parent, real.name, expected, makes_parents=makes_parents)


def check_folder(path: str | os.PathLike, *, flag: str = "--output") -> None:
  """Makes sure that files can be written into a folder, which will be made if it is missing.

  Raises:
    ValueError: as `check_file`; it is a file.
  """
  expected = f"Expected a folder that can be written to in {flag}, found"
  if _is_url(path, expected):
    if storage.is_file(path):
      raise ValueError(f"{expected} the object {path}. Name a folder, or another place")
    _probe(os.fspath(path).rstrip("/"), expected)
    return
  if not os.fspath(path):
    raise ValueError(f"{expected} an empty name")
  mode = _mode(pathlib.Path(path), expected)
  if mode is not None and not stat.S_ISDIR(mode):
    raise ValueError(f"{expected} the file {path}. Name a folder, or another place")
  _check_below(pathlib.Path(os.path.realpath(path)), "probe", expected, makes_parents=True)


def check_new(path: str | os.PathLike, *, flag: str = "--output") -> None:
  """Makes sure that a file or folder can be made where there is none.

  Raises:
    ValueError: something is there; or as `check_file`.
  """
  expected = f"Expected a new file or folder that can be written in {flag}, found"
  if _is_url(path, expected):
    if storage.exists(path):
      raise ValueError(f"{path} exists already; remove it or choose another name")
    _probe(os.path.dirname(os.fspath(path).rstrip("/")), expected)
    return
  if not pathlib.Path(path).name:
    raise ValueError(f"{expected} {os.fspath(path)!r}")
  if _mode(pathlib.Path(path), expected) is not None:
    raise ValueError(f"{path} exists already; remove it or choose another name")
  real = pathlib.Path(os.path.realpath(path))
  _check_below(real.parent, real.name, expected, makes_parents=True)


def _is_url(path: str | os.PathLike, expected: str) -> bool:
  if "://" in os.fspath(path) and not storage.in_bucket(path):
    raise ValueError(f"{expected} {path}. Name a local path, or one of gs:// or s3://")
  return storage.in_bucket(path)


def _check_object(path: str, expected: str, *, inputs: Iterable[str | os.PathLike | None]) -> None:
  if path.endswith("/") or path.count("/") < 3:
    raise ValueError(f"{expected} the folder {path!r}. Name a file in it")
  if any(other is not None and os.fspath(other) == path for other in inputs):
    raise ValueError(f"{expected} {path}, which is read too. Choose another name")
  if storage.is_dir(path):
    raise ValueError(f"{expected} the folder {path}. Name a file in it, or another place")
  _probe(os.path.dirname(path), expected)


def _probe(folder: str, expected: str) -> None:
  """Writes a few bytes below a name in a bucket, and removes them."""
  probe = f"{folder}/{files.temporary('probe')}"
  try:
    storage.write_bytes(probe, _PROBE[:16])
    storage.remove(probe)
  except OSError as error:
    raise ValueError(f"{expected} that nothing can be written to {folder}: {error}") from error


def _mode(path: pathlib.Path, expected: str) -> int | None:
  """The kind of what is there; None: nothing."""
  try:
    return path.stat().st_mode
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as error:  # no right to look, a loop of links, a NUL in the name
    raise ValueError(f"{expected} {path}: {_reason(error)}") from error


def _same(path: pathlib.Path, other: str | os.PathLike) -> bool:
  try:
    return os.path.samefile(path, other)
  except OSError:
    return os.path.realpath(path) == os.path.realpath(other)


def _check_below(folder: pathlib.Path, name: str, expected: str, *, makes_parents: bool) -> None:
  """Writes a few bytes to the folder, or to the one in which it will be made, and removes them."""
  there = folder
  while _mode(there, expected) is None:
    there = there.parent
  if not there.is_dir():
    raise ValueError(f"{expected} a place below {there}, which is a file, not a folder")
  if there != folder and not makes_parents:
    raise ValueError(f"{expected} that there is no folder {folder}. Make it first")
  probe = there / files.temporary(name)
  try:
    files.remove_leftovers(there / name)
    with open(probe, "xb") as file:
      file.write(_PROBE)
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise ValueError(f"{expected} that nothing can be written to {there}: {_reason(error)}") from (
      error
    )
  finally:
    _remove(probe)


def _remove(probe: pathlib.Path) -> None:
  try:
    probe.unlink(missing_ok=True)
  except OSError:
    return  # what could not be made


def _reason(error: Exception) -> str:
  cures = {
    errno.ENOSPC: "Make room, or choose another place",
    errno.EDQUOT: "Make room, or choose another place",
    errno.EACCES: "Get the right to write there, or choose another place",
    errno.EPERM: "Get the right to write there, or choose another place",
    errno.EROFS: "Choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name",
  }
  number = getattr(error, "errno", None)
  text = getattr(error, "strerror", None) or str(error)
  return f"{text}. {cures.get(number, 'Choose another place')}"
