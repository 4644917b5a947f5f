"""What was left belongs to its work."""

import os

import pytest

from ofa_jax import partial
from ofa_jax.data import sources

WORK = {"input": {"sha256": "a"}, "options": {"num_beams": 5, "candidates": ("yes", "no")}}


@pytest.fixture
def left(tmp_path):
  """Half an output that was made of `WORK`."""
  place = partial.place_of(tmp_path / "out.jsonl")
  assert not partial.taken_up(place, WORK, say=pytest.fail)
  place.write_text("half")
  return place


def test_the_same_work_takes_it_up_and_leaves_nothing_beside_the_output(left, tmp_path):
  assert partial.taken_up(left, WORK, say=pytest.fail) and left.read_text() == "half"
  partial.finish(left, tmp_path / "out.jsonl")
  assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"input": {"sha256": "b"}}, "another input"),
    ({"options": {"num_beams": 1}}, "another options"),
    ({"batch size": 2}, "another batch size"),
  ],
)
def test_other_work_starts_anew_and_says_so(left, change, told):
  lines = []
  work = {**WORK, **change}
  assert not partial.taken_up(left, work, say=lines.append)
  assert len(lines) == 1 and told in lines[0] and "Starting anew" in lines[0]
  assert not left.exists()
  left.write_text("its own half")
  assert partial.taken_up(left, work, say=pytest.fail)


@pytest.mark.parametrize(("header", "stays"), [(0, True), (3, True), (4, False)])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_rows_and_no_empty_file(left, tmp_path, header, stays, error):
  with pytest.raises(error), partial.tidied(left, header=header):
    raise error
  names = ["out.jsonl.partial", "out.jsonl.partial.json"] if stays else []
  assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize("note", [None, b"", b"[]", b'{"input', b"\xff", b"[" * 100_000])
def test_what_nothing_is_known_of_is_not_taken_up(left, note):
  place = left.with_name("out.jsonl.partial.json")
  place.unlink() if note is None else place.write_bytes(note)
  lines = []
  assert not partial.taken_up(left, WORK, say=lines.append)
  assert "no note" in lines[0] and not left.exists()


def test_a_note_without_rows_is_of_no_consequence(left):
  left.unlink()  # killed before the first
  assert not partial.taken_up(left, {"input": "another"}, say=pytest.fail)


@pytest.mark.parametrize("content", [partial.CONTENT, 0])
def test_files_are_told_apart(tmp_path, monkeypatch, content):
  monkeypatch.setattr(partial, "CONTENT", content)
  a, b = tmp_path / "a", tmp_path / "folder" / "b"
  b.parent.mkdir()
  for path in (a, b):
    path.write_text("1234")
    os.utime(path, (1, 1))
  paths = [a, b.parent, tmp_path / "missing"]
  first = partial.fingerprint(paths)
  assert first["files"] == 3 and partial.fingerprint(paths) == first
  a.write_text("1235")  # of the same size
  assert partial.fingerprint(paths) != first
  a.write_text("1234")
  # A copy, with another time, is the same where all is read.
  assert (partial.fingerprint(paths) == first) == bool(content)
  os.utime(a, (1, 1))
  assert partial.fingerprint(paths) == first
  assert partial.fingerprint(reversed(paths)) != first
  b.rename(b.with_name("c"))
  assert partial.fingerprint(paths) != first


def test_rows_are_told_apart():
  first = partial.digest(["a", "b", 1])
  assert partial.digest(iter(["a", "b", 1])) == first
  for others in (["a", "b"], ["b", "a", 1], ["ab", 1], ["a", "b", "1"], ["a\n", "b", 1]):
    assert partial.digest(others) != first


def test_a_table_of_pictures_is_one_of_its_files(tmp_path):
  """What is asked about the pictures stands there only."""
  for i in range(2):
    (tmp_path / f"{i}.jpg").write_bytes(b"picture")
  table = tmp_path / "in.csv"
  found = []
  for question in ("is it red?", "is it not?"):
    table.write_text(f"filepath,text\n0.jpg,{question}\n1.jpg,what?\n")
    rows = sources.open_rows([str(table)], columns={}, places={"image": 0, "text": 1})
    assert rows.text(0, "text") == question
    found.append(partial.fingerprint(rows.files))
  assert found[0] != found[1] and found[0]["files"] == 3
