"""What ends a run from outside: a notice to stop, and a step that never comes back.

A collective whose peer is gone or stuck waits for ever, and JAX has no limit of its own for it. The
watchdog of each process sees that no step has ended, shows where every thread stands, and exits.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from ofa_jax.engine import processes

ALLOWANCE = 10  # times the limit, for the first step, evaluations and saves
GRACE = 2  # seconds in which a process with nothing to save may end in order
TWICE = 0.5  # seconds within which a second signal is the first one, passed on by a launcher


class Watchdog:
  """Ends the process when a step takes too long; use as a context manager around the loop."""

  def __init__(self, limit: float | None):
    """Args: limit: seconds a step, None: off."""
    self._limit = limit
    self._allowed = self._deadline = None
    self._change = threading.Condition()
    self._done = False
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self):
    if self._limit is not None:
      self._thread.start()
    return self

  def __exit__(self, *_):
    with self._change:
      self._done = True
      self._change.notify()
    if self._thread.is_alive():
      self._thread.join()

  def beat(self, times: float = 1) -> None:
    """Something has ended; the next step, or what comes instead, may take `times` the limit.

    Nothing is limited before the first call.
    """
    if self._limit is None:
      return
    with self._change:
      self._allowed = times * self._limit
      self._deadline = time.monotonic() + self._allowed
      self._change.notify()

  def _watch(self):
    with self._change:
      while not self._done:
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
          break
        self._change.wait(left)
      if self._done:
        return
    processes.fail(
      f"no step has ended for {self._allowed:g} s (step_timeout={self._limit:g}); another process "
      "may be gone or stuck. The same command goes on from the newest checkpoint.",
      stacks=True,
    )


class Notice:
  """The notice to stop (SIGTERM or Ctrl-C), on which all processes agree; a context manager.

  It is obeyed where `reached` is asked, and at once where there is nothing to save. A second Ctrl-C
  ends the process at once, whatever it is doing: a thread reads the signals, for the main one may
  wait in a compilation or a collective.
  """

  def __init__(self, *, status: int = 0):
    """Args: status: of a process that ends at once, having nothing to save."""
    self._status = status
    self._told = self._agreed = False
    self._asked = 0
    self._first: float | None = None  # when the first signal came
    self._free: str | None = None  # what to say where nothing is lost
    self._leaving = False
    self._before: dict[int, object] = {}
    # Processes of one job learn of it through JAX, which makes them stop at the same place.
    self._shared = jax.distributed.is_initialized()

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      return self
    signals = (signal.SIGINT,) if self._shared else (signal.SIGINT, signal.SIGTERM)
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
    self._before = {number: signal.signal(number, self._handle) for number in signals}
    self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    if not self._before:
      return
    for number, handler in self._before.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    signal.set_wakeup_fd(self._fd_before)
    self._before = {}
    self._writer.close()  # the thread reads the end
    self._thread.join()
    self._reader.close()

  def reached(self) -> bool:
    """Must the run stop here?

    To be asked after every step and every batch of an evaluation, by every process equally often:
    the count is what they agree on.
    """
    if not self._shared:
      return self._told
    if not self._agreed:
      self._asked += 1
      self._agreed = multihost_utils.reached_preemption_sync_point(self._asked)
    return self._agreed

  @contextlib.contextmanager
  def nothing_to_save(self, text: str) -> Iterator[None]:
    """In this block a notice ends a process that is alone at once.

    Raises:
      Stopped: with the text.
    """
    if self._shared or not self._before:
      yield
      return
    self._free = text
    try:
      if self._told:
        self._stop(text)
      yield
    finally:
      self._free = None

  def _handle(self, *_):
    """In the main thread, when it comes back from where it is."""
    self._told = True
    if self._free is not None:
      self._stop(self._free)

  def _stop(self, text: str):
    self._leaving, self._free = True, None
    _say(text)
    raise processes.Stopped(text)

  def _read(self):
    """In the thread, at once."""
    while received := self._reader.recv(1):
      if received[0] not in self._before:
        continue
      now = time.monotonic()
      if self._first is None:
        self._first = now
        if received[0] == signal.SIGINT and self._shared:
          os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the other processes
        self._announce()
      elif received[0] == signal.SIGINT and now - self._first > TWICE:
        _say("Interrupted again: ended at once; the same command goes on from what is saved")
        processes.leave(processes.INTERRUPTED)

  def _announce(self):
    if self._free is not None:
      timer = threading.Timer(GRACE, self._leave, args=(self._free,))
      timer.daemon = True
      timer.start()
    elif not self._leaving:
      _say("Told to stop: saves as soon as this step or batch ends; Ctrl-C (again) ends at once")

  def _leave(self, text: str):
    if self._free is not None:  # the main thread is where no signal reaches it, compiling
      _say(text)
      processes.leave(self._status)


def _say(text: str) -> None:
  # Not through sys.stderr: the signal may have come while the main thread wrote to it.
  os.write(2, f"{text}\n".encode())
