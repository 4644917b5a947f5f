import json
import pathlib
import shutil

import numpy as np
import pytest

from ofa_jax.data.images import decode
from ofa_jax.data.pairs import ImageRows, PairData, PairRows, TextRows
from ofa_jax.data.pipeline import Mixture
from ofa_jax.data.tsv import BadRow
from tests.data.samples import plain_jpeg, write_tsv

DATASET = pathlib.Path(__file__).parent.parent / "golden" / "cnclip" / "retrieval" / "dataset"
SIZE = 32


def tokenize(text):
  return np.frombuffer(text.encode()[:16].ljust(16, b"\0"), np.uint8).astype(np.int32)


def write_data(folder, images, texts):
  write_tsv(folder / "train_imgs.tsv", images)
  lines = [json.dumps({"text_id": i, "text": t, "image_ids": ids}) for i, (t, ids) in texts]
  (folder / "train_texts.jsonl").write_text("\n".join(lines))
  data = PairData.of(folder, "train")
  return data.load_images(), data.load_texts()


def test_both_readers_give_the_same_pairs(tmp_path):
  pytest.importorskip("lmdb")
  shutil.copytree(DATASET, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / "lmdb" / "test"
  files = PairData.of(tmp_path, "test")
  assert files.images == (str(tmp_path / "test_imgs.tsv"),)
  assert files.texts == (str(tmp_path / "test_texts.jsonl"),)  # and not test_texts.tr.jsonl
  lmdb = PairData((str(folder / "imgs"),), (str(folder / "pairs"),))
  (tmp_path / "test_imgs.tsv").rename(tmp_path / "moved.tsv")
  assert PairData.of(tmp_path, "test") == PairData.of(tmp_path / "lmdb", "test") == lmdb
  (tmp_path / "moved.tsv").rename(tmp_path / "test_imgs.tsv")

  expected = [
    (row["text"], str(image))
    for row in map(json.loads, (tmp_path / "test_texts.jsonl").read_text().splitlines())
    for image in row["image_ids"]
  ]
  for data in (files, lmdb):
    images, texts = data.load_images(), data.load_texts()
    rows = PairRows(images, texts, size=SIZE, tokenize=tokenize, exact=True)
    assert len(rows) == len(expected)
    for i, (text, image_id) in enumerate(expected):
      example = rows.example(i, None)
      assert example["image_index"] == [image for _, image in expected].index(image_id)
      assert example["caption_index"] == [text for text, _ in expected].index(text)
      np.testing.assert_array_equal(example["tokens"], tokenize(text))
      encoded = images.encoded(int(images.find([image_id])[0]))
      np.testing.assert_array_equal(example["image"], decode(encoded, size=SIZE))


def test_edges_and_shared_captions(tmp_path):
  images, texts = write_data(
    tmp_path,
    [("7", plain_jpeg(7)), ("9", plain_jpeg(90))],
    enumerate([("a cat", [9, 7]), ("unpaired", []), ("a dog", [7]), ("a cat", ["9"])]),
  )
  rows = PairRows(images, texts, size=SIZE, tokenize=tokenize)
  examples = [rows.example(i, None) for i in range(len(rows))]
  assert [int(e["image_index"]) for e in examples] == [0, 1, 1, 0]
  assert [int(e["caption_index"]) for e in examples] == [0, 0, 2, 0]
  assert [int(e["image"][0, 0, 0]) for e in examples] == [90, 7, 7, 90]
  blank = rows.blank()
  assert {k: (v.shape, v.dtype) for k, v in examples[0].items()} == {
    k: (v.shape, v.dtype) for k, v in blank.items()
  }
  assert blank["image_index"] == blank["caption_index"] == -1
  rows.close()


def test_a_mixture_keeps_images_and_captions_of_its_parts_apart(tmp_path):
  images, texts = write_data(
    tmp_path,
    [("7", plain_jpeg(7)), ("9", plain_jpeg(90))],
    enumerate([("a", [9, 7]), ("b", [7])]),
  )
  rows = PairRows(images, texts, size=SIZE, tokenize=tokenize)
  mixture = Mixture([rows, rows], [1, 1])
  examples = [mixture.example(i, None) for i in range(6)]
  assert [int(e["image_index"]) for e in examples] == [0, 1, 1, 3, 4, 4]
  assert [int(e["caption_index"]) for e in examples] == [0, 0, 2, 3, 3, 5]
  assert all(e[k].dtype == np.int32 for e in examples for k in ("image_index", "caption_index"))


def test_image_ids_that_no_file_has_are_all_counted(tmp_path):
  lost = enumerate([("a", [7, 100]), ("b", [101, 102]), ("c", [103, 104, 105])])
  images, texts = write_data(tmp_path, [("7", plain_jpeg(7))], lost)
  with pytest.raises(ValueError, match="found 6 of 7 missing") as error:
    PairRows(images, texts, size=SIZE, tokenize=tokenize)
  message = str(error.value)
  assert "101 (named by " + str(tmp_path / "train_texts.jsonl") + ":2 1)" in message
  assert "104" in message
  assert "105" not in message
  assert "ids such as 7" in message


def test_captions_without_any_image_are_an_error(tmp_path):
  images, texts = write_data(tmp_path, [("7", plain_jpeg(7))], enumerate([("a", []), ("b", [])]))
  with pytest.raises(ValueError, match="only empty lists"):
    PairRows(images, texts, size=SIZE, tokenize=tokenize)


def test_bad_images_are_bad_rows_with_their_line(tmp_path):
  rows = [("1", plain_jpeg(1)), ("2", plain_jpeg(2)[:300])]
  images, texts = write_data(tmp_path, rows, enumerate([("a", [1]), ("b", [2])]))
  pairs = PairRows(images, texts, size=SIZE, tokenize=tokenize)
  pairs.example(0, None)
  with pytest.raises(BadRow, match=r"train_imgs\.tsv:2 2: cannot be decoded"):
    pairs.example(1, None)


def test_evaluation_pools(tmp_path):
  images, texts = write_data(
    tmp_path,
    [("7", plain_jpeg(7)), ("9", plain_jpeg(90))],
    enumerate([("a cat", [9]), ("unpaired", [])]),
  )
  pool = ImageRows(images, size=SIZE, cache_dir=tmp_path / "cache")
  assert pool.ids == ["7", "9"]
  assert [int(pool.example(i, None)["image"][0, 0, 0]) for i in (0, 1, 1)] == [7, 90, 90]
  assert pool.blank()["image"].shape == (SIZE, SIZE, 3)
  pool.close()
  queries = TextRows(texts.texts, tokenize=tokenize)
  assert len(queries) == 2
  np.testing.assert_array_equal(queries.example(1, None)["tokens"], tokenize("unpaired"))
  assert queries.blank()["tokens"].dtype == np.int32


def test_shards_are_found_and_a_missing_split_is_an_error(tmp_path):
  for shard in ("0", "1"):
    write_tsv(tmp_path / f"train_imgs.{shard}.tsv", [(shard, plain_jpeg(9))])
    line = json.dumps({"text_id": int(shard), "text": "x", "image_ids": [int(shard)]})
    (tmp_path / f"train_texts.{shard}.jsonl").write_text(line)
  data = PairData.of(tmp_path, "train", weight=0.5)
  assert data.weight == 0.5
  assert data.load_images().ids == ["0", "1"]
  assert data.load_texts().text_ids == [0, 1]
  (tmp_path / "valid_texts.jsonl").touch()
  with pytest.raises(ValueError, match=r"Expected test_imgs\.tsv .*splits there: valid"):
    PairData.of(tmp_path, "test")
