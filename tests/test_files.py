"""Files and folders that appear whole or not at all."""

import os
import pathlib
import subprocess
import sys

import pytest

from ofa_jax import files
from ofa_jax.files import written_whole


def test_files_and_folders_appear_at_the_end(tmp_path):
  with written_whole(tmp_path / "new" / "file") as made:
    made.write_text("x")
    assert not (tmp_path / "new" / "file").exists()
  assert (tmp_path / "new" / "file").read_text() == "x"
  with written_whole(tmp_path / "folder") as made:
    made.mkdir()
    (made / "file").write_text("y")
  assert (tmp_path / "folder" / "file").read_text() == "y"
  assert {p.name for p in tmp_path.iterdir()} == {"new", "folder"}


@pytest.mark.parametrize("folder", [True, False])
def test_a_failure_leaves_nothing(tmp_path, folder):
  with pytest.raises(RuntimeError), written_whole(tmp_path / "x") as made:
    made.mkdir() if folder else made.write_text("x")
    raise RuntimeError
  assert not list(tmp_path.iterdir())


def test_what_exists_is_never_replaced(tmp_path):
  with pytest.raises(ValueError, match="exists already"), written_whole(tmp_path):
    pytest.fail("must not get here")
  with pytest.raises(ValueError, match="exists already"), written_whole(tmp_path / "x") as made:
    made.write_text("mine")
    (tmp_path / "x").write_text("theirs")
  assert (tmp_path / "x").read_text() == "theirs"
  assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_may_be_replaced_is_the_old_or_the_new(tmp_path):
  path = tmp_path / "config.json"
  files.write_text(path, "old")
  with pytest.raises(OSError), written_whole(path, replace=True) as made:
    made.write_text("ne")
    raise OSError("No space left on device")
  assert path.read_text() == "old"
  files.write_text(path, "新")
  assert path.read_bytes() == "新".encode()
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_finished_file_is_kept_where_it_cannot_take_its_name(tmp_path):
  taken = pytest.raises(OSError, match="it is whole in")
  with taken as error, written_whole(tmp_path / "x", replace=True) as made:
    made.write_text("hours of work")
    (tmp_path / "x").mkdir()
  kept = pathlib.Path(str(error.value).rpartition(" ")[2])
  assert kept.read_text() == "hours of work"
  assert len(list(tmp_path.iterdir())) == 2


def test_leftovers_within_leftovers_go(tmp_path):
  script = f"""
import os, signal
from ofa_jax.files import written_whole
with written_whole({str(tmp_path / "x")!r}) as outer, written_whole(outer) as made:
  made.mkdir()
  os.kill(os.getpid(), signal.SIGKILL)
"""
  root = os.path.dirname(os.path.dirname(files.__file__))
  subprocess.run([sys.executable, "-c", script], cwd=root, check=False)
  (tmp_path / ".xy.host.1.00000000").touch()  # of another file
  assert len(list(tmp_path.iterdir())) == 2
  files.write_text(tmp_path / "x", "whole")
  assert {p.name for p in tmp_path.iterdir()} == {"x", ".xy.host.1.00000000"}


@pytest.mark.parametrize("folder", [True, False])
def test_leftovers_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path, folder):
  make = "made.mkdir()" if folder else "made.touch()"
  script = f"""
import os, signal
from ofa_jax.files import written_whole
with written_whole({str(tmp_path / "x")!r}, replace=True) as made:
  {make}
  os.kill(os.getpid(), signal.SIGKILL)
"""
  root = os.path.dirname(os.path.dirname(files.__file__))
  subprocess.run([sys.executable, "-c", script], cwd=root, check=False)
  assert len(list(tmp_path.iterdir())) == 1
  with written_whole(tmp_path / "x", replace=True) as outer:
    outer.touch()
    files.write_text(tmp_path / "x", "inner")
    assert outer.exists()
  assert [p.name for p in tmp_path.iterdir()] == ["x"]
