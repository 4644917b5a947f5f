"""Files and folders that appear whole or not at all."""

import pytest

from ofa_jax.convert.files import written_whole


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
