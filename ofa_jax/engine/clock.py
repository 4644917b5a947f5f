"""Where the time of a run goes: its steps, and of them the waiting for data."""

import contextlib
import time


class Clock:
  """Seconds per step and seconds of it spent waiting for data, between log steps."""

  def __init__(self, done: int):
    self._begin = time.perf_counter()
    self._data = 0.0
    self._done = done

  @contextlib.contextmanager
  def waiting_for_data(self):
    begin = time.perf_counter()
    yield
    self._data += time.perf_counter() - begin

  @contextlib.contextmanager
  def paused(self):
    """Evaluations and saves do not count as steps."""
    begin = time.perf_counter()
    yield
    self._begin += time.perf_counter() - begin

  def lap(self, done: int) -> tuple[float, float]:
    """(seconds a step, seconds of it waiting for data) since the last call."""
    now = time.perf_counter()
    steps = done - self._done
    result = (now - self._begin) / steps, self._data / steps
    self._begin, self._data, self._done = now, 0.0, done
    return result
