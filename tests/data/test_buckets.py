"""Data of every form is the same in a bucket as on a disk, staged or not."""

import io
import json
import os
import pathlib
import tarfile

import numpy as np
import pytest

from ofa_jax import staging, storage
from ofa_jax.data import features, held_out, sources, splits, tsv
from ofa_jax.data.pairs import PairData, find_edges


@pytest.fixture
def forms(digits, tmp_path):
  """One small data set: TSV and JSONL, shards, a table of files, a folder of pictures."""
  folder = tmp_path / "forms"
  folder.mkdir()
  rows = (digits / "valid_imgs.tsv").read_text().splitlines(keepends=True)[:12]
  (folder / "valid_imgs.tsv").write_text("".join(rows))
  captions = [
    {"text_id": i, "text": f"图片{i}", "image_ids": [int(row.split()[0])]}
    for i, row in enumerate(rows)
  ]
  lines = (json.dumps(caption, ensure_ascii=False) for caption in captions)
  (folder / "valid_texts.jsonl").write_text("".join(f"{line}\n" for line in lines))
  images, texts, _ = splits.load({"valid": [str(folder)]}, "valid")[0]
  edges = find_edges(images, texts)
  (folder / "photos").mkdir()
  lines = ["filepath,title"]
  for shard in range(2):
    with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
      for number, (text, image) in enumerate(edges[shard * 6 : shard * 6 + 6]):
        name, data = f"{shard}{number}", images.encoded(int(image))
        for kind, content in (("png", data), ("txt", texts.texts[text].encode())):
          member = tarfile.TarInfo(f"{name}.{kind}")
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))
          (folder / "photos" / member.name).write_bytes(content)
        lines.append(f"photos/{name}.png,{texts.texts[text]}")
  (folder / "t.csv").write_text("\n".join(lines) + "\n")
  return folder


FORMS = ("split", "{}/s-{{0..1}}.tar", "{}/s-*.tar", "{}/t.csv", "{}/photos")


def read(root, form):
  """Of every caption its text and the bytes of its first picture, and the sources' notes."""
  data = PairData.of(root, "valid") if form == "split" else PairData.of(form.format(root))
  images, texts = data.load()
  rows = [(texts.texts[t], images.encoded(int(i))) for t, i in find_edges(images, texts)]
  return rows, texts.notes, images


@pytest.mark.parametrize("staged", [False, True])
def test_pairs(bucket, forms, staged, monkeypatch, tmp_path):
  if staged:
    staging_folder = tmp_path / "ssd"
    monkeypatch.setenv(staging.VARIABLE, str(staging_folder))
  storage.upload(forms, f"{bucket}/d")
  for form in FORMS:
    here, notes, _ = read(forms, form)
    there, told, images = read(f"{bucket}/d", form)
    assert there == here and len(there) >= 12, form
    assert len(told) == len(notes)
    assert all(file.startswith(bucket) for file in images.files)
  names = storage.files_below(f"{bucket}/d")
  assert "valid_imgs.tsv.index.npz" in names and "s-0.tar.index.npz" in names
  if staged:
    copies = {p.name for p in staging_folder.rglob("*") if not p.name.startswith(".")}
    assert {"valid_imgs.tsv", "valid_texts.jsonl", "s-0.tar", "s-1.tar", "t.csv"} <= copies


def test_only_the_shards_that_are_read_are_staged(bucket, forms, monkeypatch, tmp_path):
  storage.upload(forms, f"{bucket}/d")
  read(f"{bucket}/d", "{}/s-*.tar")  # leaves the index
  monkeypatch.setenv(staging.VARIABLE, str(tmp_path / "ssd"))
  images, _ = PairData.of(f"{bucket}/d/s-*.tar").load()
  images.encoded(len(images) - 1)
  assert [p.name for p in (tmp_path / "ssd").rglob("*.tar")] == ["s-1.tar"]


def test_an_index_that_cannot_stand_beside_is_kept_locally(bucket, forms, services, tmp_path):
  storage.upload(forms / "valid_imgs.tsv", f"{bucket}/valid_imgs.tsv")
  services[bucket[:2]].rule = lambda method, path, number: 403 if method != "GET" and (
    method != "HEAD"
  ) else None  # fmt: skip
  table = tsv.ImageTable([f"{bucket}/valid_imgs.tsv"])
  kept = list((tmp_path / "cache" / "ofa_jax" / "index").iterdir())
  assert len(kept) == 1
  asked = len(services[bucket[:2]].asked)
  again = tsv.ImageTable([f"{bucket}/valid_imgs.tsv"])
  assert again.ids == table.ids
  assert len(services[bucket[:2]].asked) - asked < 8  # nothing was scanned


def test_rows_of_ofas_tsv(bucket, shapes, tmp_path):
  name = sorted(pathlib.Path(shapes).glob("*.tsv"))[0]
  storage.upload(name, f"{bucket}/x.tsv")
  options = {"columns": {}, "places": {"id": 0, "image": 4}}
  with_path = [sources.open_rows([str(p)], **options) for p in (name, f"{bucket}/x.tsv")]
  here, there = with_path
  assert len(here) == len(there)
  for i in (0, len(here) // 2, len(here) - 1):
    assert here.text(i, "id") == there.text(i, "id")


@pytest.mark.parametrize("suffix", ["jsonl", "npy"])
def test_features(bucket, tmp_path, suffix):
  vectors = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
  place = f"{bucket}/f.img_feat.{suffix}"
  with features.FeatureWriter(place, kind="image", width=4) as writer:
    writer.resume(range(5), first=[], multiple=1)
    writer.write(writer.encode(range(5), vectors))
    assert not storage.exists(place)
    writer.finish()
  read_back = features.read_features(place, kind="image")
  np.testing.assert_array_equal(read_back.vectors, vectors)
  np.testing.assert_array_equal(read_back.ids, range(5))


def test_missing_data_are_told(bucket):
  with pytest.raises(ValueError, match="missing"):
    tsv.ImageTable([f"{bucket}/no.tsv"])
  with pytest.raises(ValueError, match="none of these"):
    PairData.of(bucket, "train")
  with pytest.raises(ValueError, match="like"):
    PairData.of(f"{bucket}/*.tar").load()


def test_a_cut_file_is_told(bucket, forms):
  whole = (forms / "s-0.tar").read_bytes()
  storage.write_bytes(f"{bucket}/s-0.tar", whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="whole tar files"):
    PairData.of(f"{bucket}/s-0.tar").load()


def test_the_same_pictures_are_held_out():
  names = [f"photos/{i}.jpg" for i in range(20)]
  here = held_out.choose([f"/data/x/{n}" for n in names], 0.3)
  there = held_out.choose([f"gs://b/y/z/{n}" for n in names], 0.3)
  np.testing.assert_array_equal(here, there)


def test_decoded_pixels_stay_on_a_disk(bucket, forms):
  from ofa_jax.data.cache import ImageReader

  storage.upload(forms / "valid_imgs.tsv", f"{bucket}/v.tsv")
  table = tsv.ImageTable([f"{bucket}/v.tsv"])
  with pytest.raises(ValueError, match="local disk"):
    ImageReader(table, size=16, cache_dir=f"{bucket}/cache")
  assert os.listdir() == []
