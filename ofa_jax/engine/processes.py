"""The processes of one job: an error of one ends all of them, at once and with its message.

A process that fails says why in the key-value store of the job's coordination service. A thread of
every other process looks there, prints the same message and ends its process, for its own main
thread may wait in a collective that will never end. Process 0 holds the service: it leaves last.
"""

import contextlib
import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # its store of keys and values has no public name

from ofa_jax.engine import growing

# What people's files, flags and disks cause: told in one message without a traceback.
EXPECTED = (ValueError, FloatingPointError, OSError)

POLL = 1.0  # seconds between two looks for an error of another process
PATIENCE = 10  # seconds that a failing process waits for the store, the log and the others

# Exit statuses, as schedulers read them.
FAULT = 1  # the same command would end so again
AGAIN = 75  # a process or host was lost or stuck: the same command goes on (BSD's EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C ended it at once: 128 + SIGINT

# What no new start mends, of the states in which the runtime gives up.
_LASTING = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION")

# How errors of the runtime begin that it raises as ValueError: of a collective whose peer is gone.
_PASSING = ("UNKNOWN: ", "UNAVAILABLE: ", "DEADLINE_EXCEEDED: ", "ABORTED: ", "CANCELLED: ")

_ERROR, _TOLD, _DONE, _VALUE = (f"ofa_jax/{name}" for name in ("error", "told", "done", "value"))


class Stopped(BaseException):
  """The run was told to stop and has saved what it had; the text, already shown, says where."""


class PeerError(RuntimeError):
  """Another process failed; the text is its message."""


def status_of(error: BaseException) -> int:
  """The exit status of an error, in a process that is alone or one of several."""
  if isinstance(error, (ConnectionError, TimeoutError)):
    return AGAIN
  if _of_runtime(error):
    return FAULT if str(error).startswith(_LASTING) else AGAIN
  return FAULT


def _of_runtime(error: BaseException) -> bool:
  if isinstance(error, jax.errors.JaxRuntimeError):
    return True
  return isinstance(error, ValueError) and str(error).startswith(_PASSING)


def describe(error: BaseException) -> str:
  """The message of an error as a person reads it."""
  if isinstance(error, OSError) and error.strerror and error.filename is not None:
    return f"{error.strerror}: {os.fspath(error.filename)}"
  if isinstance(error, (*EXPECTED, PeerError)):
    return str(error) or type(error).__name__
  return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def one_fate(write: Callable[[str], None] | None = None) -> Iterator[None]:
  """What raises in this block ends all processes of the job with its message and status.

  In a process that is alone the error is only written to the log and goes on. Blocks may be nested.
  The end of the outermost one waits for the other processes, so that an error in what they do last
  reaches this one, too.

  Args:
    write: takes the last words for the log.
  """
  _job.enter(write)
  try:
    yield
  except (Stopped, GeneratorExit):
    _job.leave(write)
    raise
  except BaseException as error:
    if isinstance(error, SystemExit) and not error.code:
      _job.leave(write)
      raise
    _job.failed(error, write)
    _job.leave(write, wait=False)
    raise
  else:
    _job.leave(write)


def fail(reason: str, *, stacks: bool = False) -> None:
  """Ends this process and the others of its job with a message; the same command is to go on.

  Nothing is cleaned up: on several processes that would wait for those that are gone.

  Args:
    reason: the message.
    stacks: every process shows where its threads stand.
  """
  _job.end(_job.publish({"reason": reason, "stacks": stacks, "status": AGAIN}))


def leave(status: int) -> None:
  """Ends this process at once, and the others of its job."""
  if _job.watches():
    _job.publish({"reason": "interrupted (Ctrl-C)", "status": status})
    _limited(lambda: _job.wait_for_all(_TOLD, within=PATIENCE / 5))
  _end_process(status)


def from_first(make: Callable[[], Any]) -> Any:
  """What `make` returns on process 0, as JSON gives it back; the others wait for it.

  Raises:
    PeerError: on the others, what `make` raised on process 0, where it goes on as it is.
  """
  if not _job.several():
    return make()
  return _job.from_first(make)


def end(status: int) -> None:
  """Ends this process, whose work is done or given up, without clearing away what libraries hold.

  One of several first takes leave of the others.
  """
  if _job.several():
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # of another that is gone
      jax.distributed.shutdown()
  _end_process(status)


class _Job:
  """This process's place in its job."""

  def __init__(self):
    self._depth = 0
    self._values = self._blocks = 0
    self._writers: list[Callable[[str], None]] = []
    self._ended = threading.Event()
    self._ending = threading.Lock()
    self._watcher: threading.Thread | None = None

  def several(self) -> bool:
    return (
      distributed.global_state.client is not None and distributed.global_state.num_processes > 1
    )

  def watches(self) -> bool:
    """Is the job on its way?"""
    return self._watcher is not None

  def enter(self, write: Callable[[str], None] | None) -> None:
    if write is not None:
      self._writers.append(write)
    self._depth += 1
    if self._watcher is None and self.several():
      self._ended.clear()
      self._watcher = threading.Thread(target=self._watch, name="peers", daemon=True)
      self._watcher.start()

  def leave(self, write: Callable[[str], None] | None, *, wait: bool = True) -> None:
    if write is not None:
      self._writers.remove(write)
    self._depth -= 1
    if self._depth == 0 and self._watcher is not None:
      if wait:
        self.wait_for_all(f"{_DONE}/{self._blocks}")
      self._blocks += 1
      self._ended.set()
      self._watcher.join()
      self._watcher = None

  def failed(self, error: BaseException, write: Callable[[str], None] | None) -> None:
    """Tells of an error; on several processes this is the end."""
    hidden = isinstance(error, (*EXPECTED, PeerError)) and not os.environ.get("OFA_JAX_TRACEBACK")
    shown = "" if hidden else "".join(traceback.format_exception(error))
    if not self.several():
      if write is not None and not isinstance(error, KeyboardInterrupt):
        self._write(f"{describe(error)}\n{shown}".rstrip())
      return
    if _of_runtime(error):
      reason = (
        f"a step failed, perhaps because another process is gone ({str(error).splitlines()[0]}). "
        "The same command goes on from the newest checkpoint."
      )
      self.end(self.publish({"reason": reason, "stacks": True, "status": status_of(error)}))
    if isinstance(error, PeerError):
      self._ended.wait(PATIENCE)  # process 0 tells of it itself, and the watcher ends this one
      self.end(self.publish({"process": 0, "reason": str(error)}))
    if isinstance(error, KeyboardInterrupt):
      self.end(self.publish({"reason": "interrupted (Ctrl-C)", "status": INTERRUPTED}))
    record = {"reason": describe(error), "traceback": shown, "status": status_of(error)}
    self.end(self.publish(record))

  def publish(self, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the error that ends the job: this one, or another that was first."""
    record = {"process": distributed.global_state.process_id, **record}
    if not self.several():
      return record
    first = [record]

    def tell():
      client = distributed.global_state.client
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        try:
          client.key_value_set(_ERROR, json.dumps(record))
        except jax.errors.JaxRuntimeError:
          first[0] = json.loads(client.key_value_try_get(_ERROR))

    _limited(tell)
    return first[0]

  def end(self, record: dict[str, Any]) -> None:
    """Says why and ends; only one thread does."""
    self._ending.acquire()
    num, mine = distributed.global_state.num_processes, distributed.global_state.process_id
    reason, own = record["reason"], record["process"] == mine
    if self.several():
      reason = f"process {record['process']} of {num}: {reason}"
    stacks = f"Stacks of all threads:\n{_stacks()}" if record.get("stacks") else ""
    shown = record.get("traceback", "")
    if own and shown:
      print(shown, file=sys.stderr, flush=True)
    elif shown:
      reason += f" (the output of process {record['process']} shows where)"
    print(f"error: {reason}\n{stacks}".rstrip(), file=sys.stderr, flush=True)
    self._write("\n".join(filter(None, (reason, shown, stacks))))
    if self.several():
      _limited(lambda: self.wait_for_all(_TOLD, within=PATIENCE))
    _end_process(record.get("status", FAULT))

  def from_first(self, make: Callable[[], Any]) -> Any:
    client = distributed.global_state.client
    key, self._values = f"{_VALUE}/{self._values}", self._values + 1
    if distributed.global_state.process_id == 0:
      try:
        value = make()
      except BaseException as error:
        client.key_value_set(key, json.dumps({"error": describe(error)}))
        raise
      client.key_value_set(key, json.dumps({"value": value}))
      return json.loads(json.dumps(value))
    record = json.loads(_blocking_get(key))
    if client.key_value_increment(f"{key}/read", 1) == distributed.global_state.num_processes - 1:
      for name in (key, f"{key}/read"):
        client.key_value_delete(name)
    if "error" in record:
      raise PeerError(record["error"])
    return record["value"]

  def _watch(self):
    client = distributed.global_state.client
    while not self._ended.wait(POLL):
      # No error yet; and a service that is gone ends the process by itself.
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self.end(json.loads(client.key_value_try_get(_ERROR)))

  def wait_for_all(self, key: str, *, within: float | None = None) -> None:
    """Says that this process is at `key`; process 0 waits until all are.

    At the end of a job all wait: an error of another process ends this one here.
    """
    state = distributed.global_state
    state.client.key_value_set(f"{key}/{state.process_id}", "", allow_overwrite=True)
    if key == _TOLD and state.process_id != 0:
      return  # process 0 waits for this
    begin = time.monotonic()
    while len(state.client.key_value_dir_get(f"{key}/")) < state.num_processes:
      if within is not None and time.monotonic() - begin > within:
        return
      time.sleep(0.1)

  def _write(self, text: str) -> None:
    for write in list(self._writers):
      with contextlib.suppress(Exception):  # a full disk, say, which is told already
        _limited(lambda write=write: write(text))


def _limited(act: Callable[[], None]) -> None:
  """Runs in a thread, for what hangs may hold what it needs."""
  thread = threading.Thread(target=act, daemon=True)
  thread.start()
  thread.join(timeout=PATIENCE)


def _blocking_get(key: str) -> str:
  while True:
    try:
      return distributed.global_state.client.blocking_key_value_get(key, 60_000)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


def _stacks() -> str:
  with tempfile.TemporaryFile("w+") as f:  # faulthandler writes to files only
    faulthandler.dump_traceback(f, all_threads=True)
    f.seek(0)
    return f.read()


def _end_process(status: int) -> None:
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      if stream.isatty():
        stream.write("\x1b[?25h")  # the cursor, which a progress bar has hidden
      stream.flush()
  growing.write_last_lines()
  os._exit(status)


_job = _Job()
