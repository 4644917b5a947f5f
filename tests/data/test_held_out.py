"""Pictures that are kept back: always the same, and on one side only."""

import shutil

import numpy as np
import pytest

from ofa_jax.data import held_out, splits
from ofa_jax.data.pairs import find_edges
from tests.data.samples import plain_jpeg, write_tsv


@pytest.fixture
def data(tmp_path):
  """A table of 20 pictures; two share a caption, and one caption is of all."""
  lines = ["filepath,title"]
  for i in range(20):
    (tmp_path / f"{i}.jpg").write_bytes(plain_jpeg(10 * i))
    lines += [f"{i}.jpg,第{i // 2}件商品", f"{i}.jpg,一件商品"]
  (tmp_path / "train.csv").write_text("\n".join(lines), encoding="utf-8")
  return tmp_path


def test_the_choice_depends_on_names_only():
  names = [f"/data/{i}.jpg" for i in range(100)]
  chosen = held_out.choose(names, 0.1)
  assert chosen.sum() == 10
  moved = [name.replace("/data/", "/else/where/") for name in names]
  np.testing.assert_array_equal(held_out.choose(moved, 0.1), chosen)
  np.testing.assert_array_equal(held_out.choose(names[::-1], 0.1), chosen[::-1])
  doubled = held_out.choose(names * 2, 0.1)
  np.testing.assert_array_equal(doubled, np.tile(chosen, 2))


@pytest.mark.parametrize(("number", "share", "out"), [(2, 0.01, 1), (3, 0.9, 2), (40, 0.5, 20)])
def test_both_sides_have_pictures(number, share, out):
  assert held_out.choose([str(i) for i in range(number)], share).sum() == out


def test_one_picture_cannot_be_divided():
  with pytest.raises(ValueError, match=r"at least 2 pictures.*found 1.*task\.valid"):
    held_out.choose(["a", "a"], 0.5)


def test_no_picture_is_on_both_sides(data):
  given = {"train": (str(data / "train.csv"),), "valid": ()}
  ((train, train_texts, _),) = splits.load(given, "train", hold_out=0.2)
  ((valid, valid_texts, _),) = splits.load(given, "valid", hold_out=0.2)
  assert (len(train), len(valid)) == (16, 4) and not {*train.ids} & {*valid.ids}
  assert len({*train.ids, *valid.ids}) == 20
  for images, texts in ((train, train_texts), (valid, valid_texts)):
    edges = find_edges(images, texts)  # every caption's pictures are there
    assert {*edges[:, 1].tolist()} == {*range(len(images))} and len(edges) == 2 * len(images)
    assert {*edges[:, 0].tolist()} == {*range(len(texts))}
    for i, name in enumerate(images.ids):
      assert images.name(i) == name and images.find([name, "no"]).tolist() == [i, -1]
      assert images.encoded(i) == plain_jpeg(10 * int(name.split("/")[-1][:-4]))
  assert not train_texts.notes
  assert "Held out 4 of 20 pictures" in valid_texts.notes[0]


def test_what_is_given_is_not_divided(data):
  given = {"train": (str(data / "train.csv"),), "valid": (str(data / "train.csv"),)}
  for split in given:
    assert len(splits.load(given, split, hold_out=0.2)[0][0]) == 20
  with pytest.raises(ValueError, match=r"'test' in task\.test, found none.*--config\.task\.test="):
    splits.load(given, "test", hold_out=0.2)
  with pytest.raises(ValueError, match=r"'train' in task\.train"):
    splits.load({}, "train", hold_out=0.2)
  with pytest.raises(ValueError, match=r"'valid' in task\.valid"):
    splits.load({"train": (str(data / "train.csv"),)}, "valid")


def test_a_folder_that_has_the_split_is_not_divided(data):
  given = {"train": (str(data),)}
  assert len(splits.load(given, "train", hold_out=0.2)[0][0]) == 16
  shutil.copy(data / "train.csv", data / "valid.csv")
  for split in ("train", "valid"):
    assert len(splits.load(given, split, hold_out=0.2)[0][0]) == 20


def test_only_the_first_of_several_sources_is_divided(data):
  given = {"train": (str(data / "train.csv"), str(data))}
  assert [len(s[0]) for s in splits.load(given, "train", hold_out=0.2)] == [16, 20]
  assert [len(s[0]) for s in splits.load(given, "valid", hold_out=0.2)] == [4]


def test_a_caption_of_an_unknown_picture_is_told_as_before(tmp_path):
  write_tsv(tmp_path / "train_imgs.tsv", [(str(i), plain_jpeg(i)) for i in range(4)])
  (tmp_path / "train_texts.jsonl").write_text(
    '{"text_id": 1, "text": "a", "image_ids": [1, 9]}\n', encoding="utf-8"
  )
  ((images, texts, _),) = splits.load({"train": (str(tmp_path),)}, "train", hold_out=0.5)
  with pytest.raises(ValueError, match="9 "):
    find_edges(images, texts)
