"""Whatever training reads, opened for its pictures and for a model's questions about them."""

import io
import json
import tarfile

import pytest

from ofa_jax.data import sources
from ofa_jax.data.pairs import PairData
from tests.data.samples import plain_jpeg, write_tsv

lmdb = pytest.importorskip("lmdb")
PICTURES = {f"{i:02}": plain_jpeg(20 * i) for i in range(5)}


@pytest.fixture
def forms(tmp_path):
  """The same five pictures with a caption each in every form."""
  photos = tmp_path / "photos"
  photos.mkdir()
  lines = ["id,filepath,title,text"]
  for name, content in PICTURES.items():
    (photos / f"{name}.jpg").write_bytes(content)
    (photos / f"{name}.txt").write_text(f"图{name}\n", encoding="utf-8")
    lines.append(f"7{name},photos/{name}.jpg,图{name},这是什么")
  (tmp_path / "x.csv").write_text("\n".join(lines), encoding="utf-8-sig")
  (tmp_path / "x.tsv").write_text("\n".join(lines).replace(",", "\t"), encoding="utf-8")
  write_tsv(tmp_path / "x_imgs.tsv", PICTURES.items())
  texts = [
    json.dumps({"text_id": i, "text": f"图{name}", "image_ids": [name]}) + "\n"
    for i, name in enumerate(PICTURES)
  ]
  (tmp_path / "x_texts.jsonl").write_text("".join(texts), encoding="utf-8")
  with tarfile.open(tmp_path / "x.tar", "w") as tar:
    for name, content in PICTURES.items():
      for kind, data in (("jpg", content), ("txt", f"图{name}".encode())):
        member = tarfile.TarInfo(f"{name}.{kind}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
  with tarfile.open(tmp_path / "bare.tar", "w") as tar:
    for name, content in PICTURES.items():
      member = tarfile.TarInfo(f"{name}.jpg")
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  (tmp_path / "imgs").mkdir()
  with lmdb.open(str(tmp_path / "imgs"), map_size=2**20) as env, env.begin(write=True) as db:
    for line in (tmp_path / "x_imgs.tsv").read_bytes().splitlines():
      db.put(*line.split(b"\t"))
    db.put(b"num_images", b"5")
  return tmp_path


FORMS = ("photos", "x.csv", "x.tsv", "x_imgs.tsv", "x.tar", "bare.tar", "imgs")


@pytest.mark.parametrize("form", FORMS)
def test_the_pictures_are_the_same_in_every_form(forms, form):
  images = sources.open_images(forms / form)
  assert [images.encoded(i) for i in range(len(images))] == [*PICTURES.values()]
  table = sources.open_rows([str(forms / form)], columns={}, places={"id": 1, "image": 4})
  assert len(table) == 5 and table.encoded(3) == PICTURES["03"]
  ids = [f"7{name}" for name in PICTURES] if form in ("x.csv", "x.tsv") else images.ids
  assert [table.text(i, "id") for i in range(5)] == ids


@pytest.mark.parametrize("form", ["photos", "x.csv", "x.tsv", "x_imgs.tsv", "x.tar"])
def test_pairs_are_the_same_in_every_form(forms, form):
  images, texts = PairData.of(forms / form).load()
  assert texts.texts == [f"图{name}" for name in PICTURES]
  rows = [images.find(ids).tolist() for ids in texts.image_ids]
  assert [[images.encoded(i) for i in row] for row in rows] == [[p] for p in PICTURES.values()]


def test_a_folder_of_pictures_is_the_split_to_train_on(forms):
  assert PairData.of(forms / "photos", "train") == PairData.of(forms / "photos")
  with pytest.raises(ValueError, match=r"valid\*\.tar, found none of these"):
    PairData.of(forms / "photos", "valid")
  (forms / "photos" / "valid").mkdir()
  for kind in ("jpg", "txt"):
    (forms / "photos" / f"00.{kind}").rename(forms / "photos" / "valid" / f"00.{kind}")
  assert len(PairData.of(forms / "photos", "valid").load()[0]) == 1


def test_of_a_folder_of_drawn_pictures_the_page_is_none(tmp_path):
  for name in ("000000_0.png", "000001_0.png", "page.png"):
    (tmp_path / name).write_bytes(PICTURES["00"])
  lines = ({"files": ["000000_0.png"]}, {"error": "x"}, {"files": ["../a.png", "000001_0.png"]})
  (tmp_path / "drawn.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  images = sources.open_images(tmp_path)
  assert images.ids == [str(tmp_path / f"00000{i}_0.png") for i in range(2)]
  for text in ("{", "[1]", '{"files": [1]}'):
    (tmp_path / "drawn.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"drawn.jsonl: expected the list of a folder that"):
      sources.open_images(tmp_path)


def test_pictures_without_captions_are_left_out_and_named(forms):
  (forms / "photos" / "02.txt").unlink()
  (forms / "photos" / "03.txt").write_text(" \n一\n二\n", encoding="utf-8-sig")
  images, texts = PairData.of(forms / "photos").load()
  assert len(images) == 4 and texts.texts[-3:] == ["一", "二", "图04"]
  assert texts.notes[0].startswith("Left out 1 pictures without a caption: ")
  assert texts.name(2).endswith("03.txt:2 2")
  for data, told in (
    ("红色的鞋子".encode("gbk"), "GBK, it seems"),
    ("红色".encode("utf-16"), "UTF-16"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
    ("红".encode()[:-1], "a character that is cut off"),
  ):
    (forms / "photos" / "04.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"UTF-8, found 1 files.*04\.txt \({told}"):
      PairData.of(forms / "photos").load()


def test_columns_of_a_table_go_by_name(forms):
  table = sources.open_rows(
    [str(forms / "x.csv")],
    columns={"text": "title", "image": "filepath"},
    places={"id": 0, "image": 3, "text": 2},
  )
  assert table.text(1, "text") == "图01" and {*table.columns} == {"id", "text", "image"}
  table = sources.open_rows([str(forms / "x.csv")], columns={}, places={"id": 0, "text": 2})
  assert table.text(1, "text") == "这是什么" and table.text(1, "id") == "701"
  with pytest.raises(ValueError, match=r"a column 'titel'.*did you mean title"):
    sources.open_rows([str(forms / "x.csv")], columns={"text": "titel"}, places={})
  with pytest.raises(ValueError, match=r"names of their columns, found .* and image:1"):
    sources.open_rows([str(forms / "x.csv")], columns={"image": 1}, places={})
  with pytest.raises(ValueError, match=r"numbers of columns, from 0.*found text:title"):
    sources.open_rows([str(forms / "x_imgs.tsv")], columns={"text": "title"}, places={})


def test_ofas_files_are_read_as_they_are(forms):
  line = b"1\t2\tcaption\t" + b"\t".join(
    (forms / "x_imgs.tsv").read_bytes().split(b"\n")[0].split()
  )
  (forms / "ofa.tsv").write_bytes(line + b"\n")
  table = sources.open_rows([str(forms / "ofa.tsv")], columns={}, places={"id": 1, "image": 4})
  assert table.text(0, "id") == "2" and table.encoded(0) == PICTURES["00"]
  table = sources.open_rows(
    [str(forms / "x_imgs.tsv")], columns={"id": 0, "image": 1}, places={"id": 1, "image": 4}
  )
  assert table.text(4, "id") == "04" and table.encoded(4) == PICTURES["04"]


def test_what_is_missing_is_told(forms):
  (forms / "empty").mkdir()
  for name, text in (
    ("empty", "found none"),
    ("nothing.csv", "missing"),
    ("nothing*.tar", "Check the pattern"),
  ):
    with pytest.raises(ValueError, match=text):
      sources.open_images(forms / name)
  with pytest.raises(ValueError, match="one source of pictures"):
    sources.open_rows([str(forms / "photos")] * 2, columns={}, places={})
  (forms / "photos" / "00.jpg").unlink()
  with pytest.raises(ValueError, match=r"1 whose image is missing: .*x\.csv:2"):
    sources.open_images(forms / "x.csv")


def test_features_beside_the_data_are_no_captions(forms):
  for name in ("x_texts.txt_feat.jsonl", "x_texts.tr.jsonl", "x_texts.txt_feat.jsonl.partial"):
    (forms / name).write_text('{"text_id": 0, "feature": [1.0]}\n')
  (forms / "x_imgs.img_feat.jsonl").write_text('{"image_id": 0, "feature": [1.0]}\n')
  data = PairData.of(forms, "x")
  assert data.texts == (str(forms / "x_texts.jsonl"),)
  assert data.images == (str(forms / "x_imgs.tsv"),)
  assert len(data.load()[1]) == 5


def test_two_columns_of_texts_are_no_id_and_picture(tmp_path):
  (tmp_path / "captions.tsv").write_text("a\ta red dot\nb\ta blue bar\n")
  table = sources.open_rows(
    [str(tmp_path / "captions.tsv")], columns={}, places={"id": 0, "text": 1}
  )
  assert [table.text(i, "text") for i in range(2)] == ["a red dot", "a blue bar"]
  assert table.text(1, "id") == "b"
