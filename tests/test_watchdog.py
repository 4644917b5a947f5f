"""A hung process shows where it hangs and exits; one that moves on is left alone."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

from ofa_jax import watchdog


def run(body, tmp_path):
  """Runs code with a watchdog of 0.5 s a step that writes to log.txt."""
  script = f"""
    import pathlib, time
    from ofa_jax import watchdog
    def stuck_in_a_collective():
      time.sleep(60)
    write = pathlib.Path({str(tmp_path / "log.txt")!r}).write_text
    with watchdog.Watchdog(0.5, write=write) as watch:
      {body}
    """
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script)],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=50,
  )


def test_a_hung_step_is_shown_and_ends_the_process(tmp_path):
  result = run("watch.beat(); stuck_in_a_collective()", tmp_path)
  assert result.returncode == 1
  for text in (result.stderr, (tmp_path / "log.txt").read_text()):
    assert "no step has ended for 0.5 s (step_timeout=0.5)" in text
    assert "in stuck_in_a_collective" in text


def test_the_first_step_and_evaluations_have_longer(tmp_path):
  body = "time.sleep(0.8); watch.beat(10); time.sleep(0.8); watch.beat(); time.sleep(0.1)"
  result = run(body, tmp_path)
  assert (result.returncode, result.stderr) == (0, "")
  assert not (tmp_path / "log.txt").exists()


def test_without_a_limit_nothing_is_watched():
  with watchdog.Watchdog(None, write=print) as watch:
    watch.beat()
    watch.beat(10)


def test_a_notice_is_kept_until_it_is_asked_for():
  before = signal.getsignal(signal.SIGTERM)
  with watchdog.Notice() as notice:
    assert not notice.reached(1)
    signal.raise_signal(signal.SIGTERM)
    assert notice.reached(2)
  assert signal.getsignal(signal.SIGTERM) == before


def test_leaving_stops_the_thread():
  before = set(threading.enumerate())
  with watchdog.Watchdog(60, write=print) as watch:
    watch.beat()
    (thread,) = set(threading.enumerate()) - before
  assert not thread.is_alive()
