import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile

import numpy as np
import pytest

from ofa_jax.data import tar
from ofa_jax.data.pairs import PairData, PairRows
from ofa_jax.data.pipeline import BadRows, Mixture, train_batches
from ofa_jax.data.tar import read_tar
from ofa_jax.data.tsv import BadRow
from ofa_jax.engine.log import read_metrics
from ofa_jax.train import train
from tests import tiny
from tests.data.samples import plain_jpeg
from tests.data.test_pairs import DATASET, SIZE, tokenize


def write(path, members, **options):
  """Writes (name, bytes) members."""
  with tarfile.open(path, "w", **options) as shard:
    for name, content in members:
      member = tarfile.TarInfo(name)
      member.size = len(content)
      shard.addfile(member, io.BytesIO(content))
  return path


def write_shards(folder, data, *, samples):
  """The edges of a data set as shards with so many samples."""
  images, texts = data.load()
  place = {image_id: i for i, image_id in enumerate(images.ids)}
  edges = [(t, i) for t, ids in zip(texts.texts, texts.image_ids, strict=True) for i in ids]
  for begin in range(0, len(edges), samples):
    members = []
    for k, (text, image_id) in enumerate(edges[begin : begin + samples]):
      members += [(f"{k:04}.png", images.encoded(place[image_id])), (f"{k:04}.txt", text.encode())]
    write(folder / f"train-{begin // samples:03}.tar", members)
  return edges


def test_shards_give_the_rows_of_tsv_and_jsonl(tmp_path):
  data = PairData.of(DATASET, "test")
  edges = write_shards(tmp_path, data, samples=7)
  shards = PairData.of(tmp_path / f"train-{{000..{(len(edges) - 1) // 7:03}}}.tar")
  assert shards.load_images().files == PairData.of(tmp_path, "train").load_images().files
  options = {"size": SIZE, "tokenize": tokenize, "cache_dir": tmp_path / "cache"}
  rows, other = PairRows(*shards.load(), **options), PairRows(*data.load(), **options)
  assert len(rows) == len(other) == len(edges)
  assert rows.notes == ()
  for _ in range(2):  # the second time from the decode cache
    for i in range(len(rows)):
      found, expected = rows.example(i, None), other.example(i, None)
      for name in ("image", "tokens", "caption_index"):
        np.testing.assert_array_equal(found[name], expected[name])
  rows.close()


def test_a_position_of_the_stream_is_a_row_on_any_number_of_hosts(tmp_path):
  write_shards(tmp_path, PairData.of(DATASET, "test"), samples=5)
  rows = PairRows(*PairData.of(tmp_path, "train").load(), size=SIZE, tokenize=tokenize)

  def batches(start, steps, **hosts):
    with train_batches(rows, batch_size=8, seed=3, start=start, bad=BadRows(), **hosts) as iterator:
      return [next(iterator) for _ in range(steps)]

  straight = batches(0, 6)
  for again, expected in zip(batches(4, 2), straight[4:], strict=True):
    np.testing.assert_array_equal(again["image"], expected["image"])
  halves = [batches(2, 1, host=host, hosts=2)[0] for host in range(2)]
  whole = np.concatenate([half["tokens"] for half in halves])
  np.testing.assert_array_equal(whole, straight[2]["tokens"])


def test_keys_folders_kinds_and_long_names(tmp_path):
  long = "x" * 150
  image = plain_jpeg(7)
  members = [
    ("a/0.txt", b"zero"),
    ("a/0.JPG", image),
    ("b/0.webp", image),
    ("b/0.json", b"{}"),
    ("b/0.txt", "一只猫\n".encode()),
    (f"{long}.jpeg", image + b"1"),
    (f"{long}.txt", b"long"),
    ("a/1.seg.png", image),
    (".hidden", b"x"),
  ]
  for number, style in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
    path = write(tmp_path / f"{number}.tar", members, format=style)
    images, texts = read_tar([path])
    assert images.ids == ["0/a/0", "0/b/0", f"0/{long}"]
    assert texts.texts == ["zero", "一只猫", "long"]
    assert [images.encoded(i) for i in range(3)] == [image, image, image + b"1"]
    assert images.name(1) == f"{path}:b/0"
    np.testing.assert_array_equal(images.find(["0/b/0", "1/b/0"]), [1, -1])
    assert texts.notes == (f"Left out 1 incomplete samples: {path}:a/1 has no .jpg, .jpeg, .png, "
                           ".webp",)  # fmt: skip
    again = pickle.loads(pickle.dumps(images))
    assert again.encoded(2) == image + b"1"


def test_shards_of_the_tar_command(tmp_path):
  if shutil.which("tar") is None:
    pytest.skip("no tar command")
  folder = tmp_path / "samples"
  folder.mkdir()
  for i in range(3):
    (folder / f"{i}.jpg").write_bytes(plain_jpeg(i))
    (folder / f"{i}.txt").write_text(f"number {i}")
  subprocess.run(["tar", "--sort=name", "-cf", "../s.tar", "."], cwd=folder, check=True)
  images, texts = read_tar([tmp_path / "s.tar"])
  assert texts.texts == ["number 0", "number 1", "number 2"]
  assert images.ids == ["0/0", "0/1", "0/2"]
  assert [images.encoded(i) for i in range(3)] == [plain_jpeg(i) for i in range(3)]


def test_captions_from_a_field_of_json(tmp_path):
  image = plain_jpeg(7)
  rows = {"0": {"zh": "猫", "en": "cat"}, "1": {"en": "dog"}, "2": {"zh": 7}, "3": {"zh": "\ud800"}}
  members = [(f"{k}.json", json.dumps(row).encode()) for k, row in rows.items()]
  members += [(f"{k}.jpg", image) for k in [*rows, "4", "5", "6", "7"]]
  members += [("4.json", b"{"), ("5.json", b"[1]"), ("6.json", b"\xff")]
  members += [("7.json", b"version https://git-lfs.github.com/spec/v1\n")]
  path = write(tmp_path / "a.tar", members)
  assert PairData.of(path, caption="en").load()[1].texts == ["cat", "dog"]
  texts = PairData.of(path, caption="zh").load()[1]  # another index of the same file
  assert texts.texts == ["猫", "7"]
  (note,) = texts.notes
  for part in (
    "Left out 6 incomplete samples",
    "1 has no field 'zh' in its .json",
    "3 'utf-8' codec can't encode",
    "4 has a .json that is none",
    "5 has no field 'zh' in its .json",
    "6 has a .json that is not UTF-8 (bytes",
  ):
    assert part in note


def test_incomplete_samples_are_counted_and_named_in_the_log(digits, two_devices, tmp_path):
  image = plain_jpeg(7, size=16)
  members = [(f"{i:03}.{kind}", image if kind == "jpg" else b"x %d" % i)
             for i in range(40) for kind in ("jpg", "txt")]  # fmt: skip
  del members[5], members[8]
  members += [("twice.jpg", image), ("twice.jpg", image), ("twice.txt", b"x")]
  path = write(tmp_path / "a.tar", members)
  task = {"train": (PairData.of(path),)}
  config = tiny.config(digits, steps=1)
  config.task.train = task["train"]
  assert len(config.task.examples("train")) == 38
  config.task.train = task["train"] * 2
  assert isinstance(config.task.examples("train"), Mixture)
  train(config, str(tmp_path / "run"))
  text = (tmp_path / "run" / "log.txt").read_text()
  expected = f"Left out 3 incomplete samples: {path}:002 has no .txt; {path}:004 has no .txt; "
  assert text.count(f"WARNING | Rank 0 | {expected}{path}:twice has .jpg twice") == 2
  assert read_metrics(tmp_path / "run")[-1]["step"] == 1


def test_the_index_is_used_again_and_made_anew(tmp_path, monkeypatch):
  members = [("1.jpg", plain_jpeg(1)), ("1.txt", b"one")]
  path = write(tmp_path / "a.tar", members)
  read_tar([path])
  assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index.npz"]
  scans = []
  scan = tar._scan
  monkeypatch.setattr(tar, "_scan", lambda p, **o: scans.append(p) or scan(p, **o))
  assert read_tar([path])[1].texts == ["one"]
  assert not scans
  write(path, [*members, ("2.jpg", plain_jpeg(2)), ("2.txt", b"two")])
  assert read_tar([path])[1].texts == ["one", "two"]
  assert len(scans) == 1


def test_damaged_and_compressed_shards_are_errors_at_once(tmp_path):
  good = write(tmp_path / "a.tar", [("1.jpg", plain_jpeg(1)), ("1.txt", b"one")])
  content = good.read_bytes()
  places = {"data": 600, "between": 512 + 1024, "header": 1700}
  bad = [tmp_path / f"{name}.tar" for name in (*places, "empty", "text")]
  for path, length in zip(bad, places.values(), strict=False):
    path.write_bytes(content[:length])
  bad[3].write_bytes(b"")
  bad[4].write_bytes(b"no tar file" * 99)
  packed = tmp_path / "b.tar.gz"
  packed.write_bytes(gzip.compress(content))
  for path in bad:
    with pytest.raises(ValueError, match=rf"found 1 others: .*{path.name} \(.+\)"):
      read_tar([path])
  with pytest.raises(ValueError, match=r"found 2 others: .*b\.tar\.gz \(compressed with gzip\)"):
    PairData((str(good), str(packed), str(bad[0]))).load()
  with pytest.raises(ValueError, match=r"missing: .*absent\.tar"):
    read_tar([tmp_path / "absent.tar"])
  only = write(tmp_path / "c.tar", [("1.jpg", plain_jpeg(1))])
  with pytest.raises(ValueError, match=r"found none in .*Left out 1 incomplete .*1 has no \.txt"):
    read_tar([only])


def test_a_damaged_image_is_a_bad_row(tmp_path):
  members = [("1.jpg", plain_jpeg(1)[:300]), ("1.txt", b"one")]
  path = write(tmp_path / "a.tar", members)
  rows = PairRows(*read_tar([path]), size=SIZE, tokenize=tokenize)
  with pytest.raises(BadRow, match=rf"{path}:1: cannot be decoded"):
    rows.example(0, None)
  images, _ = read_tar([path])
  path.unlink()
  with pytest.raises(BadRow, match=rf"{path}:1: .*No such file"):
    images.encoded(0)


def parts(folder, *, count=3):
  """Tar files of two samples each, as bytes."""
  for part in range(count):
    members = []
    for k in (2 * part, 2 * part + 1):
      members += [(f"{k}.jpg", plain_jpeg(k, size=8)), (f"{k}.txt", f"caption {k}".encode())]
    yield write(folder / f"{part}.tar", members).read_bytes()


@pytest.mark.parametrize("between", [b"", bytes(512), bytes(10240), bytes(512 * 41)])
@pytest.mark.parametrize("records", [True, False])
def test_concatenated_tar_files_are_read_whole(tmp_path, between, records):
  shards = list(parts(tmp_path))
  if not records:  # two blocks of zeros and no filling, as some tools end
    shards = [shard.rstrip(b"\0") for shard in shards]
    shards = [shard + bytes(-len(shard) % 512 + 1024) for shard in shards]
  path = tmp_path / "all.tar"
  path.write_bytes(between.join(shards))
  images, texts = PairData.of(path).load()
  assert texts.texts == [f"caption {k}" for k in range(6)]
  assert [images.encoded(i) for i in range(6)] == [plain_jpeg(k, size=8) for k in range(6)]
  assert texts.notes == ()


@pytest.mark.parametrize("tail", [b"x" * 700, bytes(700) + b"\1" * 512, b"\x1f\x8b" + bytes(600)])
def test_what_follows_a_tar_file_and_is_none_is_told(tmp_path, tail):
  path = tmp_path / "all.tar"
  path.write_bytes(next(parts(tmp_path)) + tail)
  with pytest.raises(ValueError, match=r"no tar file follows its end at byte \d"):
    PairData.of(path).load()


def test_a_concatenated_file_cut_short_is_told(tmp_path):
  shards = b"".join(parts(tmp_path))
  path = tmp_path / "all.tar"
  path.write_bytes(shards[: len(shards) - 10240 + 1500])
  with pytest.raises(ValueError, match=r"cut short|unexpected end"):
    PairData.of(path).load()


@pytest.mark.parametrize(
  ("caption", "read"),
  [
    (7, "7"),
    (2.5, "2.5"),
    ([1], None),
    (True, None),
    (None, None),
    (float("nan"), None),
    ({}, None),
  ],
)
def test_captions_of_json_members_are_texts(tmp_path, caption, read):
  members = [("1.jpg", plain_jpeg(1, size=8)), ("1.json", json.dumps({"c": caption}).encode())]
  members += [("2.jpg", plain_jpeg(2, size=8)), ("2.json", b'\xef\xbb\xbf{"c": "x"}')]
  texts = PairData.of(write(tmp_path / "a.tar", members), caption="c").load()[1]
  assert texts.texts == ([read, "x"] if read else ["x"])
  assert read or "1 the text is" in texts.notes[0]
