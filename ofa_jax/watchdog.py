"""What ends a run from outside: a notice to stop, and a step that never comes back.

A collective whose peer is gone or stuck waits for ever, and JAX has no limit of its own for it. The
watchdog of each process sees that no step has ended, shows where every thread stands, and exits.
"""

import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

ALLOWANCE = 10  # times the limit, for the first step, evaluations and saves


class Watchdog:
  """Ends the process when a step takes too long; use as a context manager around the loop."""

  def __init__(self, limit: float | None, *, write: Callable[[str], None]):
    """Args: limit: seconds a step, None: off; write: takes the last words for the log."""
    self._limit, self._write = limit, write
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

  def fail(self, reason: str) -> None:
    """Says why, shows every thread's stack on stderr and in the log, and ends with status 1.

    Nothing is cleaned up: on several processes that would wait for those that are gone.
    """
    print(f"error: {reason}", file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+") as f:  # faulthandler writes to files only
      faulthandler.dump_traceback(f, all_threads=True)
      f.seek(0)
      stacks = f.read()
    print(stacks, file=sys.stderr, flush=True)
    # In a thread, for the one that hangs may hold what the log needs.
    last = threading.Thread(target=self._write, args=(f"{reason}\n{stacks}",), daemon=True)
    last.start()
    last.join(timeout=10)
    os._exit(1)

  def _watch(self):
    with self._change:
      while not self._done:
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
          break
        self._change.wait(left)
      if self._done:
        return
    self.fail(
      f"process {jax.process_index()} of {jax.process_count()}: no step has ended for "
      f"{self._allowed:g} s (step_timeout={self._limit:g}); another process may be gone or stuck. "
      "The same command goes on from the newest checkpoint. Stacks of all threads:"
    )


class Notice:
  """The notice to stop (SIGTERM), on which all processes agree; use as a context manager."""

  def __init__(self):
    self._told = False
    self._before = None
    # Processes of one job learn of it through JAX, which makes them stop at the same step.
    self._shared = jax.distributed.is_initialized()

  def __enter__(self):
    if not self._shared and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._tell)
    return self

  def __exit__(self, *_):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def reached(self, step: int) -> bool:
    """Must the run stop after this step? To be asked after every step, by every process."""
    if self._shared:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._told

  def _tell(self, *_):
    self._told = True
