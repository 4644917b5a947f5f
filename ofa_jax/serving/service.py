"""The service itself: models, the batches of their rows, threads that decode, and when to stop."""

import asyncio
import concurrent.futures
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ofa_jax.serving.batcher import Batcher, Closed, Full, Late
from ofa_jax.serving.limits import Limits, Refused
from ofa_jax.serving.measures import Measures
from ofa_jax.serving.models import Kind, Served
from ofa_jax.text_files import shown

_log = logging.getLogger(__name__)
Value = TypeVar("Value")


class Service:
  """What all requests share.

  Attributes:
    models: by their names.
    limits: of requests.
    measures: what is counted.
    ready: whether the programs are compiled and work is taken.
    stopping: whether new requests are refused.
    active: requests that are not answered yet.
    held: bytes of their bodies.
  """

  def __init__(self, models: Sequence[Served], *, limits: Limits, most: int, wait: float):
    """Starts the thread that owns the models.

    Args:
      models: with different names.
      limits: of requests.
      most: rows of a batch.
      wait: seconds that the first row of a batch waits for others.

    Raises:
      ValueError: two models of one name.
    """
    self.models: Mapping[str, Served] = {model.name: model for model in models}
    if len(self.models) < len(models):
      names = ", ".join(model.name for model in models)
      raise ValueError(f"Expected models whose folders have different names, found {names}")
    self.limits, self.measures = limits, Measures()
    self.ready = self.stopping = False
    self.active = self.held = 0
    self._most = most
    self._pool = concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)), "pictures")
    self._batcher = Batcher(self._run, most=most, wait=wait, room=limits.queue, began=self._began)

  @property
  def alive(self) -> bool:
    """Whether the thread that owns the models runs."""
    return self._batcher.alive

  def compile(self, *, now: bool = True, told: Callable[[str], None] = print) -> None:
    """Compiles the programs of all kinds and sizes of batches, and is ready then.

    It waits for the thread that owns the models, and may run in another than the requests.

    Args:
      now: False leaves it to the first requests.
      told: takes a line about each model.
    """
    for model in self.models.values() if now else ():
      begin, programs = time.monotonic(), 0
      for kind, rows in model.first_rows(self._most):
        if self.stopping:
          return
        self._batcher.submit(kind, rows, deadline=float("inf")).result()
        programs += 1
      told(f"{model.name}: {programs} programs in {time.monotonic() - begin:.1f} s")
    self.ready = True

  async def aside(self, function: Callable[..., Value], *args: Any, **options: Any) -> Value:
    """What a function returns, called in a thread that may take long."""
    call = lambda: function(*args, **options)  # noqa: E731
    return await asyncio.get_running_loop().run_in_executor(self._pool, call)

  async def compute(self, kind: Kind, rows: Sequence[Any], *, deadline: float) -> list:
    """The results of rows, which may be computed together with those of other requests.

    Args:
      kind: of all rows.
      rows: from the model's `picture`, or texts.
      deadline: of `time.monotonic`.

    Raises:
      Refused: the queue is full, it took too long, the service stops, or the model's own words why
        it does not take them.
    """
    try:
      future = self._batcher.submit(kind, rows, deadline=deadline)
      self.measures.waiting.set(self._batcher.waiting)
      async with asyncio.timeout(deadline - time.monotonic()):
        return await asyncio.wrap_future(future)
    except Full as error:
      raise Refused(429, f"Try again later: {error}.", reason="queue") from None
    except Closed as error:
      raise Refused(503, f"Try elsewhere: {error}.", reason="stopping") from None
    except (Late, TimeoutError):
      raise late(self.limits) from None
    except ValueError as error:
      raise Refused(422, shown(str(error), 500), reason="model") from error

  def stop(self) -> None:
    """Refuses requests from now on; those that are there are finished."""
    self.stopping = True

  def close(self, *, within: float) -> bool:
    """Ends the threads; returns whether all work was done within some seconds."""
    self.stopping = True
    self._pool.shutdown(wait=False, cancel_futures=True)
    return self._batcher.close(within=within)

  def _run(self, kind: Kind, rows: list) -> Sequence:
    return self.models[kind.model].run(kind, rows)

  def _began(self, kind: Kind, rows: int) -> None:
    if self.ready:  # those of compiling are nobody's
      self.measures.rows.labels(kind.what).observe(rows)
    self.measures.waiting.set(self._batcher.waiting)


def late(limits: Limits) -> Refused:
  """What a client is told whose answer is not ready in time."""
  text = f"Found no answer within the deadline, {limits.deadline:g} s or what was asked for."
  return Refused(504, text, reason="deadline")
