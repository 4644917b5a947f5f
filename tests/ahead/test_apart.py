"""A function in a process of its own: its result, what it raises, and how its process ended."""

import os
import signal
import sys

import pytest

from ofa_jax.ahead import apart


def divide(a, b):
  return a / b


def end(code):
  print("noise\nthe last words", file=sys.stderr, flush=True)
  if code is None:
    os.kill(os.getpid(), signal.SIGSEGV)
  os._exit(code)


class OddError(Exception):
  def __reduce__(self):
    raise TypeError("cannot be pickled")


def refuse():
  raise OddError("a fault")


def test_results_and_exceptions_come_back():
  assert apart.call(divide, 6, 3) == 2
  with pytest.raises(ZeroDivisionError) as error:
    apart.call(divide, 1, 0)
  assert "in divide" in error.value.__notes__[0]
  with pytest.raises(RuntimeError, match="OddError: a fault"):
    apart.call(refuse)


@pytest.mark.parametrize(
  ("code", "how"), [(None, r"signal 11 \(SIGSEGV\) ended it"), (3, "it ended with status 3")]
)
def test_a_process_that_ends_is_told_with_its_last_words(code, how, capfd):
  with pytest.raises(apart.ProcessEndedError, match=rf"{how}\n  \| noise\n  \| the last words"):
    apart.call(end, code)
  assert "words" not in capfd.readouterr().err
