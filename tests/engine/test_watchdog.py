"""A hung process shows where it hangs and exits; one that moves on is left alone."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from ofa_jax.engine import processes, watchdog


def run(body, tmp_path):
  """Runs code with a watchdog of 0.5 s a step that writes to log.txt."""
  script = f"""
    import pathlib, time
    from ofa_jax.engine import processes
    from ofa_jax.engine import watchdog
    def stuck_in_a_collective():
      time.sleep(60)
    write = pathlib.Path({str(tmp_path / "log.txt")!r}).write_text
    with processes.one_fate(write), watchdog.Watchdog(0.5) as watch:
      {body}
    """
  return python(script)


def python(script):
  """Runs code in a process of its own."""
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script)],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=50,
  )


def test_a_hung_step_is_shown_and_ends_the_process(tmp_path):
  result = run("watch.beat(); stuck_in_a_collective()", tmp_path)
  assert result.returncode == processes.AGAIN
  for text in (result.stderr, (tmp_path / "log.txt").read_text()):
    assert "no step has ended for 0.5 s (step_timeout=0.5)" in text
    assert "in stuck_in_a_collective" in text


def test_the_first_step_and_evaluations_have_longer(tmp_path):
  body = "time.sleep(0.8); watch.beat(10); time.sleep(0.8); watch.beat(); time.sleep(0.1)"
  result = run(body, tmp_path)
  assert (result.returncode, result.stderr) == (0, "")
  assert not (tmp_path / "log.txt").exists()


def test_without_a_limit_nothing_is_watched():
  with watchdog.Watchdog(None) as watch:
    watch.beat()
    watch.beat(10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_notice_is_kept_until_it_is_asked_for(number):
  before = signal.getsignal(number)
  with watchdog.Notice() as notice:
    assert not notice.reached()
    signal.raise_signal(number)
    assert notice.reached() and notice.reached()
  assert signal.getsignal(number) == before


def test_a_notice_where_nothing_is_to_be_saved_ends_at_once():
  with watchdog.Notice() as notice:
    with pytest.raises(processes.Stopped, match="lost"), notice.nothing_to_save("nothing is lost"):
      signal.raise_signal(signal.SIGTERM)
    with pytest.raises(processes.Stopped, match="later"), notice.nothing_to_save("later"):
      raise AssertionError("told before, nothing begins")


# A library's function that nothing interrupts, as a compilation or a collective: the signals go to
# another thread of the process.
BUSY = """
    import ctypes, os, signal, threading, time
    from ofa_jax.engine import watchdog
    def busy():
      signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
      ctypes.CDLL(None).usleep(40_000_000)
    def told(number):
      os.kill(os.getpid(), number)
    """


def test_the_second_ctrl_c_ends_a_process_whatever_it_does():
  result = python(
    BUSY
    + """
    with watchdog.Notice():
      threading.Timer(0.2, told, [signal.SIGINT]).start()
      threading.Timer(0.3 + watchdog.TWICE, told, [signal.SIGINT]).start()
      busy()
    """
  )
  assert result.returncode == processes.INTERRUPTED
  assert "Told to stop" in result.stderr and "ended at once" in result.stderr
  assert "Traceback" not in result.stderr


def test_a_compilation_with_nothing_to_save_is_not_waited_for():
  result = python(
    BUSY
    + """
    with watchdog.Notice(status=75) as notice, notice.nothing_to_save("step 7 is saved"):
      threading.Timer(0.2, told, [signal.SIGTERM]).start()
      busy()
    """
  )
  assert (result.returncode, result.stderr) == (75, "step 7 is saved\n")


def test_leaving_stops_the_thread():
  before = set(threading.enumerate())
  with watchdog.Watchdog(60) as watch:
    watch.beat()
    (thread,) = set(threading.enumerate()) - before
  assert not thread.is_alive()
