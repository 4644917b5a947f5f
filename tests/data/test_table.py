import json
import pathlib

import numpy as np
import pytest

from ofa_jax.data.pairs import ImageRows, PairData, PairRows, expand
from ofa_jax.data.table import read_table
from ofa_jax.data.tsv import BadRow
from tests.data.samples import plain_jpeg
from tests.data.test_pairs import DATASET, SIZE, tokenize


@pytest.fixture
def photos(tmp_path):
  """A folder with three pictures."""
  (tmp_path / "photos").mkdir()
  for grey in (10, 20, 30):
    (tmp_path / "photos" / f"{grey}.jpg").write_bytes(plain_jpeg(grey))
  return tmp_path


def write(path, *lines):
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  return path


def test_a_table_gives_the_rows_and_pools_of_tsv_and_jsonl(tmp_path):
  """The very data of a TSV and a JSONL, written as image files and a table."""
  expected = PairData.of(DATASET, "test").load()
  images, texts = expected
  lines = ["filepath,title"]
  for i, image_id in enumerate(images.ids):
    (tmp_path / f"{image_id}.png").write_bytes(images.encoded(i))
  for text, ids in zip(texts.texts, texts.image_ids, strict=True):
    lines += [f'./{image_id}.png,"{text}"' for image_id in ids]
  write(tmp_path / "test.csv", *lines)
  data = PairData.of(tmp_path, "test")
  assert data == PairData.of(tmp_path / "test.csv")

  options = {"size": SIZE, "tokenize": tokenize, "cache_dir": tmp_path / "cache"}
  rows, other = PairRows(*data.load(), **options), PairRows(*expected, **options)
  assert len(rows) == len(other) > 0
  for _ in range(2):  # the second time from the decode cache
    for i in range(len(rows)):
      for name, value in other.example(i, None).items():
        np.testing.assert_array_equal(rows.example(i, None)[name], value)
  rows.close()
  found = {
    text: {pathlib.Path(path).stem for path in paths}
    for text, paths in zip(data.load_texts().texts, data.load_texts().image_ids, strict=True)
  }
  assert found == {
    text: set(ids) for text, ids in zip(texts.texts, texts.image_ids, strict=True) if ids
  }
  pool = ImageRows(data.load_images(), size=SIZE)
  assert {pathlib.Path(path).stem for path in pool.ids} == {
    i for ids in found.values() for i in ids
  }


def test_equal_paths_share_an_image_and_equal_captions_a_text(photos):
  table = write(
    photos / "a.tsv",
    "id\ttitle\tfilepath",
    "1\ta cat\tphotos/10.jpg",
    "2\ta dog\t./photos//10.jpg",
    '3\t"two\n""lines"""\tphotos/20.jpg',
    "4\ta cat\tphotos/30.jpg",
    "4\ta cat\tphotos/30.jpg",
  )
  images, texts = read_table([table])
  assert [pathlib.Path(path).name for path in images.ids] == ["10.jpg", "20.jpg", "30.jpg"]
  assert texts.texts == ["a cat", "a dog", 'two\n"lines"']
  assert [[pathlib.Path(i).stem for i in ids] for ids in texts.image_ids] == [
    ["10", "30"],
    ["10"],
    ["20"],
  ]
  assert texts.name(2) == f"{table}:4 2"
  np.testing.assert_array_equal(images.find([images.ids[1], "nothing"]), [1, -1])


def test_columns_root_and_separators_are_chosen(photos, tmp_path):
  other = tmp_path / "tables"
  other.mkdir()
  write(other / "a.csv", "\ufeffimage;text", "10.jpg;一只猫, 坐着")  # as a spreadsheet writes it
  write(other / "b.csv", "text\timage", "a dog\t20.jpg")  # as open_clip's default has it
  data = PairData.of(other / "*.csv", image="image", caption="text", root=str(photos / "photos"))
  images, texts = data.load()
  assert texts.texts == ["一只猫, 坐着", "a dog"]
  assert images.encoded(1) == plain_jpeg(20)


def test_faulty_rows_are_all_counted_and_named(photos):
  table = write(
    photos / "a.csv",
    "filepath,title",
    "photos/10.jpg,good",
    "photos/10.jpg,  ",
    *(f"photos/lost{i}.jpg,x" for i in range(7)),
    "",
    "photos/10.jpg,one,two",
    'photos/10.jpg,"half" quoted',
    "photos/20.jpg,good",
  )
  with pytest.raises(ValueError, match="an image that is there and a caption") as error:
    read_table([table])
  message = str(error.value)
  assert f"1 without a caption: {table}:3\n" in message
  assert f"2 not like the header: {table}:12 (3 columns instead of 2), {table}:13 (" in message
  assert "7 whose image is missing" in message
  assert "lost4.jpg" in message and "lost5.jpg" not in message


def test_faults_of_the_table_are_errors_at_once(photos):
  table = write(photos / "a.csv", "file_path,titel", "photos/10.jpg,x")
  with pytest.raises(ValueError, match=r"column 'filepath' .*did you mean file_path\?"):
    read_table([table])
  with pytest.raises(ValueError, match=r"column 'title' .*did you mean titel\?"):
    read_table([table], image="file_path")
  with pytest.raises(ValueError, match="found none in"):
    read_table([write(photos / "a.csv", "filepath,title")])
  with pytest.raises(ValueError, match="found nothing"):
    read_table([write(photos / "a.csv")])
  table.write_bytes("filepath,title\nphotos/10.jpg,手写的数字".encode("gbk"))
  with pytest.raises(ValueError, match='"CSV UTF-8"'):
    read_table([table])
  with pytest.raises(ValueError, match=r"missing: .*absent\.csv"):
    read_table([photos / "absent.csv"])
  with pytest.raises(ValueError, match=r"found no texts and x\.jsonl"):
    PairData(("x.jsonl",)).load()


def test_a_file_that_goes_missing_later_is_a_bad_row(photos):
  images, texts = read_table([write(photos / "a.csv", "filepath,title", "photos/10.jpg,x")])
  rows = PairRows(images, texts, size=SIZE, tokenize=tokenize)
  (photos / "photos" / "10.jpg").unlink()
  with pytest.raises(BadRow, match=r"10\.jpg: .*No such file"):
    rows.example(0, None)


def test_patterns_of_names(tmp_path):
  assert expand(["a{08..10}.tar", "b"]) == ["a08.tar", "a09.tar", "a10.tar", "b"]
  assert expand(["{a,b}/{8..9}"]) == ["a/8", "a/9", "b/8", "b/9"]
  for name in ("x1", "x2", "y[1]"):
    (tmp_path / name).touch()
  assert expand([f"{tmp_path}/x*"]) == [f"{tmp_path}/x1", f"{tmp_path}/x2"]
  assert expand([f"{tmp_path}/y[1]"]) == [f"{tmp_path}/y[1]"]
  with pytest.raises(ValueError, match=r"files like .*z"):
    expand([f"{tmp_path}/z*"])


def test_a_split_that_is_not_there_names_those_that_are(photos):
  (photos / "valid_texts.jsonl").write_text(json.dumps({}))
  with pytest.raises(ValueError, match=r"train\.csv or train\*\.tar, .*splits there: valid"):
    PairData.of(photos, "train")
