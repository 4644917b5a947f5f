"""Files and folders that appear whole or not at all, whatever ends the process that writes them."""

import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator

from ofa_jax import storage


class FullDiskError(ValueError):
  """Nothing more can be written; the text says where, and what to do."""


@contextlib.contextmanager
def written_whole(path: str | os.PathLike, *, replace: bool = False) -> Iterator[pathlib.Path]:
  """Gives a path to write a file or folder to, which becomes `path` if nothing is raised.

  What a killed process of this machine left half-written of the same path is removed. What goes to
  a bucket is written to a local folder for temporary files and copied at the end, of a folder its
  `config.json` last.

  Args:
    path: its parents are made.
    replace: a file that is there already gives way at the end.

  Raises:
    ValueError: without `replace`: `path` exists, now or at the end.
    OSError: with `replace`: what is there cannot be replaced; where the new file was put instead.
  """
  if storage.in_bucket(path):
    with _copied_to_bucket(os.fspath(path), replace=replace) as made:
      yield made
    return
  path = pathlib.Path(path).resolve()
  if not replace:
    _check_free(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  remove_leftovers(path)
  made = path.with_name(temporary(path.name))
  try:
    yield made
    if replace:
      _replace(made, path)
    else:
      _check_free(path)
      made.rename(path)
  finally:
    _remove(made)


# What the system says where nothing more can be written; libraries quote it in errors of their own.
_FULL = tuple(os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def full_disk(error: BaseException) -> str | None:
  """What the system said of a full disk, if that is why an error was raised, or one before it."""
  seen: BaseException | None = error
  while seen is not None:
    texts = (getattr(seen, "strerror", None) or "", str(seen))
    said = [full for full in _FULL if any(full in text for text in texts)]
    if said:
      return said[0]
    seen = seen.__cause__ or seen.__context__
  return None


@contextlib.contextmanager
def room_for(path: str | os.PathLike) -> Iterator[None]:
  """Makes one message of whatever is raised in the block because the disk is full.

  Args:
    path: what is written in it.

  Raises:
    FullDiskError: it is.
  """
  try:
    yield
  except FullDiskError:
    raise
  except Exception as error:
    said = full_disk(error)
    if said is None:
      raise
    raise FullDiskError(
      f"Expected room for {path}, found: {said}. Make room, or choose another place, and start the "
      "same command again"
    ) from error


def at_home(path: str | os.PathLike) -> pathlib.Path:
  """The path with its ~ replaced by the home directory; ValueError where there is none."""
  if storage.in_bucket(path):
    return storage.of(path)
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise ValueError(
      f"Expected a home directory for {path}, found none. Set HOME, or give another folder."
    ) from error


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  """Writes a small file, local or in a bucket, that is always the old one or the new one."""
  if storage.in_bucket(path):
    storage.write_bytes(path, content)  # an object appears whole by itself
    return
  with written_whole(path, replace=True) as made, open(made, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())  # else a power cut may leave the name without the bytes


def write_text(path: str | os.PathLike, text: str) -> None:
  """`write_bytes` of a text in UTF-8."""
  write_bytes(path, text.encode())


def temporary(name: str) -> str:
  """A name for what becomes the file or folder `name` beside it; a killed writer's is removed."""
  return f".{name}.{_writer()}.{secrets.token_hex(4)}"


def remove_leftovers(path: pathlib.Path) -> None:
  """Removes what killed processes of this machine left half-written beside `path`."""
  host, _ = _writer().rsplit(".", 1)
  # More than once where one such path is written within another.
  name = re.compile(rf"\.+{re.escape(path.name)}(?:\.{re.escape(host)}\.(\d+)\.[0-9a-f]{{8}})+")
  for entry in os.listdir(path.parent):
    leftover = name.fullmatch(entry)
    if leftover and not _alive(int(leftover[1])):
      with contextlib.suppress(OSError):  # another process was faster
        _remove(path.with_name(entry))


@contextlib.contextmanager
def _copied_to_bucket(path: str, *, replace: bool) -> Iterator[pathlib.Path]:
  if not replace:
    _check_free(path)
  with tempfile.TemporaryDirectory(prefix="ofa_jax-") as folder:
    made = pathlib.Path(folder) / path.rstrip("/").rpartition("/")[2]
    yield made
    if not replace:
      _check_free(path)
    try:
      storage.upload(made, path)
    except BaseException:
      if not replace:
        with contextlib.suppress(OSError):
          storage.remove(path)
      raise


def _replace(made: pathlib.Path, path: pathlib.Path) -> None:
  try:
    made.replace(path)
  except OSError as error:
    if not made.exists():
      raise
    kept = made.with_name(f"{path.name}.{secrets.token_hex(4)}")
    made.rename(kept)  # the work of hours, perhaps
    raise OSError(f"{path} cannot be replaced ({error.strerror}); it is whole in {kept}") from error


def _check_free(path: str | os.PathLike) -> None:
  if storage.exists(path):
    raise ValueError(f"{path} exists already; remove it or choose another name")


def _writer() -> str:
  host = re.sub(r"[^\w-]", "_", socket.gethostname())[:32]
  return f"{host}.{os.getpid()}"


def _alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:  # there, but another user's
    return True
  return True


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
