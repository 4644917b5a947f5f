"""One writer at a time: a file beside what is written that names who writes it.

The file is locked in the kernel, so that it is free the moment its process is gone, and its time is
renewed every few seconds, for file systems that do not tell one host of the locks of another.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

from ofa_jax import storage
from ofa_jax.engine import bucket_lock

NAME = "in-use.json"  # in a folder; beside a file F it is F.in-use.json
BEAT = 5.0  # seconds between two signs of life
BUCKET_BEATS = 2  # of these between two signs of life in a bucket, which are requests
SILENCE = 3  # beats without one after which the writer on another host is gone


class HeldError(ValueError):
  """Another process writes there."""


@contextlib.contextmanager
def one_writer(
  path: str | os.PathLike, *, file: bool = False, beat: float = BEAT
) -> Iterator[str | None]:
  """Keeps other processes from writing to a folder, or to a file, while the block runs.

  Gives a note on a process that has left without unlocking, or None. In a bucket the file is an
  object, see `bucket_lock`.

  Args:
    path: the folder, which is made if it is missing and goes again if nothing comes into it, or the
      file.
    file: it is a file.
    beat: seconds between two signs of life.

  Raises:
    HeldError: another process has it; the message names it.
    OSError: the place cannot be written to.
  """
  if storage.in_bucket(path):
    with _in_bucket(os.fspath(path).rstrip("/"), file=file, beat=BUCKET_BEATS * beat) as note:
      yield note
    return
  path = pathlib.Path(path)
  place = path.with_name(f"{path.name}.{NAME}") if file else path / NAME
  new = [p for p in (place.parent, *place.parent.parents) if not p.exists()]
  handle, note = _acquire(place, what=path, beat=beat)
  done = threading.Event()
  thread = threading.Thread(target=_keep_alive, args=(handle, done, beat), daemon=True)
  thread.start()
  try:
    yield note
  finally:
    done.set()
    thread.join()
    with contextlib.suppress(OSError):
      place.unlink()  # before it is unlocked: who opened it meanwhile sees that it is gone
    with contextlib.suppress(OSError):
      for folder in new:  # nothing came of it
        folder.rmdir()
    os.close(handle)


@contextlib.contextmanager
def _in_bucket(path: str, *, file: bool, beat: float) -> Iterator[str | None]:
  place = f"{path}.{NAME}" if file else f"{path}/{NAME}"
  with contextlib.ExitStack() as stack:
    try:
      before = stack.enter_context(bucket_lock.held(place, beat=beat, silence=SILENCE))
    except bucket_lock.Held as error:
      raise HeldError(_held(path, error.holder, place)) from None
    yield before and _left(path, before)


def _acquire(place: pathlib.Path, *, what: pathlib.Path, beat: float) -> tuple[int, str | None]:
  """The open, locked lock file, and a note where it was left behind."""
  while True:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
      file = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:  # its last holder has just removed the folder
      continue
    try:
      if not _lock(file):
        raise HeldError(_held(what, _holder(file), place))
      if not _is(file, place):  # its holder has just removed it
        os.close(file)
        continue
      note = None
      holder = _holder(file)
      if holder:
        if _alive(file, holder, beat):
          raise HeldError(_held(what, holder, place))
        note = _left(what, holder)
      mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
      os.ftruncate(file, 0)
      os.pwrite(file, f"{json.dumps(mine)}\n".encode(), 0)
    except BaseException:
      with contextlib.suppress(OSError):
        os.close(file)
      raise
    return file, note


def _lock(file: int) -> bool:
  """False where another process holds it; a file system without locks leaves it to `_alive`."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
      raise
  return True


def _is(file: int, place: pathlib.Path) -> bool:
  try:
    return os.fstat(file).st_ino == os.stat(place).st_ino
  except FileNotFoundError:
    return False


def _holder(file: int) -> dict[str, str | int]:
  try:
    holder = json.loads(os.pread(file, 4096, 0) or b"{}")
  except ValueError:  # written half, as its process ended
    return {}
  return holder if isinstance(holder, dict) else {}


def _alive(file: int, holder: dict, beat: float) -> bool:
  """Does the one who left the file unlocked still give signs of life, from another host?"""
  if holder.get("host") == socket.gethostname():
    return False  # this host's kernel would have said so
  seen = os.fstat(file).st_mtime_ns
  text = (
    f"Waiting {SILENCE * beat:g} s for a sign of life of {_who(holder)} which wrote here before"
  )
  print(text, file=sys.stderr, flush=True)
  # What clocks of two hosts say is not compared: only whether the time changes.
  end = time.monotonic() + SILENCE * beat
  while time.monotonic() < end:
    time.sleep(beat / 5)
    if os.fstat(file).st_mtime_ns != seen:
      return True
  return False


def _keep_alive(file: int, done: threading.Event, beat: float) -> None:
  while not done.wait(beat):
    with contextlib.suppress(OSError):
      os.utime(file)


def _left(what: str | os.PathLike, holder: dict) -> str:
  return f"{_who(holder)} was writing to {what} and is gone; this process takes over"


def _held(what: str | os.PathLike, holder: dict, place: str | os.PathLike) -> str:
  return (
    f"Expected to be the only one that writes to {what}, found {_who(holder)} at it. Wait for it, "
    f"end it, or take another place (its lock is {place})."
  )


def _who(holder: dict) -> str:
  host, pid, since = (holder.get(k, "?") for k in ("host", "pid", "since"))
  return f"process {pid} on {host}, started {since},"


def _now() -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S")
