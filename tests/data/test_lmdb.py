import collections
import gc
import os
import pathlib
import pickle
import re
import sys

import numpy as np
import pytest

from ofa_jax.data.lmdb import LmdbImages, read_lmdb_pairs
from ofa_jax.data.tsv import BadRow, ImageTable, read_texts

lmdb = pytest.importorskip("lmdb")
DATASET = pathlib.Path(__file__).parent.parent / "golden" / "cnclip" / "retrieval" / "dataset"


def write_lmdb(folder, records):
  folder.mkdir(parents=True)
  with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as out:
    for key, value in records.items():
      out.put(key.encode(), value)
  return folder


def write_pairs(folder, values):
  records = {str(i): value for i, value in enumerate(values)}
  return write_lmdb(folder, records | {"num_samples": str(len(values)).encode()})


def test_images_of_the_original(tmp_path):
  images = LmdbImages(DATASET / "lmdb" / "test" / "imgs")
  table = ImageTable([DATASET / "test_imgs.tsv"], index_dir=str(tmp_path))
  assert images.ids == sorted(table.ids, key=str.encode)  # the order in which the original walks
  assert images.ids != table.ids
  for i, row in enumerate(table.find(images.ids)):
    assert images.encoded(i) == table.encoded(row)
  np.testing.assert_array_equal(images.find([*images.ids, "1", ""]), [*range(len(images)), -1, -1])
  assert images.name(0).endswith("imgs:10")


def test_pairs_of_the_original():
  pairs = read_lmdb_pairs(DATASET / "lmdb" / "test" / "pairs")
  texts = read_texts([DATASET / "test_texts.jsonl"])
  with_images = [i for i, images in enumerate(texts.image_ids) if images]
  assert pairs.texts == [texts.texts[i] for i in with_images]
  assert pairs.text_ids == [texts.text_ids[i] for i in with_images]
  assert pairs.image_ids == [texts.image_ids[i] for i in with_images]


def test_one_folder_can_be_opened_twice_and_sent_elsewhere():
  folder = DATASET / "lmdb" / "test" / "imgs"
  first, second = LmdbImages(folder), LmdbImages(folder)
  third = pickle.loads(pickle.dumps(first))
  assert first.encoded(2) == second.encoded(2) == third.encoded(2)


def test_broken_base64_is_a_bad_row(tmp_path):
  images = LmdbImages(
    write_lmdb(tmp_path / "imgs", {"1": b"QUJD\n", "2": b"Q!", "num_images": b"2"})
  )
  assert images.encoded(0) == b"ABC"
  with pytest.raises(BadRow, match="imgs:2: broken base64"):
    images.encoded(1)


class Malicious:
  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return (os.mkdir, (self.mark,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
  mark = str(tmp_path / "mark")
  value = pickle.dumps((1, 2, Malicious(mark)), protocol=protocol)
  folder = write_pairs(tmp_path / "pairs", [pickle.dumps((1, 2, "fine"), protocol=protocol), value])
  with pytest.raises(ValueError, match=r"1 faults among 2 .*record 1: .*refused.*mkdir"):
    read_lmdb_pairs(folder)
  assert not os.path.exists(mark)
  pickle.loads(value)
  assert os.path.exists(mark)  # the pickle was a real one


@pytest.mark.parametrize(
  "value",
  [
    b"",
    b"garbage",
    pickle.dumps((1, 2)),
    pickle.dumps([1, 2, "x"]),
    pickle.dumps((1, 2, 3)),
    pickle.dumps((1.5, 2, "x")),
    pickle.dumps((1, 2, "x"))[:-4],
    b"\x80\x04cos\nsystem\n(S'true'\ntR.",
  ],
)
def test_records_that_are_not_plain_are_named(tmp_path, value):
  good = pickle.dumps((1, 2, "x"))
  folder = write_pairs(tmp_path / "pairs", [good, value, good])
  with pytest.raises(ValueError, match=r"found 1 faults among 3 .*record 1: "):
    read_lmdb_pairs(folder)


def test_stale_records_are_left_out_and_lost_ones_are_an_error(tmp_path):
  values = {str(i): pickle.dumps((i, i, f"text {i}")) for i in range(4)}
  stale = write_lmdb(tmp_path / "stale", values | {"num_samples": b"2"})
  assert read_lmdb_pairs(stale).texts == ["text 0", "text 1"]
  lost = write_lmdb(tmp_path / "lost", values | {"num_samples": b"6"})
  with pytest.raises(ValueError, match=r"2 faults among 6 .*record 4: missing; record 5: missing"):
    read_lmdb_pairs(lost)
  unfinished = write_lmdb(tmp_path / "unfinished", values)
  with pytest.raises(ValueError, match="num_samples"):
    read_lmdb_pairs(unfinished)


def test_faults_of_the_folder_are_errors_at_once(tmp_path):
  with pytest.raises(ValueError, match=r"missing: .*data\.mdb"):
    LmdbImages(tmp_path / "absent")
  with pytest.raises(ValueError, match="found none"):
    LmdbImages(write_lmdb(tmp_path / "empty", {"num_images": b"0"}))
  (tmp_path / "garbage").mkdir()
  (tmp_path / "garbage" / "data.mdb").write_bytes(b"not a database" * 1000)
  with pytest.raises(ValueError, match="Expected an LMDB environment"):
    LmdbImages(tmp_path / "garbage")


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "lmdb", None)
  with pytest.raises(ImportError, match=r"pip install lmdb"):
    LmdbImages(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.25, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("what", ["imgs", "pairs"])
def test_a_file_cut_short_is_told_and_never_mapped(tmp_path, share, what):
  records = {str(i): b"QUJD" * 600 for i in range(200)} | {"num_images": b"200"}
  if what == "pairs":
    records = {str(i): pickle.dumps((1, i, "猫" * 300)) for i in range(200)}
    records |= {"num_samples": b"200"}
  folder = write_lmdb(tmp_path / what, records)
  read = LmdbImages if what == "imgs" else read_lmdb_pairs
  assert len(read(folder)) == 200
  gc.collect()
  file = folder / "data.mdb"
  size = file.stat().st_size
  os.truncate(file, int(size * share))
  with pytest.raises(ValueError, match=r"data\.mdb"):
    read(folder)
  if share >= 0.1:
    with pytest.raises(ValueError, match=f"Expected {size:,} bytes of .* Copy it again"):
      read(folder)


def test_a_file_that_is_no_environment_is_told(tmp_path):
  for data in (b"", b"x" * 9000, bytes(9000)):
    (tmp_path / "data.mdb").write_bytes(data)
    with pytest.raises(ValueError, match="another file"):
      LmdbImages(tmp_path)


def test_damaged_pages_are_told_or_bad_rows(tmp_path):
  """LMDB itself would end the process at many of them."""
  values = {str(i): b"QUJD" * (20 if i % 3 else 1500) for i in range(900)}
  folder = write_lmdb(tmp_path / "imgs", values)
  assert len(LmdbImages(folder)) == 900
  whole, rng = (folder / "data.mdb").read_bytes(), np.random.default_rng(0)
  ended = collections.Counter()
  for turn, way in enumerate(["zeros", "noise", "bits"] * 20):
    data = np.frombuffer(whole, np.uint8).copy()
    start = rng.integers(8192, len(data))
    some = data[start : start + rng.integers(1, 100_000)]
    if way == "zeros":
      some[:] = 0
    elif way == "noise":
      some[:] = rng.integers(0, 256, len(some))
    else:
      data[rng.integers(0, len(data), 30)] ^= np.uint8(1 << rng.integers(8))
    folder = tmp_path / str(turn)  # an environment that is still open would be shared
    folder.mkdir()
    (folder / "data.mdb").write_bytes(data)
    try:
      images = LmdbImages(folder)
    except ValueError as error:
      assert re.search(r"data\.mdb|damaged", str(error))
      ended["told"] += 1
      continue
    for i in range(len(images)):
      try:
        images.encoded(i)
      except BadRow:
        ended["bad rows"] += 1
  assert ended["told"] > 10 and ended["bad rows"] > 10
