"""A save that fails is told of and tried again, a few times."""

import dataclasses
import sys
import types

import jax
import pytest

from ofa_jax.engine import faults, processes, saving


@dataclasses.dataclass
class State:
  step: int


class Disk:
  """Checkpoints on a disk that is full for the first `full` saves; `late`: noticed afterwards."""

  folder = "runs/x/checkpoints"

  def __init__(self, full, *, late):
    self.full, self.late = full, late
    self.saved = []
    self.pending = False
    self.partial = 0

  def save(self, state):
    assert not self.partial  # it would take the room of this one
    error = OSError(28, "No space left on device", "runs/x/checkpoints/array")
    self.full -= 1
    self.pending = True
    if self.full >= 0:
      self.pending, self.partial = error, 1
      if not self.late:
        self.pending = False
        raise error
    else:
      self.saved.append(state.step)

  def outcome(self, *, wait=False):
    pending, self.pending = self.pending, False
    return pending

  def remove_partial(self):
    self.partial = 0

  def latest(self):
    return max(self.saved, default=None)


@pytest.fixture(params=[True, False], ids=["in the background", "at once"])
def late(request):
  return request.param


def test_a_failure_is_told_at_the_next_step_and_the_state_of_then_is_saved(late):
  disk, lines = Disk(1, late=late), []
  saver = saving.Saver(disk, say=lines.append, waits=(0.0, 0.0))
  saver.save(State(10))
  saver.poll(State(11))
  saver.poll(State(12))
  assert disk.saved == [11]
  (line,) = lines
  assert line == (
    "Saving a checkpoint failed: No space left on device: runs/x/checkpoints/array (no checkpoint "
    "is complete). Trying again now, 1 of 2"
  )


def test_the_next_try_waits_for_its_time(late):
  disk, lines = Disk(2, late=late), []
  saver = saving.Saver(disk, say=lines.append, waits=(0.0, 1000.0))
  for step in range(10, 20):
    saver.save(State(step)) if step == 10 else saver.poll(State(step))
  assert disk.saved == [] and [line[-6:] for line in lines] == ["1 of 2", "2 of 2"]
  saver.save(State(20))  # the regular one does not wait for it
  saver.poll(State(21))
  assert disk.saved == [20]


def test_the_last_failure_is_an_error_that_names_the_newest_checkpoint(late):
  disk, lines = Disk(0, late=late), []
  saver = saving.Saver(disk, say=lines.append, waits=(0.0, 0.0))
  saver.save(State(9))
  disk.full = 3
  with pytest.raises(saving.SaveError, match=r"3 times in a row.*step 9 is the newest complete"):
    for step in range(10, 20):
      saver.save(State(step)) if step == 10 else saver.poll(State(step))
  assert len(lines) == 2


def test_a_success_begins_the_count_anew(late):
  disk, lines = Disk(0, late=late), []
  saver = saving.Saver(disk, say=lines.append, waits=(0.0,))
  for step in (10, 20, 30):
    disk.full = 1
    saver.save(State(step))
    saver.poll(State(step + 1))
    saver.poll(State(step + 2))
  assert disk.saved == [11, 21, 31] and len(lines) == 3


def test_the_end_waits_until_the_state_is_saved(late):
  disk = Disk(2, late=late)
  saving.Saver(disk, say=print, waits=(0.0, 0.01)).finish(State(7))
  assert disk.saved == [7]
  with pytest.raises(saving.SaveError):
    saving.Saver(Disk(9, late=late), say=print, waits=(0.0, 0.01)).finish(State(7))


def test_the_reason_is_what_the_system_said():
  long = RuntimeError(
    'RESOURCE_EXHAUSTED: Error writing "params.a/0.0" in OCDBT database at local file "/d/": '
    "Failed to write 33660 bytes to file 15: No space left on device [os_error_code='28'] [source]"
  )
  with pytest.raises(saving.SaveError) as raised:
    saving.Saver(Failing(long), say=print, waits=()).finish(State(1))
  assert str(raised.value).startswith("Saving a checkpoint failed: No space left on device. In ")


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])  # JAX raises either
def test_another_process_that_is_gone_is_no_fault_of_the_disk(monkeypatch, kind):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  gone = kind("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
  with pytest.raises(kind, match="Gloo") as raised:
    saving.Saver(Failing(gone), say=print).finish(State(1))
  assert processes.status_of(raised.value) == processes.AGAIN
  full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: No space left on device [")
  with pytest.raises(saving.SaveError, match="No space left"):
    saving.Saver(Failing(full), say=print).finish(State(1))


class Failing(Disk):
  """Checkpoints that cannot be saved for one reason."""

  def __init__(self, error):
    super().__init__(0, late=False)
    self.error = error

  def save(self, state):
    raise self.error


@pytest.mark.parametrize(
  ("said", "shown"),
  [
    ("Event loop is closed", False),
    ("sys.meta_path is None, Python is likely shutting down", False),
    ("another fault", True),
  ],
)
def test_what_a_failed_save_drops_is_not_told_when_python_ends(monkeypatch, said, shown):
  """A full disk has one message: each write that had not begun would print a traceback below it."""
  told = []
  monkeypatch.setattr(sys, "unraisablehook", told.append)
  monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # is put back
  faults._set_hooks.__wrapped__()
  sys.unraisablehook(types.SimpleNamespace(exc_value=ImportError(said)))
  assert len(told) == shown
