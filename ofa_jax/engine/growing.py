"""Text files that grow line by line, on a disk or in a bucket.

An object is always written as a whole, and services take about one write a second to one name
(GCS). So lines are gathered and the object is written again every few seconds, at `flush` and at
the end; a killed process loses the lines since then, none of those before its last checkpoint,
for every save flushes. A local file has each line at once.
"""

import contextlib
import threading
import time
import weakref

from ofa_jax import storage

EVERY = 5.0  # seconds between two writes of an object
LAST = 5.0  # seconds that a process which ends at once waits for its last lines


_open: "weakref.WeakSet[Growing]" = weakref.WeakSet()


def write_last_lines(*, within: float = LAST) -> None:
  """Flushes what is open in buckets, for a process that ends without closing it; raises nothing."""
  for file in list(_open):
    thread = threading.Thread(target=_flushed, args=(file,), daemon=True)
    thread.start()
    thread.join(within)


def _flushed(file: "Growing") -> None:
  with contextlib.suppress(Exception):
    file.flush()


class Growing:
  """One file that is appended to; of a bucket it must be closed.

  Args:
    path: local or in a bucket; what is there stays.
    every: seconds between two writes of an object.
  """

  def __init__(self, path: str, *, every: float = EVERY):
    self._path, self._every = path, every
    self._remote = storage.in_bucket(path)
    if self._remote:
      _open.add(self)
    self._pending = threading.Event()
    self._ended = threading.Event()
    self._text = threading.Lock()
    self._writing = threading.Lock()
    self._thread: threading.Thread | None = None
    self._content: bytearray | None = None
    self._written = 0

  def append(self, text: str) -> None:
    """Adds a line, or several, with their ends."""
    if not self._remote:
      with open(self._path, "a", encoding="utf-8") as file:
        file.write(text)
      return
    with self._text:
      if self._content is None:
        there = storage.exists(self._path)
        self._content = bytearray(storage.read_bytes(self._path) if there else b"")
        self._written = len(self._content)
      self._content += text.encode()
    if self._thread is None:
      self._thread = threading.Thread(target=self._write_on, name="growing", daemon=True)
      self._thread.start()
    self._pending.set()

  def flush(self) -> None:
    """Returns when everything is written.

    Raises:
      OSError: it cannot be.
    """
    with self._writing:
      with self._text:
        self._pending.clear()
        if self._content is None or len(self._content) == self._written:
          return
        content = bytes(self._content)
      storage.write_bytes(self._path, content)
      self._written = len(content)

  def close(self) -> None:
    """Writes the rest; errors as `flush`."""
    _open.discard(self)
    self._ended.set()
    self._pending.set()
    if self._thread is not None:
      self._thread.join()
    self.flush()

  def _write_on(self) -> None:
    while not self._ended.is_set():
      self._pending.wait()
      begin = time.monotonic()
      try:
        self.flush()
      except OSError:
        self._pending.set()  # the next try, or `flush`, which raises it where it is waited for
      self._ended.wait(max(0.0, self._every - (time.monotonic() - begin)))
