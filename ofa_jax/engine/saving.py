"""Saves that fail are told at once and tried again."""

import re
import time
from collections.abc import Callable

import jax

from ofa_jax.engine.checkpoint import Checkpoints
from ofa_jax.engine.faults import SaveError
from ofa_jax.engine.processes import AGAIN, describe, status_of
from ofa_jax.engine.step import State

WAITS = (0.0, 5.0, 20.0)  # seconds before each further try


class Saver:
  """Saves the states of a run in the background and tries again where that fails.

  What is tried again is the state of the step that the run has reached by then: the one that could
  not be saved is gone. On several processes nothing is tried again, for those whose part was saved
  already wait for the one that failed; the run ends there.
  """

  def __init__(
    self,
    checkpoints: Checkpoints,
    *,
    say: Callable[[str], None],
    waits: tuple = WAITS,
    before: Callable[[], None] = lambda: None,
  ):
    """Opens it.

    Args:
      checkpoints: of the run.
      say: takes a line about a failure.
      waits: seconds before each further try.
      before: is called before each save; an OSError of it counts as one of the save.
    """
    self._before = before
    self.checkpoints, self._say, self._waits = checkpoints, say, waits
    self._failures = 0
    self._next: float | None = None  # when to try again

  def save(self, state: State) -> None:
    """Starts saving; the state may be donated as soon as this returns.

    Raises:
      SaveError: it was the last try.
    """
    self._note(self.checkpoints.outcome(wait=True))
    self._next = None
    try:
      self._before()
      self.checkpoints.save(state)
    except Exception as error:
      self._failed(error)

  def poll(self, state: State) -> None:
    """To be called after every step: tells of a failure, and saves again when it is time.

    Raises:
      SaveError: the last try has failed.
    """
    self._note(self.checkpoints.outcome())
    if self._next is not None and time.monotonic() >= self._next:
      self.save(state)

  def finish(self, state: State) -> None:
    """Returns when this state is on disk.

    Raises:
      SaveError: it cannot be saved.
    """
    self.save(state)
    self._note(self.checkpoints.outcome(wait=True))
    while self._next is not None:
      time.sleep(max(0.0, self._next - time.monotonic()))
      self.save(state)
      self._note(self.checkpoints.outcome(wait=True))

  def _note(self, outcome: bool | Exception) -> None:
    if isinstance(outcome, Exception):
      self._failed(outcome)
    elif outcome:
      self._failures = 0

  def _failed(self, error: Exception) -> None:
    if jax.process_count() > 1 and status_of(error) == AGAIN:
      raise error  # another process is gone, and the place has no fault
    self.checkpoints.remove_partial()
    step = self.checkpoints.latest()
    kept = (
      "no checkpoint is complete" if step is None else f"step {step} is the newest complete one"
    )
    reason = f"Saving a checkpoint failed: {_short(error)}"
    if jax.process_count() > 1 or self._failures == len(self._waits):
      tries = f" ({self._failures + 1} times in a row)" if self._failures else ""
      raise SaveError(
        f"{reason}{tries}. In {self.checkpoints.folder} {kept}; make room or give the right to "
        f"write there, and the same command {'starts anew' if step is None else 'goes on from it'}."
      ) from error
    wait = self._waits[self._failures]
    self._failures += 1
    self._next = time.monotonic() + wait
    when = f"in {wait:g} s" if wait else "now"
    self._say(f"{reason} ({kept}). Trying again {when}, {self._failures} of {len(self._waits)}")


def _short(error: Exception) -> str:
  """What the operating system said, out of the long messages of the library that writes arrays."""
  text = describe(error)
  known = re.search(r"([A-Z][a-z ]+) \[os_error_code=", text)
  return known[1] if known else text.splitlines()[0][:300]
