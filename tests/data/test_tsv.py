import base64
import json
import multiprocessing
import os
import pathlib
import pickle

import numpy as np
import pytest

from ofa_jax.data import index, tsv
from ofa_jax.data.tsv import BadRow, ImageTable, Table, read_texts
from tests.data.samples import write_tsv

DATASET = pathlib.Path(__file__).parent.parent / "golden" / "cnclip" / "retrieval" / "dataset"


def test_rows_come_back(tmp_path):
  files = [
    write_tsv(tmp_path / "a.tsv", [("7", b"seven"), ("photo_1.jpg", b"one")]),
    write_tsv(tmp_path / "b.tsv", [("10", b""), ("8", bytes(range(256)))]),
  ]
  table = ImageTable(files)
  assert table.ids == ["7", "photo_1.jpg", "10", "8"]
  assert [table.encoded(i) for i in range(4)] == [b"seven", b"one", b"", bytes(range(256))]
  np.testing.assert_array_equal(table.find(["8", "nothing", "7", "70"]), [3, -1, 0, -1])
  assert table.find([]).shape == (0,)
  assert table.name(3) == f"{tmp_path}/b.tsv:2 8"


def test_both_base64_alphabets_line_ends_and_blank_lines(tmp_path):
  image = b"\xfb\xff\xfe\x00more"
  standard, url_safe = base64.b64encode(image), base64.urlsafe_b64encode(image)
  assert standard != url_safe
  path = tmp_path / "a.tsv"
  path.write_bytes(b"1\t%s\r\n\n2\t%s" % (standard, url_safe))  # no newline at the end
  table = ImageTable([path])
  assert [table.encoded(i) for i in range(2)] == [image, image]
  assert table.name(1).endswith("a.tsv:3 2")


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    (b"2\t!!!notbase64", "base64"),
    (b"2\tQUJD\xff", "base64"),
    (b"2\tQUJ", "base64"),
    (b"2", "2 columns"),
    (b"2\tQUJD\textra", "2 columns"),
    (b"\tQUJD", "2 columns"),
    (b"x" * 5000 + b"\tQUJD", "2 columns"),
    (b"\xff\xfe\tQUJD\tx", "2 columns"),
  ],
)
def test_faulty_rows_are_named_and_the_others_are_read(tmp_path, line, reason):
  path = tmp_path / "a.tsv"
  path.write_bytes(b"1\tQUJD\n" + line + b"\n3\tQUJD\n")
  table = ImageTable([path])
  assert len(table) == 3
  assert table.encoded(0) == table.encoded(2) == b"ABC"
  with pytest.raises(BadRow, match=rf"a\.tsv:2\b.*{reason}"):
    table.encoded(1)


def test_faults_of_the_files_are_errors_at_once(tmp_path):
  good = write_tsv(tmp_path / "good.tsv", [("1", b"x")])
  empty = tmp_path / "empty.tsv"
  empty.write_bytes(b"")
  with pytest.raises(ValueError, match=r"1 of 2 missing: .*absent\.tsv"):
    ImageTable([good, tmp_path / "absent.tsv"])
  with pytest.raises(ValueError, match="empty list"):
    ImageTable([])
  with pytest.raises(ValueError, match=r"1 without any: .*empty\.tsv"):
    ImageTable([good, empty])


def test_repeated_ids_are_an_error_naming_both_lines(tmp_path):
  a = write_tsv(tmp_path / "a.tsv", [("1", b"x"), ("2", b"y")])
  b = write_tsv(tmp_path / "b.tsv", [("3", b"z"), ("2", b"y")])
  with pytest.raises(ValueError, match=r"1 repeated: .*b\.tsv:2 2 \(first at .*a\.tsv:2 2\)"):
    ImageTable([a, b])


def test_index_is_used_again_and_rebuilt_when_the_file_changed(tmp_path, monkeypatch):
  path = write_tsv(tmp_path / "a.tsv", [("1", b"x")])
  ImageTable([path])
  scans = []
  scan = tsv._scan
  monkeypatch.setattr(tsv, "_scan", lambda p: scans.append(p) or scan(p))
  assert ImageTable([path]).encoded(0) == b"x"
  assert not scans
  write_tsv(path, [("22", b"new"), ("3", b"rows")])
  table = ImageTable([path])
  assert len(scans) == 1
  assert [table.encoded(i) for i in range(2)] == [b"new", b"rows"]
  (tmp_path / "a.tsv.index.npz").write_bytes(b"PK damaged")
  assert ImageTable([path]).ids == ["22", "3"]
  assert len(scans) == 2
  assert sorted(os.listdir(tmp_path)) == ["a.tsv", "a.tsv.index.npz"]  # no temporary file stays


def test_index_dir_and_directories_that_cannot_be_written(tmp_path, monkeypatch):
  data = tmp_path / "data"
  data.mkdir()
  path = write_tsv(data / "a.tsv", [("1", b"x")])
  ImageTable([path], index_dir=str(tmp_path / "index"))
  assert os.listdir(data) == ["a.tsv"]
  assert len(os.listdir(tmp_path / "index")) == 1

  save = index.save_atomically

  def refuse_data(place, **arrays):  # the superuser may write to a read-only directory
    if place.parent == data:
      raise PermissionError(place)
    save(place, **arrays)

  monkeypatch.setattr(index, "save_atomically", refuse_data)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  assert ImageTable([path]).encoded(0) == b"x"
  assert len(os.listdir(tmp_path / "home" / "ofa_jax" / "index")) == 1
  assert ImageTable([path]).encoded(0) == b"x"

  monkeypatch.setattr(index, "save_atomically", lambda place, **arrays: refuse_data(data / "x"))
  path = write_tsv(data / "b.tsv", [("2", b"y")])
  assert ImageTable([path]).encoded(0) == b"y"  # nowhere to write: scanned at each start


def read_first(table, out):
  out.put(table.encoded(0))


def test_table_can_be_sent_to_a_spawned_process(tmp_path):
  table = ImageTable([write_tsv(tmp_path / "a.tsv", [("1", b"x")])])
  table.encoded(0)  # opens the file
  context = multiprocessing.get_context("spawn")
  out = context.SimpleQueue()
  process = context.Process(target=read_first, args=(pickle.loads(pickle.dumps(table)), out))
  process.start()
  assert out.get() == b"x"
  process.join()
  table.close()
  assert table.encoded(0) == b"x"


def test_texts_of_the_original(tmp_path):
  texts = read_texts([DATASET / "test_texts.jsonl"])
  rows = [json.loads(line) for line in (DATASET / "test_texts.jsonl").read_text().splitlines()]
  assert texts.texts == [row["text"] for row in rows]
  assert texts.text_ids == [row["text_id"] for row in rows]
  assert texts.image_ids == [tuple(map(str, row["image_ids"])) for row in rows]
  assert texts.name(3).endswith(f"test_texts.jsonl:4 {rows[3]['text_id']}")


def test_faulty_texts_are_all_counted_and_named(tmp_path):
  good = b'{"text_id": 1, "text": "x", "image_ids": []}\n'
  path = tmp_path / "t.jsonl"
  path.write_bytes(
    good
    + b"\n{broken\n"
    + b'{"text_id": 1, "text": "x"}\n'
    + b'{"text_id": 1, "text": "x", "image_ids": 7}\n'
    + b'{"text_id": 1, "text": "\xff", "image_ids": []}\n'
    + b"[" * 100_000
    + b"\n"
    + b'{"text_id": 1, "text": null, "image_ids": []}\n'
  )
  with pytest.raises(ValueError, match="found 6 faults") as error:
    read_texts([path])
  for line, what in (
    (3, "property name"),
    (4, "image_ids"),
    (5, "a list"),
    (6, "is not UTF-8"),
    (7, "recursion"),
  ):
    assert f"t.jsonl:{line} " in str(error.value)
    assert what in str(error.value)
  assert "t.jsonl:8 " not in str(error.value)

  path.write_bytes(b"")
  with pytest.raises(ValueError, match=r"t\.jsonl has no rows"):
    read_texts([path])
  with pytest.raises(ValueError, match="missing"):
    read_texts([tmp_path / "absent.jsonl"])


def test_columns_are_chosen_by_number(tmp_path):
  image = base64.urlsafe_b64encode(b"\xfb\xff")
  (tmp_path / "a.tsv").write_bytes(b"7\timg1\ta red dog\t\t%s\n" % image)
  (tmp_path / "b.tsv").write_bytes(b"\n8\timg2\t \xe4\xb8\xad \tx&&y\t%s\r\n" % image)
  table = Table(
    [tmp_path / "a.tsv", tmp_path / "b.tsv"], columns={"image": 4, "id": 0, "text": 2, "objects": 3}
  )
  assert len(table) == 2
  assert [table.text(i, "id") for i in range(2)] == ["7", "8"]
  assert [table.text(i, "text") for i in range(2)] == ["a red dog", " 中 "]
  assert [table.text(i, "objects") for i in range(2)] == ["", "x&&y"]
  assert [table.encoded(i) for i in range(2)] == [b"\xfb\xff"] * 2
  assert table.name(1) == f"{tmp_path}/b.tsv:2 8"
  again = pickle.loads(pickle.dumps(table))
  assert again.text(1, "text") == " 中 "
  images_first = Table([tmp_path / "a.tsv"], columns={"image": 4})
  assert images_first.encoded(0) == b"\xfb\xff"


def test_rows_of_another_width_than_most_are_named(tmp_path):
  path = tmp_path / "a.tsv"
  lines = [
    b"1\ta\tQUJD",
    b"2\ta\tb\tQUJD",
    b"3\ta",
    b"4\t\xff\tQUJD",
    b"5\ta\t!",
    b"6" + b"\t" * 99,
  ]
  path.write_bytes(b"\n".join(lines))
  table = Table([path], columns={"id": 0, "text": 1, "image": 2})
  assert (table.text(0, "text"), table.encoded(0)) == ("a", b"ABC")
  for row, found in ((1, "found 4"), (2, "found 2"), (5, "found 17 or more")):
    expected = rf"a\.tsv:{row + 1} {row + 1}: expected 3 columns separated by tabs, {found}$"
    for read in (table.encoded, lambda i: table.text(i, "id")):
      with pytest.raises(BadRow, match=expected):
        read(row)
  with pytest.raises(BadRow, match=r"a\.tsv:4 4: text is not UTF-8"):
    table.text(3, "text")
  with pytest.raises(BadRow, match=r"a\.tsv:5 5: broken base64"):
    table.encoded(4)


def test_columns_that_are_not_there_are_an_error_at_once(tmp_path):
  path = tmp_path / "a.tsv"
  path.write_bytes(b"1\ta\tQUJD\n2\tb\tQUJD\n3\n")
  with pytest.raises(ValueError, match=r"0 to 2, as most rows of .*a\.tsv have, found 4 \(image\)"):
    Table([path], columns={"id": 0, "image": 4, "caption": 2})
  with pytest.raises(ValueError, match=r"found -1 \(image\)"):
    Table([path], columns={"image": -1})
