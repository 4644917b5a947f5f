import base64
import collections
import errno
import hashlib
import io
import json
import multiprocessing
import os

import numpy as np
import pytest
from PIL import Image

from ofa_jax.data import quickstart


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return quickstart.digits(tmp_path_factory.mktemp("data") / "new")


def read_images(path, split):
  lines = (path / f"{split}_imgs.tsv").read_text().splitlines()
  rows = [line.split("\t") for line in lines]
  return {int(i): base64.b64decode(encoded, validate=True) for i, encoded in rows}


def read_texts(path, split):
  lines = (path / f"{split}_texts.jsonl").read_text(encoding="utf-8").splitlines()
  return [json.loads(line) for line in lines]


def test_images_are_the_enlarged_scans(path):
  from sklearn.datasets import load_digits

  files = read_images(path, "train") | read_images(path, "valid")
  scans = load_digits().images
  assert sorted(files) == list(range(1797))
  for i in (0, 5, 1796):
    image = Image.open(io.BytesIO(files[i]))
    assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")
    means = np.asarray(image, float)[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
    assert np.corrcoef(means.ravel(), scans[i].ravel())[0, 1] > 0.98
    assert abs(means.mean() / 255 - scans[i].mean() / 16) < 0.02


def test_the_splits_are_disjoint_and_the_held_out_one_is_even(path):
  train, valid = read_images(path, "train"), read_images(path, "valid")
  assert (len(train), len(valid)) == (1437, 360)
  assert not train.keys() & valid.keys()
  folders = sorted((path / "zeroshot/test").iterdir())
  assert [folder.name for folder in folders] == list("0123456789")
  held_out = {int(file.stem): file.read_bytes() for f in folders for file in f.iterdir()}
  assert held_out == valid
  assert {len(list(folder.iterdir())) for folder in folders} == {36}


def test_every_image_has_each_template_with_the_name_of_its_digit(path):
  from sklearn.datasets import load_digits

  labels = load_digits().target
  names = (path / "zeroshot/label_cn.txt").read_text(encoding="utf-8").splitlines()
  assert names == list("零一二三四五六七八九")
  assert (path / "zeroshot/label.txt").read_text().splitlines() == list("0123456789")
  text_ids = []
  for split in ("train", "valid"):
    captions = collections.defaultdict(list)
    for row in read_texts(path, split):
      text_ids.append(row["text_id"])
      for image_id in row["image_ids"]:
        captions[image_id].append(row["text"])
    assert captions.keys() == read_images(path, split).keys()
    for image_id, texts in captions.items():
      name = names[labels[image_id]]
      assert texts == [template.format(name) for template in quickstart.TEMPLATES]
  assert text_ids == list(range(120))


def test_a_change_of_the_recipe_needs_a_new_version(path):
  digest = hashlib.sha256()
  for split in ("train", "valid"):
    digest.update((path / f"{split}_texts.jsonl").read_bytes())
    for image_id, file in read_images(path, split).items():
      digest.update(b"%d" % image_id + Image.open(io.BytesIO(file)).tobytes())
  assert (quickstart.VERSION, digest.hexdigest()[:16]) == (1, "39e847ad4c7bd87a")


def test_what_is_there_is_kept(path):
  marker = path / "marker"
  marker.touch()
  assert quickstart.digits(path.parent) == path
  assert marker.exists()
  marker.unlink()


def test_two_processes_at_once(tmp_path):
  context = multiprocessing.get_context("spawn")
  with context.Pool(2) as pool:
    paths = pool.map(quickstart.digits, [tmp_path] * 2, chunksize=1)
  assert paths[0] == paths[1]
  assert [p.name for p in tmp_path.iterdir()] == [paths[0].name]  # and no scratch folder
  assert len(read_images(paths[0], "train")) == 1437


def test_another_process_was_first(tmp_path, monkeypatch):
  write = quickstart._write

  def write_while_another_finishes(folder):
    write(folder)
    monkeypatch.setattr(quickstart, "_write", write)
    quickstart.digits(tmp_path)

  monkeypatch.setattr(quickstart, "_write", write_while_another_finishes)
  assert len(read_images(quickstart.digits(tmp_path), "valid")) == 360
  assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
  def fail(path):
    path.mkdir()
    raise KeyboardInterrupt

  monkeypatch.setattr(quickstart, "_write", fail)
  with pytest.raises(KeyboardInterrupt):
    quickstart.digits(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_place(tmp_path):
  def write(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with pytest.raises(ValueError, match=r"room for .*digits-v1, found: No space left on device"):
    quickstart.make_once(tmp_path, "digits-v1", write)
  assert list(tmp_path.iterdir()) == []
