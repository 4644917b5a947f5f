"""One writer at a time in a bucket: an object beside what is written that names who writes it.

It is made on the condition that there is none (GCS: generation 0; S3: If-None-Match), and written
again every few seconds with a growing number, a sign of life. Who finds one looks whether the
number grows: if not, its writer is gone, and is replaced. Where a service knows no conditions, or
two find a dead one at the same moment, the later one wins, which the earlier one sees when it reads
the object back: the rule is weaker than that of a local disk, where the kernel says who is alive.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from ofa_jax import storage

SETTLE = 1.0  # seconds after which it is read back


@contextlib.contextmanager
def held(place: str, *, beat: float, silence: int) -> Iterator[dict[str, Any] | None]:
  """Holds the lock `place` during the block; gives the holder that was gone, if there was one.

  Args:
    place: the object.
    beat: seconds between two signs of life.
    silence: beats without one after which a holder is gone.

  Raises:
    Held: another process has it.
    OSError: it cannot be written.
  """
  mine = {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    "token": secrets.token_hex(8),
    "beat": 0,
  }
  before = _take(place, mine, beat=beat, silence=silence)
  done = threading.Event()
  thread = threading.Thread(target=_keep_alive, args=(place, mine, done, beat), daemon=True)
  thread.start()
  try:
    time.sleep(SETTLE)
    now = _read(place) or {}
    if now.get("token") != mine["token"]:
      raise Held(now)
    yield before
  finally:
    done.set()
    thread.join()
    with contextlib.suppress(OSError):
      if (_read(place) or {}).get("token") == mine["token"]:
        storage.remove(place)


class Held(Exception):  # noqa: N818 (what is so, not what went wrong)
  """Another process has the lock; `holder` says which."""

  def __init__(self, holder: dict[str, Any]):
    super().__init__(holder)
    self.holder = holder


def _take(place: str, mine: dict[str, Any], *, beat: float, silence: int) -> dict[str, Any] | None:
  holder = _read(place)
  if holder is None:
    with contextlib.suppress(FileExistsError):
      _write(place, mine, new=True)
      return None
    holder = _read(place) or {}
    if holder.get("token") == mine["token"]:  # it was made, and the answer was lost
      return None
  if _alive(place, holder, beat=beat, silence=silence):
    raise Held(holder)
  _write(place, mine)
  return holder


def _alive(place: str, holder: dict[str, Any], *, beat: float, silence: int) -> bool:
  if holder.get("host") == socket.gethostname() and isinstance(holder.get("pid"), int):
    try:
      os.kill(holder["pid"], 0)
    except ProcessLookupError:
      return False
    except OSError:
      pass
  print(
    f"Waiting up to {silence * beat:g} s for a sign of life of the process that wrote to {place} "
    "before",
    file=sys.stderr,
    flush=True,
  )
  end = time.monotonic() + silence * beat
  while time.monotonic() < end:
    time.sleep(beat / 2)
    now = _read(place)
    if now is None:
      return False
    if (now.get("token"), now.get("beat")) != (holder.get("token"), holder.get("beat")):
      return True
  return False


def _keep_alive(place: str, mine: dict[str, Any], done: threading.Event, beat: float) -> None:
  number = 0
  while not done.wait(beat):
    number += 1
    with contextlib.suppress(OSError):  # the next beat comes
      now = _read(place)
      if done.is_set():
        return
      if now is not None and now.get("token") != mine["token"]:
        print(
          f"error: {place} was taken over by process {now.get('pid')} on {now.get('host')}: two "
          "processes write there. End one of them.",
          file=sys.stderr,
          flush=True,
        )
        return
      _write(place, mine | {"beat": number})


def _read(place: str) -> dict[str, Any] | None:
  """The holder; None where there is no lock."""
  try:
    holder = json.loads(storage.read_bytes(place))
  except FileNotFoundError:
    return None
  except ValueError:
    return {}
  return holder if isinstance(holder, dict) else {}


def _write(place: str, holder: dict[str, Any], *, new: bool = False) -> None:
  storage.write_bytes(place, f"{json.dumps(holder)}\n".encode(), new=new)
