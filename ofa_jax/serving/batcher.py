"""Rows of many clients, put together into batches for the one thread that owns the models.

A batch begins when there are enough rows of one kind, or when the oldest has waited long enough;
while one is computed the next ones gather. Nothing here knows of HTTP or of models.
"""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any


class Full(RuntimeError):  # noqa: N818 (not a fault of the program)
  """As many rows wait as may."""


class Late(RuntimeError):  # noqa: N818
  """A job's deadline passed before it was begun."""


class Closed(RuntimeError):  # noqa: N818
  """No more work is taken."""


@dataclasses.dataclass(eq=False)
class _Job:
  """The rows that one client gave together.

  Attributes:
    key: of its kind.
    rows: what is to be computed.
    deadline: of `time.monotonic`, after which nobody wants the results.
    came: when it was given.
    future: gets the list of the results.
    results: those so far.
    missing: how many are not computed yet.
  """

  key: Hashable
  rows: Sequence[Any]
  deadline: float
  came: float
  future: Future
  results: list
  missing: int

  def wanted(self) -> bool:
    """Whether it is still to be computed; says so to its client where it is too late."""
    if self.future.done():  # cancelled, or another batch with rows of it failed
      return False
    if time.monotonic() < self.deadline:
      return True
    self.fail(Late("waited too long for its turn"))
    return False

  def fail(self, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # its client has gone
      self.future.set_exception(error)

  def give(self, place: int, result: Any) -> None:
    self.results[place] = result
    self.missing -= 1
    if not self.missing:
      with contextlib.suppress(InvalidStateError):
        self.future.set_result(self.results)


def worthwhile(there: int) -> int:
  """How many of the rows that are there make a batch.

  Batches are padded to powers of two, and a large model takes as long for padding as for rows: five
  are better computed as four, and the fifth with those that come meanwhile.
  """
  floor = 1 << (there.bit_length() - 1)
  return floor if 2 * there < 3 * floor else there


class Batcher:
  """A queue of rows, and the thread that computes them.

  Attributes:
    waiting: rows that are not begun.
  """

  def __init__(
    self,
    run: Callable[[Hashable, list[Any]], Sequence[Any]],
    *,
    most: int,
    wait: float,
    room: int,
    began: Callable[[Hashable, int], None] = lambda key, rows: None,
  ):
    """Starts the thread.

    Args:
      run: `(key, rows) -> their results`, called in the thread only.
      most: rows of a batch.
      wait: seconds that the first row of a batch waits for others of its key.
      room: rows that may wait.
      began: told of the key and the rows of every batch, in the thread.
    """
    self._run, self._most, self._wait, self._room, self._began = run, most, wait, room, began
    self._queues: dict[Hashable, collections.deque[tuple[_Job, int]]] = {}
    self._changed = threading.Condition()
    self._closed = False
    self.waiting = 0
    # A daemon: a compilation that nobody waits for any more cannot be interrupted.
    self._thread = threading.Thread(target=self._loop, name="models", daemon=True)
    self._thread.start()

  @property
  def alive(self) -> bool:
    """Whether the thread runs."""
    return self._thread.is_alive()

  def submit(self, key: Hashable, rows: Sequence[Any], *, deadline: float) -> Future:
    """Takes rows; the future gets the list of their results.

    Args:
      key: rows with equal keys are computed together.
      rows: any number.
      deadline: of `time.monotonic`.

    Raises:
      Full: there is no room for all of them.
      Closed: `close` was called.
    """
    job = _Job(key, rows, deadline, time.monotonic(), Future(), [None] * len(rows), len(rows))
    with self._changed:
      if self._closed:
        raise Closed("the service is stopping")
      if self.waiting + len(rows) > self._room:
        raise Full(f"{self.waiting} rows are waiting, and there is room for {self._room}")
      if not rows:
        job.future.set_result([])
        return job.future
      self._queues.setdefault(key, collections.deque()).extend((job, i) for i in range(len(rows)))
      self.waiting += len(rows)
      self._changed.notify()
    return job.future

  def close(self, *, within: float | None = None) -> bool:
    """Takes nothing more and finishes what is there; returns whether all was, in time.

    Args:
      within: seconds to wait; None: as long as it takes.
    """
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._thread.join(within)
    return not self._thread.is_alive()

  def _loop(self) -> None:
    while True:
      with self._changed:
        while (key := self._ready()) is None:
          if self._closed and not self._queues:
            return
          self._changed.wait(self._patience())
        queue = self._queues[key]
        taken = [queue.popleft() for _ in range(min(self._most, worthwhile(len(queue))))]
        if not queue:
          del self._queues[key]
        self.waiting -= len(taken)
      self._compute(key, [(job, i) for job, i in taken if job.wanted()])

  def _ready(self) -> Hashable | None:
    """Of the kinds that have a whole batch, or waited long enough, the one that waits longest."""
    now = time.monotonic()
    came = {key: queue[0][0].came for key, queue in self._queues.items()}
    ready = [
      key
      for key, queue in self._queues.items()
      if self._closed or len(queue) >= self._most or now >= came[key] + self._wait
    ]
    return min(ready, key=came.__getitem__, default=None)

  def _patience(self) -> float | None:
    """Seconds until something is ready; None: nothing is there."""
    first = min((queue[0][0].came for queue in self._queues.values()), default=None)
    return None if first is None else max(0.0, first + self._wait - time.monotonic())

  def _compute(self, key: Hashable, taken: list[tuple[_Job, int]]) -> None:
    if not taken:
      return
    self._began(key, len(taken))
    try:
      results = self._run(key, [job.rows[i] for job, i in taken])
    except Exception as error:
      jobs = list(dict.fromkeys(job for job, _ in taken))
      if len(jobs) == 1:
        jobs[0].fail(error)
        return
      for job in jobs:  # what one client gave is not to cost another one its answer
        self._compute(key, [(other, i) for other, i in taken if other is job])
      return
    for (job, i), result in zip(taken, results, strict=True):
      job.give(i, result)
