"""Text files as other programs save them: every reader takes them alike, or tells what they are."""

import base64
import bz2
import gzip
import json
import lzma

import numpy as np
import pytest

from ofa_jax import retrieve, text_files, zeroshot
from ofa_jax.data import answers
from ofa_jax.data.features import FeatureWriter, check_ids, read_features
from ofa_jax.data.table import read_table
from ofa_jax.data.tsv import BadRow, ImageTable, Table, read_texts
from ofa_jax.scoring import retrieval
from tests.data.samples import plain_jpeg

NOISE = np.random.default_rng(0).bytes(4096)
JPEG = base64.b64encode(plain_jpeg(1, size=8))
CHINESE = ["一只猫", "两条狗", "图片描述了什么"]


def names(path):
  return zeroshot.read_names(path, count=3)


def captions(path):
  return read_texts([path]).texts


def table(path):
  return read_table([path])[1].texts


def vectors(path):
  return read_features(path, kind="text").vectors.tolist()


def columns(path):
  rows = Table([path], columns={"id": 0, "text": 1})
  return [rows.text(i, "text") for i in range(len(rows))]


def image_ids(path):
  return ImageTable([path]).ids


READERS = {  # file, reader, text, what is read
  "label_cn.txt": (names, "\n".join(CHINESE), CHINESE),
  "candidates.txt": (answers.load, "\n".join(CHINESE), tuple(CHINESE)),
  "candidates.json": (answers.load, json.dumps(CHINESE, ensure_ascii=False), tuple(CHINESE)),
  "index.json": (lambda p: zeroshot.read_index(p, count=3), "[2, 0, 1]", [2, 0, 1]),
  "texts.jsonl": (
    captions,
    "".join(
      json.dumps({"text_id": i, "text": t, "image_ids": [i]}, ensure_ascii=False) + "\n"
      for i, t in enumerate(CHINESE)
    ),
    CHINESE,
  ),
  "ids.jsonl": (
    retrieval.read_ids,
    '{"text_id": 1, "image_ids": [7], "text": "两条狗"}\n',
    {1: [7]},
  ),
  "both.csv": (table, "filepath,title\n" + "".join(f"a.jpg,{t}\n" for t in CHINESE), CHINESE),
  "f.txt_feat.jsonl": (vectors, '{"text_id": 1, "feature": [0.5, 2.0]}\n', [[0.5, 2.0]]),
}
IN_PLACE = {  # read by position: not out of an archive
  "vqa.tsv": (columns, "".join(f"{i}\t{t}\n" for i, t in enumerate(CHINESE)), CHINESE),
  "x_imgs.tsv": (image_ids, "".join(f"{i}\t{JPEG.decode()}\n" for i in (3, 4)), ["3", "4"]),
}


@pytest.fixture
def write(tmp_path):
  (tmp_path / "a.jpg").write_bytes(plain_jpeg(1, size=8))

  def write(name, data):
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)

  return write


@pytest.mark.parametrize("name", [*READERS, *IN_PLACE])
def test_a_mark_of_utf8_changes_nothing(write, name):
  read, text, expected = (READERS | IN_PLACE)[name]
  assert read(write(name, text.encode())) == expected
  assert read(write(name, text_files.MARK + text.encode())) == expected
  windows = text_files.MARK + text.replace("\n", "\r\n").encode()
  assert read(write(name, windows)) == expected


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", READERS)
def test_packed_files_are_read(write, name, pack):
  read, text, expected = READERS[name]
  assert read(write(name, pack(text_files.MARK + text.encode()))) == expected


@pytest.mark.parametrize("name", READERS)
def test_a_packed_file_cut_short_is_told(write, name):
  read, text, _ = READERS[name]
  with pytest.raises(ValueError, match="damaged"):
    read(write(name, gzip.compress(text.encode())[:-9]))


@pytest.mark.parametrize("name", [*READERS, *IN_PLACE])
def test_other_encodings_are_told_with_file_and_cure(write, name, capsys):
  read, text, _ = (READERS | IN_PLACE)[name]
  for encoding, told in (("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("gbk", "GBK")):
    if (encoding == "gbk" and text.isascii()) or (encoding == "utf-16-le" and len(text) < 40):
      continue  # nothing tells a few Chinese signs without a mark from other bytes
    with pytest.raises(ValueError, match=told) as error:
      read(write(name, text.encode(encoding)))
    message = str(error.value)
    assert name in message
    assert f"iconv -f {told}" in message
    assert all(c.isprintable() or c == "\n" for c in message)
    assert len(message) < 900
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [*READERS, *IN_PLACE])
@pytest.mark.parametrize("data", [b"PK\x03\x04" + bytes(60), NOISE, b"PAR1" + bytes(9)])
def test_binary_files_are_told_without_their_bytes(write, name, data):
  read = (READERS | IN_PLACE)[name][0]
  with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
    read(write(name, data))
  assert all(c.isprintable() or c == "\n" for c in str(error.value))


@pytest.mark.parametrize("name", [*READERS, *IN_PLACE])
@pytest.mark.parametrize(
  ("data", "told"),
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "git lfs pull"),
    (b"<!DOCTYPE html>\n<html><body>Not Found</body></html>\n", "a web page.*download"),
    (text_files.MARK + b"\n<html>\n<head>\n</head>\n</html>\n", "a web page.*download"),
    (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "a web page.*download"),
  ],
)
def test_what_stands_in_place_of_a_file_is_told_as_that(write, name, data, told):
  read = (READERS | IN_PLACE)[name][0]
  with pytest.raises(ValueError, match=rf"{name}.* in UTF-8, found .*{told}"):
    read(write(name, data))


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize(
  ("pack", "kind"),
  [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lambda x: b"(\xb5/\xfd" + x, "zstd")],
)
def test_a_packed_tsv_is_told_as_that(write, name, pack, kind):
  read, text, _ = IN_PLACE[name]
  with pytest.raises(ValueError, match=f"compressed with {kind}.*Unpack"):
    read(write(name, pack(text.encode())))


@pytest.mark.parametrize("between", [" ", ",", "\\t"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_missing_tab_is_told_as_that(write, name, between):
  read, text, _ = IN_PLACE[name]
  with pytest.raises(ValueError, match="no tab in any of its") as error:
    read(write(name, text.replace("\t", between).encode()))
  assert len(str(error.value)) < 500


def test_single_rows_in_another_encoding_are_bad_rows(write):
  good = "".join(f"{i}\t{t}\n" for i, t in enumerate(CHINESE * 3))
  path = write("a.tsv", good.encode() + "9\t一只猫在垫子上\n".encode("gbk"))
  rows = Table([path], columns={"id": 0, "text": 1})
  with pytest.raises(BadRow, match="text is not UTF-8: GBK, it seems"):
    rows.text(9, "text")
  assert rows.text(8, "text") == CHINESE[2]


@pytest.mark.parametrize("space", [b" ", b"  \t".replace(b"\t", b" "), b"\x0b", b"\r"])
def test_white_space_around_and_in_base64_is_left_out(write, space):
  half = len(JPEG) // 2
  for text in (JPEG + space, space + JPEG, JPEG[:half] + space + JPEG[half:]):
    rows = ImageTable([write("a_imgs.tsv", b"1\t%s\n2\t%s\n" % (text, JPEG))])
    assert rows.encoded(0) == rows.encoded(1) == plain_jpeg(1, size=8)


def test_other_characters_in_base64_are_faults_of_their_row(write):
  rows = ImageTable([write("a_imgs.tsv", b"1\t%s\n2\t%s\n" % (JPEG[:-2] + b"*=", JPEG[:-1]))])
  for i in (0, 1):
    with pytest.raises(BadRow, match="broken base64"):
      rows.encoded(i)


def test_names_of_rows_are_printable_and_short(write):
  path = write("a.tsv", b"\x1b[31m\x07\xff" + b"x" * 200 + b"\ta\n1\tb\n")
  name = Table([path], columns={"id": 0, "text": 1}).name(0)
  assert name.isprintable()
  assert len(name) < len(path) + 100


def test_what_cannot_be_printed_is_escaped_and_cut():
  assert text_files.shown("猫\x1b[0m\n") == "猫\\x1b[0m\\n"
  assert text_files.shown(b"\xff\x00a") == "\\xff\\x00a"
  assert text_files.shown("x" * 100, 5) == "xxxxx..."
  assert len(text_files.shown(["\0" * 10**6])) < 90


def line(**fields):
  row = {"text_id": 1, "text": "x", "image_ids": [7]} | fields
  return json.dumps(row) + "\n"


@pytest.mark.parametrize(
  ("value", "read"), [(2024, "2024"), (3.5, "3.5"), (-1, "-1"), (10**30, str(10**30)), ("", "")]
)
def test_numbers_as_captions_are_read_as_they_are_written(write, value, read):
  assert captions(write("t.jsonl", line(text=value).encode())) == [read]


@pytest.mark.parametrize(
  ("value", "told"),
  [
    (float("nan"), r"no number \(NaN\)"),
    (float("inf"), "a number that is not whole"),
    (["一", "二"], "a list"),
    ({"zh": "猫"}, "an object"),
    (True, "true or false"),
    (None, "missing"),
    ([["x" * 10**5]], "a list"),
  ],
)
def test_what_is_no_caption_is_told(write, value, told):
  with pytest.raises(ValueError, match=rf"t\.jsonl:2 the text is {told}") as error:
    captions(write("t.jsonl", (line() + line(text=value)).encode()))
  assert len(str(error.value)) < 500


@pytest.mark.parametrize("field", ["text_id", "image_ids"])
def test_ids_of_json(write, field):
  def read(value):
    texts = read_texts([write("t.jsonl", line(**{field: value}).encode())])
    return texts.text_ids[0] if field == "text_id" else texts.image_ids[0]

  wrap = (lambda x: x) if field == "text_id" else (lambda x: [x])
  as_read = (lambda x: x) if field == "text_id" else (lambda x: (str(x),))
  for value, expected in ((7, 7), (7.0, 7), ("a", "a"), (2**63, 2**63), (-(10**25), -(10**25))):
    assert read(wrap(value)) == as_read(expected)
  for value in (7.5, float("nan"), True, None, [7], {"a": 7}, 1e300):
    with pytest.raises(
      ValueError, match=rf"t\.jsonl:1 .*{'text_id' if field[0] == 't' else 'entry'}"
    ):
      read(wrap(value))


@pytest.mark.parametrize("text", ["7", '"x"', "[1]", "null", "{}", '{"text_id": 1}', "[" * 5000])
def test_lines_that_are_no_captions_are_counted(write, text):
  with pytest.raises(ValueError, match=r"found 1 fault: .*t\.jsonl:2"):
    captions(write("t.jsonl", (line() + text + "\n").encode()))


@pytest.mark.parametrize("big", [2**63, 2**64 + 1, 10**30])
def test_ids_beyond_64_bits_go_through_features_and_top_k(tmp_path, big):
  ids = [big, -big - 1, 5]
  eye = np.eye(3, dtype=np.float32)
  for kind in ("image", "text"):
    with FeatureWriter(tmp_path / f"{kind}.jsonl", kind=kind, width=3) as writer:
      writer.resume(ids, first=[], multiple=1)
      writer.write(writer.encode(ids, eye))
      writer.finish()
  assert read_features(tmp_path / "image.jsonl", kind="image").ids.tolist() == ids
  paths = {"image_feats": tmp_path / "image.jsonl", "text_feats": tmp_path / "text.jsonl"}
  retrieve.topk(**paths, output=tmp_path / "p.jsonl", k=1)
  assert retrieval.read_ids(tmp_path / "p.jsonl") == {i: [i] for i in ids}
  with pytest.raises(ValueError, match=r"2\^63.*found 2 faults: a \(.*b \("):
    check_ids(ids, ["a", "b", "c"], form="npy")
  check_ids(ids, ["a", "b", "c"], form="jsonl")


@pytest.mark.parametrize(
  ("value", "read"),
  [
    ("7", 7),
    ("7.0", 7),
    ("7.5", None),
    ("true", None),
    ('"7"', None),
    ("NaN", None),
    ("1e40", None),
  ],
)
def test_ids_of_features(write, value, read):
  path = write("f.jsonl", b'{"text_id": %s, "feature": [1.0]}\n' % value.encode())
  if read is None:
    with pytest.raises(ValueError, match=r"f\.jsonl:1"):
      read_features(path, kind="text")
  else:
    assert read_features(path, kind="text").ids.tolist() == [read]


@pytest.mark.parametrize("text", ["[0.0, 1, 2.0]", "[2, 1, 0]"])
def test_an_index_of_whole_floats_is_read(write, text):
  order = zeroshot.read_index(write("i.json", text.encode()), count=3)
  assert sorted(order) == [0, 1, 2]
  assert all(type(i) is int for i in order)


@pytest.mark.parametrize(
  "text",
  [
    *("[0.5, 1, 2]", "[true, false, 2]", '["0", "1", "2"]', '["0", 1, 2]', "[[0], 1, 2]"),
    *('{"0": 1}', "3", "null", "[0, 1, NaN]", "[0, 1]", "[" * 5000, "[0, 1, 9223372036854775808]"),
  ],
)
def test_an_index_of_other_things_is_refused_at_the_start(write, text):
  with pytest.raises(ValueError, match=r"i\.json"):
    zeroshot.read_index(write("i.json", text.encode()), count=3)
