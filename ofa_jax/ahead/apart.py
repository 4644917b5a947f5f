"""A function in a process of its own, for libraries that may end the process they run in."""

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

_LINES = 12  # of what a process said last, quoted when it ends


class ProcessEndedError(RuntimeError):
  """The process ended without an answer; the message has how, and what it said last."""


def call(fn: Callable[..., Any], *args: Any) -> Any:
  """`fn(*args)` in a fresh Python process; what it prints on stderr is read only if it ends.

  Args:
    fn: a function of a module.
    args: picklable, as is the result.

  Raises:
    ProcessEndedError: a signal or an exit ended the process.
    Exception: what `fn` raised, its traceback in a note.
  """
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe(duplex=False)
  with tempfile.TemporaryFile() as said:
    process = context.Process(target=_answer, args=(theirs, fn, args))
    stderr = os.dup(2)
    sys.stderr.flush()
    os.dup2(said.fileno(), 2)  # a new process has the descriptors of this moment
    try:
      process.start()
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
    theirs.close()
    try:
      result, error = ours.recv()
    except EOFError:
      process.join()
      raise ProcessEndedError(_how(process.exitcode) + _last_words(said)) from None
    finally:
      ours.close()
    process.join()
  if error is not None:
    raise error
  return result


def _answer(pipe, fn, args):
  try:
    answer = fn(*args), None
  except Exception as e:
    e.add_note(f"In a process of its own:\n{traceback.format_exc()}")
    answer = None, e
  try:
    pipe.send(answer)
  except Exception as e:  # an exception that cannot be pickled
    pipe.send((None, RuntimeError(f"{type(answer[1] or e).__name__}: {answer[1] or e}")))


def _how(code):
  if code >= 0:
    return f"it ended with status {code}"
  return f"signal {-code} ({signal.Signals(-code).name}) ended it"


def _last_words(file):
  file.seek(0)
  lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines()]
  lines = [line for line in lines if line.strip()][-_LINES:]
  return "".join(f"\n  | {line[:200]}" for line in lines)
