"""One writer at a time, whatever became of the one before."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from ofa_jax.engine import lock


def test_the_second_is_refused_and_told_who_is_there(tmp_path):
  folder = tmp_path / "run"
  with lock.one_writer(folder) as note:
    assert note is None
    me = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(lock.HeldError, match=me), lock.one_writer(folder):
      raise AssertionError("two writers")
    assert json.loads((folder / lock.NAME).read_text())["pid"] == os.getpid()
  assert list(tmp_path.iterdir()) == []  # nothing is left


def test_a_folder_that_was_there_or_is_used_stays(tmp_path):
  (tmp_path / "empty").mkdir()
  for name in ("empty", "new/used"):
    with lock.one_writer(tmp_path / name):
      if name == "new/used":
        (tmp_path / name / "file").touch()
  assert {p.name for p in tmp_path.iterdir()} == {"empty", "new"}
  assert [p.name for p in (tmp_path / "new" / "used").iterdir()] == ["file"]


def test_a_file_has_its_lock_beside_it(tmp_path):
  with lock.one_writer(tmp_path / "a.jsonl", file=True), lock.one_writer(tmp_path / "b", file=True):
    assert {p.name for p in tmp_path.iterdir()} == {f"a.jsonl.{lock.NAME}", f"b.{lock.NAME}"}
  assert list(tmp_path.iterdir()) == []


def test_a_killed_one_is_taken_over_from(tmp_path):
  script = f"""
import os, sys
from ofa_jax.engine import lock
with lock.one_writer({str(tmp_path)!r}):
  print("here", flush=True)
  sys.stdin.read()
"""
  process = subprocess.Popen(
    [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  )
  process.stdout.readline()
  with pytest.raises(lock.HeldError, match=f"process {process.pid} "), lock.one_writer(tmp_path):
    raise AssertionError("two writers")
  process.kill()
  process.wait()
  with lock.one_writer(tmp_path) as note:
    assert f"process {process.pid} " in note and "takes over" in note
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alive", [True, False])
def test_one_on_another_host_is_known_by_its_signs_of_life(tmp_path, alive, capsys):
  place = tmp_path / lock.NAME
  place.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "today"}))
  done = threading.Event()

  def live():
    while alive and not done.wait(0.02):
      os.utime(place)

  thread = threading.Thread(target=live)
  thread.start()
  try:
    if alive:
      them = "process 7 on elsewhere, started today"
      with pytest.raises(lock.HeldError, match=them), lock.one_writer(tmp_path, beat=0.1):
        raise AssertionError("two writers")
    else:
      with lock.one_writer(tmp_path, beat=0.1) as note:
        assert "process 7 on elsewhere" in note
  finally:
    done.set()
    thread.join()
  assert "Waiting 0.3 s for a sign of life" in capsys.readouterr().err
  assert place.exists() == alive  # of the living one nothing is removed


def test_signs_of_life_are_given(tmp_path):
  with lock.one_writer(tmp_path, beat=0.02):
    before = (tmp_path / lock.NAME).stat().st_mtime_ns
    end = time.monotonic() + 10
    while (tmp_path / lock.NAME).stat().st_mtime_ns == before:
      assert time.monotonic() < end


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_lock_that_was_written_half_holds_nobody_up(tmp_path, content):
  (tmp_path / lock.NAME).write_bytes(content)
  with lock.one_writer(tmp_path) as note:
    assert note is None
