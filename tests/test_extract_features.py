"""`extract_features`: the original's files from TSV and LMDB, faults, and runs that were killed."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from ofa_jax import api, extract_features, retrieve, shards
from ofa_jax.data import features, sources, tsv
from ofa_jax.data.lmdb import LmdbImages
from ofa_jax.data.pairs import PairData
from ofa_jax.data.pipeline import TooManyBadRows
from tests.compiling import QUICK
from tests.evaluation_golden import MODELS, RETRIEVAL, read_jsonl, save_model

pytestmark = pytest.mark.usefixtures("two_devices")
DATA = RETRIEVAL / "dataset"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  return {name: save_model(folder, name) for name in MODELS}


@pytest.fixture(scope="module")
def vit(directories):
  return api.load_from_name(directories["vit"])[0]


@pytest.fixture
def images(tmp_path):
  return tsv.ImageTable([DATA / "test_imgs.tsv"], index_dir=tmp_path)


@pytest.fixture
def texts():
  return tsv.read_texts([DATA / "test_texts.jsonl"])


def compare(found, expected, key):
  """Same ids in the same order, features within 1e-4."""
  found, expected = read_jsonl(found), read_jsonl(expected)
  assert [list(row) for row in found] == [[key, "feature"]] * len(expected)
  assert [row[key] for row in found] == [row[key] for row in expected]
  a, b = (np.array([row["feature"] for row in rows]) for rows in (found, expected))
  np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.fixture(params=("fp32", "fp64"))
def precision(request):
  # Not by `jax.enable_x64`, which the threads that encode do not see.
  jax.config.update("jax_enable_x64", request.param == "fp64")
  yield request.param
  jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("model", MODELS)
def test_golden(directories, tmp_path, images, texts, model, precision):
  image, text = tmp_path / "i.img_feat.jsonl", tmp_path / "t.txt_feat.jsonl"
  handle, _ = api.load_from_name(directories[model], precision=precision)
  assert extract_features.extract_images(handle, images, output=image, batch_size=7) == 18
  assert extract_features.extract_texts(handle, texts, output=text, batch_size=5) == 21
  numbers = np.array([row["feature"] for row in read_jsonl(image)])
  np.testing.assert_array_equal(numbers, np.float32(numbers))  # the files are float32's always
  compare(image, RETRIEVAL / model / "test_imgs.img_feat.jsonl", "image_id")
  compare(text, RETRIEVAL / model / "test_texts.txt_feat.jsonl", "text_id")
  line = image.read_text().splitlines()[0]
  assert line == json.dumps(json.loads(line))  # spaces and digits of Python's json
  # From the TSV to the scores: the original's very files.
  for direction, annotations, name, scores in (
    ("t2i", "test_texts.jsonl", "test_predictions.jsonl", "eval_ir.json"),
    ("i2t", "test_texts.tr.jsonl", "test_tr_predictions.jsonl", "eval_tr.json"),
  ):
    predictions = tmp_path / name
    retrieve.topk(image, text, output=predictions, direction=direction)
    assert predictions.read_bytes() == (RETRIEVAL / model / name).read_bytes()
    score = retrieve.recall(DATA / annotations, predictions, direction=direction)
    assert json.dumps(score) == (RETRIEVAL / model / scores).read_text()


def test_command(directories, tmp_path):
  environment = os.environ | QUICK | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
  shutil.copy(DATA / "test_imgs.tsv", tmp_path)
  command = [
    *(sys.executable, "-m", "ofa_jax.extract_features", f"--model={directories['vit']}"),
    *(f"--images={tmp_path / 'test_imgs.tsv'}", f"--texts={DATA / 'test_texts.jsonl'}"),
    f"--output={tmp_path / 'out'}",
  ]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "18 image features" in done.stdout and "21 text features" in done.stdout
  compare(
    tmp_path / "out" / "test_imgs.img_feat.jsonl",
    RETRIEVAL / "vit" / "test_imgs.img_feat.jsonl",
    "image_id",
  )
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
    "test_imgs.img_feat.jsonl",
    "test_texts.txt_feat.jsonl",
  ]
  command[3] = "--model=VIT-B-16"
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 1
  assert done.stderr.startswith("error: ") and "did you mean ViT-B-16" in done.stderr


def test_lmdb_is_the_tsv(vit, tmp_path, images):
  a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
  extract_features.extract_images(vit, images, output=a)
  extract_features.extract_images(vit, LmdbImages(DATA / "lmdb" / "test" / "imgs"), output=b)
  assert a.read_bytes() == b.read_bytes()


def test_file_order(vit, tmp_path, images):
  path = tmp_path / "a.jsonl"
  extract_features.extract_images(vit, images, output=path, order="file")
  assert [row["image_id"] for row in read_jsonl(path)] == [int(i) for i in images.ids]


def test_npy_holds_the_same(vit, tmp_path, texts):
  for name in ("a.npy", "a.jsonl"):
    extract_features.extract_texts(vit, texts, output=tmp_path / name)
  a, b = (features.read_features(tmp_path / name, kind="text") for name in ("a.npy", "a.jsonl"))
  np.testing.assert_array_equal(a.ids, b.ids)
  np.testing.assert_array_equal(a.vectors, b.vectors)
  assert a.vectors.dtype == np.float32


class KilledError(Exception):
  pass


@pytest.mark.parametrize("suffix", ["jsonl", "npy"])
def test_resumes_to_the_same_bytes(vit, tmp_path, texts, suffix, monkeypatch):
  straight, path = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
  extract_features.extract_texts(vit, texts, output=straight, batch_size=4)
  calls = []

  def count(tokens):
    calls.append(len(tokens))
    return type(vit).encode_text(vit, tokens)

  write = features.FeatureWriter.write

  def die(writer, rows):
    write(writer, rows)
    if writer.partial.stat().st_size > 0.6 * straight.stat().st_size:
      raise KilledError

  with monkeypatch.context() as patch:
    patch.setattr(features.FeatureWriter, "write", die)
    with pytest.raises(KilledError):
      extract_features.extract_texts(vit, texts, output=path, batch_size=4)
  partial = tmp_path / f"b.{suffix}.partial"
  partial.write_bytes(partial.read_bytes()[:-11])  # a row cut in the middle
  monkeypatch.setattr(vit, "encode_text", count, raising=False)
  extract_features.extract_texts(vit, texts, output=path, batch_size=4)
  assert path.read_bytes() == straight.read_bytes()
  assert not partial.exists()
  assert sum(calls) < 21  # the first batch, to compare it, and what was missing


@pytest.mark.parametrize("suffix", ["jsonl", "npy"])
@pytest.mark.parametrize("num", [4, 9])  # of 7 batches of texts and 6 of images: some are empty
def test_shares_of_the_rows_make_the_bytes_of_one_job(
  vit, tmp_path, images, texts, suffix, num, monkeypatch
):
  for extract, rows in (
    (extract_features.extract_texts, texts), (extract_features.extract_images, images)
  ):  # fmt: skip
    straight, path = (tmp_path / f"{x}.{extract.__name__}.{suffix}" for x in ("one", "many"))
    whole = extract(vit, rows, output=straight, batch_size=3)
    parts = [shards.Shard(i, num) for i in range(num)]
    counts = [extract(vit, rows, output=path, batch_size=3, shard=part) for part in parts[1:]]
    with pytest.raises(ValueError, match=rf"found no .*00000-of-{num:05d}.{suffix}"):
      shards.merge(path, shards.Shard(None, num), join=features.join_of(path))
    with monkeypatch.context() as patch:  # a part that is killed goes on, too
      patch.setattr(features.FeatureWriter, "finish", die)
      with pytest.raises(KilledError):
        extract(vit, rows, output=path, batch_size=3, shard=parts[0])
    counts.append(extract(vit, rows, output=path, batch_size=3, shard=parts[0]))
    assert sum(counts) == whole and shards.merge(
      path, shards.Shard(None, num), join=features.join_of(path)
    )
    assert path.read_bytes() == straight.read_bytes()


def test_does_not_resume_another_model(vit, tmp_path, texts, monkeypatch, capsys):
  path = tmp_path / "a.jsonl"
  extract_features.extract_texts(vit, texts, output=path, batch_size=4)
  expected = path.read_bytes()
  rows = read_jsonl(path)[:9]
  for row in rows:
    row["feature"][0] += 0.5
  left = "".join(json.dumps(row) + "\n" for row in rows)
  place = tmp_path / "a.jsonl.partial"
  place.write_text(left)  # without a note
  extract_features.extract_texts(vit, texts, output=path, batch_size=4)
  assert path.read_bytes() == expected
  # With the note of this very work, as after a run on another machine.
  with monkeypatch.context() as patch:
    patch.setattr(features.FeatureWriter, "write", die)
    with pytest.raises(KilledError):
      extract_features.extract_texts(vit, texts, output=path, batch_size=4)
  place.write_text(left)
  extract_features.extract_texts(vit, texts, output=path, batch_size=4)
  assert path.read_bytes() == expected
  assert "no whole batch would be the same" in capsys.readouterr().out
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def die(writer, rows=()):
  writer._file.write(b"".join(rows))
  raise KilledError


def renumbered(lines):
  return [lines[0].replace(b'"text_id": ', b'"text_id": 9', 1), *lines[1:]]


def without_the_third(lines):
  return lines[:2] + lines[3:]


def another_at_the_end(lines):
  return [*lines, lines[0].replace(b'"text_id": ', b'"text_id": 9', 1)]


@pytest.mark.parametrize("edit", [renumbered, without_the_third, another_at_the_end])
def test_does_not_resume_over_an_edited_file(vit, tmp_path, edit, monkeypatch, capsys):
  file, path = tmp_path / "texts.jsonl", tmp_path / "a.jsonl"
  shutil.copy(DATA / "test_texts.jsonl", file)
  write = features.FeatureWriter.write

  def later(writer, rows):
    write(writer, rows)
    if writer.partial.stat().st_size > 3000:
      raise KilledError

  with monkeypatch.context() as patch:
    patch.setattr(features.FeatureWriter, "write", later)
    with pytest.raises(KilledError):
      extract_features.extract_texts(vit, tsv.read_texts([file]), output=path, batch_size=4)
  file.write_bytes(b"".join(edit(file.read_bytes().splitlines(keepends=True))))
  texts = tsv.read_texts([file])
  extract_features.extract_texts(vit, texts, output=path, batch_size=4)
  assert "Starting anew" in capsys.readouterr().out
  assert [row["text_id"] for row in read_jsonl(path)] == texts.text_ids
  extract_features.extract_texts(vit, texts, output=tmp_path / "straight.jsonl", batch_size=4)
  assert path.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_a_model_is_known_by_its_files(directories, tmp_path, monkeypatch):
  folder = tmp_path / "model"
  shutil.copytree(directories["vit"], folder)
  a, b = (api.load_from_name(x)[0].identity for x in (directories["vit"], directories["rn50"]))
  copied = api.load_from_name(folder)[0].identity
  assert api.load_from_name(directories["vit"])[0].identity == a != b
  assert a["model"] != b["model"] and a["model"] != copied["model"]
  json.dumps(a)
  (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
  monkeypatch.setenv("OFA_JAX_VERIFY", "0")
  assert api.load_from_name(folder)[0].identity["model"] != copied["model"]


def spoilt(tmp_path, change):
  lines = (DATA / "test_imgs.tsv").read_bytes().splitlines(keepends=True)
  path = tmp_path / "bad.tsv"
  path.write_bytes(b"".join(change(lines)))
  return tsv.ImageTable([path], index_dir=tmp_path)


def test_unreadable_image_is_left_out(vit, tmp_path, capsys):
  table = spoilt(tmp_path, lambda lines: [lines[0][:40] + b"\n", *lines[1:]])
  for name in ("a.jsonl", "a.npy"):
    assert (
      extract_features.extract_images(
        vit, table, output=tmp_path / name, batch_size=4, max_bad_rate=0.1
      )
      == 17
    )
    found = features.read_features(tmp_path / name, kind="image")
    assert sorted(found.ids) == sorted(int(i) for i in table.ids[1:])
  assert f"{tmp_path / 'bad.tsv'}:1 {table.ids[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["jsonl", "npy"])
def test_too_many_unreadable_images(vit, tmp_path, suffix):
  table = spoilt(tmp_path, lambda lines: [line[:40] + b"\n" for line in lines])
  with pytest.raises(TooManyBadRows, match=r"bad.tsv:"):
    extract_features.extract_images(vit, table, output=tmp_path / f"a.{suffix}")
  assert not list(tmp_path.glob("a.*"))  # no row is in what was begun


def test_ids_must_be_integers(vit, tmp_path, texts):
  table = spoilt(tmp_path, lambda lines: [b"a.jpg\t" + lines[0].split(b"\t")[1], *lines[1:]])
  with pytest.raises(ValueError, match=r"integers as image ids, found 1 fault: .*bad.tsv:1 a.jpg"):
    extract_features.extract_images(vit, table, output=tmp_path / "a.jsonl")
  texts.text_ids[2] = "x"
  with pytest.raises(ValueError, match=r"integers as text ids.*test_texts.jsonl:3 x"):
    extract_features.extract_texts(vit, texts, output=tmp_path / "a.jsonl")


def test_pictures_and_captions_out_of_a_table_make_files_for_recall(vit, tmp_path, capsys):
  """The features of the TSV's pictures, numbered, and annotations with the same numbers."""
  images, texts = PairData.of(DATA, "test").load()
  lines = ["filepath,title"]
  for i, name in enumerate(images.ids):
    (tmp_path / f"{name}.png").write_bytes(images.encoded(i))
  for text, ids in zip(texts.texts, texts.image_ids, strict=True):
    lines += [f'{name}.png,"{text}"' for name in ids]
  (tmp_path / "my.csv").write_text("\n".join(lines), encoding="utf-8")
  table = sources.open_images(tmp_path / "my.csv")
  read = sources.open_texts(tmp_path / "my.csv")
  assert len(table) == len({name for ids in texts.image_ids for name in ids})
  output = tmp_path / "my.img_feat.jsonl"
  assert extract_features.extract_images(vit, table, output=output) == len(table)
  rows = read_jsonl(output)
  assert [row["image_id"] for row in rows] == [*range(len(table))]
  extract_features.extract_images(vit, images, output=tmp_path / "tsv.jsonl")
  expected = {str(row["image_id"]): row["feature"] for row in read_jsonl(tmp_path / "tsv.jsonl")}
  for row, name in zip(rows, table.ids, strict=True):
    place = os.path.splitext(os.path.basename(name))[0]
    np.testing.assert_allclose(row["feature"], expected[place], atol=1e-5)
  for line in extract_features._annotations(read, table):
    names = [os.path.splitext(os.path.basename(table.ids[i]))[0] for i in line["image_ids"]]
    assert {*names} == {
      name for t, ids in zip(texts.texts, texts.image_ids, strict=True) if t == line["text"]
      for name in ids
    }  # fmt: skip
  assert next(extract_features._annotations(texts, images))["image_ids"] == [
    int(name) for name in texts.image_ids[0]
  ]
  assert extract_features._stem("a/shard-{0..9}*.tar") == "shard-_0..9"
