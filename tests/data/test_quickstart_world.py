"""The small world: drawn the same everywhere, told truly, its unseen combinations unseen."""

import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from ofa_jax.data import prompts, quickstart_world
from ofa_jax.data.boxes import read
from ofa_jax.data.quickstart_ofa import COLOURS, CORNERS, SHAPES
from ofa_jax.data.quickstart_world import (
  ROWS,
  TASKS,
  Thing,
  answers,
  caption,
  draw,
  hypothesis,
  is_novel,
  question,
  region,
  scene,
  sentence,
  things,
)
from ofa_jax.data.text import target_caption
from ofa_jax.data.tsv import Table
from ofa_jax.tokenizers.ofa import OFATokenizer

SCENE = (Thing("red", "dot", 0), Thing("blue", "bar", 3))
FEW = {"train": 60, "valid": 12, "novel": 12}
FIELDS = {
  "caption": {"id": 0, "image_id": 1, "said": 2, "objects": 3, "image": 4},
  "vqa": {"id": 0, "image_id": 1, "said": 2, "answer": 3, "objects": 4, "image": 5},
  "refcoco": {"id": 0, "image_id": 1, "said": 2, "box": 3, "image": 4},
  "snli_ve": {"id": 0, "image_id": 1, "image": 2, "said": 3, "premise": 4, "label": 5},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """The data set with few pictures."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(quickstart_world, "PICTURES", FEW)
    patch.setattr(quickstart_world, "SENTENCES", {"train": 40, "valid": 10})
    return quickstart_world.world(tmp_path_factory.mktemp("world"))


def rows(path, task, split):
  table = Table([path / f"{task}_{split}.tsv"], columns=FIELDS[task])
  texts = [name for name in FIELDS[task] if name != "image"]
  return table, [{x: table.text(i, x) for x in texts} for i in range(len(table))]


def test_one_in_six_combinations_is_unseen_and_every_pair_is_seen():
  known, novel = ([t for t in things() if is_novel(t) == kind] for kind in (False, True))
  assert (len(known), len(novel)) == (60, 12)
  for kind in ("colour", "shape", "place"):
    counts = np.unique([str(getattr(t, kind)) for t in novel], return_counts=True)[1]
    assert len(counts) == len({"colour": COLOURS, "shape": SHAPES, "place": CORNERS}[kind])
    assert set(counts) in ({2}, {4}, {3})
  for pair in (("colour", "shape"), ("colour", "place"), ("shape", "place")):
    of = [{tuple(getattr(t, name) for name in pair) for t in part} for part in (known, novel)]
    assert of[1] < of[0]


def told(scene, about, kind):
  """All that may be said of a scene, by many draws."""
  return {kind(scene, about, np.random.default_rng(i)) for i in range(1000)}


def test_captions_questions_and_regions_of_a_scene():
  assert caption(SCENE) == "a red dot top left and a blue bar bottom right"
  expected = {
    ("what colour is the dot?", "red"),
    ("what shape is the red thing?", "dot"),
    ("what is top left?", "red dot"),
    ("what is top right?", "nothing"),
    ("where is the red dot?", "top left"),
    ("is there a red dot?", "yes"),
    ("is there a square?", "no"),
    ("how many things are there?", "two"),
    ("how many red things are there?", "one"),
    ("how many dots are there?", "one"),
  }
  asked = told(SCENE, SCENE[0], question)
  assert expected < asked and {answer for _, answer in asked} <= set(answers())
  assert ("is there a blue bar?", "no") not in asked
  assert told(SCENE, SCENE[0], region) == {
    "the red dot",
    "the thing top left",
    "the red dot top left",
    "the dot",
    "the red thing",
  }
  same = (Thing("red", "dot", 0), Thing("red", "bar", 3))
  assert "the red thing" not in told(same, same[0], region)
  assert not any("what shape" in text for text, _ in told(same, same[0], question))


def test_texts_about_a_scene_are_implied_contradicted_or_neither():
  of = {}
  for text, label in told(SCENE, SCENE[0], hypothesis):
    of.setdefault(label, set()).add(text)
  assert of["entailment"] == {
    f"there is a {told}"
    for told in (
      *("red thing", "dot", "red dot"),
      *("red thing top left", "dot top left", "red dot top left"),
    )
  }
  assert "the red dot is heavy" in of["neutral"]
  assert {"there is a square", "there is a bar top left"} < of["contradiction"]
  true = {f"there is {text}" for thing in SCENE for text in claims(thing)}
  unseen = {f"there is {claims(thing)[-1]}" for thing in things() if is_novel(thing)}
  assert not of["contradiction"] & (true | unseen)


def claims(thing):
  """All ways to tell of it, the whole one last."""
  kinds = (f"{thing.colour} thing", thing.shape, thing.name)
  return [f"a {kind}{where}" for where in ("", f" {thing.where}") for kind in kinds]


def test_a_sentence_says_a_thing_twice():
  rng, opposite = np.random.default_rng(0), {"left of": "right of", "above": "below"}
  opposite |= {b: a for a, b in opposite.items()}
  for _ in range(50):
    name = r"\w+ \w+"
    one, side, two, three, back, four = re.fullmatch(
      rf"({name}) (.+) ({name}) and ({name}) (.+) ({name})", sentence(rng)
    ).groups()
    assert (one, two) == (four, three) and opposite[side] == back


def test_boxes_are_where_the_things_are():
  for i in range(40):
    shown = scene(np.random.default_rng(i), novel=bool(i % 2))
    assert any(map(is_novel, shown)) == bool(i % 2)
    image, boxes = draw(shown, np.random.default_rng(i))
    pixels = np.asarray(image).astype(int)
    for thing, (x0, y0, x1, y1) in zip(shown, boxes, strict=True):
      near = np.abs(pixels - COLOURS[thing.colour]).max(-1) < 60
      row, column = divmod(thing.place, 2)
      ys, xs = np.nonzero(near[32 * row : 32 * row + 32, 32 * column : 32 * column + 32])
      edges = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
      expected = np.array([x0, y0, x1, y1]) - 32 * np.array([column, row] * 2)
      np.testing.assert_allclose(edges, expected, atol=1.1)


def test_files_are_in_the_originals_formats(path):
  for split, count in FEW.items():
    shown = {task: rows(path, task, split) for task in TASKS}
    for task in TASKS:
      table, texts = shown[task]
      of = ROWS.get(task, 1) if split == "train" else 1
      assert len(table) == len({row["id"] for row in texts}) == count * of
      assert [row["id"] for row in texts[::of]] == [f"{split}{i}" for i in range(count)]
      for k in range(of):  # drawn once for all of them
        assert table.encoded(3 * of + k) == shown["caption"][0].encoded(3)
    assert Image.open(io.BytesIO(shown["vqa"][0].encoded(0))).size == (64, 64)
    for row in shown["caption"][1]:
      assert target_caption(row["said"], max_words=20) == row["said"]
    for row in shown["refcoco"][1]:
      read(row["box"], size=(64, 64))
    assert {row["label"] for row in shown["snli_ve"][1]} <= {
      "entailment",
      "neutral",
      "contradiction",
    }
  for split, count in (("train", 1437), ("valid", 360)):
    lines = (path / f"digits_{split}.tsv").read_text().splitlines()
    assert len(lines) == count and len({line.split("\t")[2] for line in lines}) == 10
  assert len((path / "infilling_valid.tsv").read_text().splitlines()) == 10


def test_no_picture_and_no_unseen_thing_is_in_two_splits(path):
  pictures = [
    {rows(path, "caption", split)[0].encoded(i) for i in range(count)}
    for split, count in FEW.items()
  ]
  assert sum(map(len, pictures)) == len(set.union(*pictures)) == sum(FEW.values())
  unseen = [f"{t.name} {t.where}" for t in things() if is_novel(t)]
  for split in FEW:
    said = "\n".join(row["said"] for task in TASKS for row in rows(path, task, split)[1])
    said = said.replace(" is ", " ")
    assert any(text in said for text in unseen) == (split == "novel")


def test_the_tokenizer_knows_words_and_coordinates(path):
  tokenizer = OFATokenizer.from_directory(path / "tokenizer")
  assert tokenizer.num_bins == quickstart_world.NUM_BINS and tokenizer.vocab_size < 1024
  said = caption(SCENE)
  assert len(tokenizer.encode(f" {said}")) == len(said.split())
  assert len(tokenizer.encode(prompts.caption())) == 6


def test_a_change_of_the_recipe_needs_a_new_version(path):
  digest = hashlib.sha256((path / "tokenizer/dict.txt").read_bytes())
  for task in TASKS:
    for split, count in FEW.items():
      table, texts = rows(path, task, split)
      for i in range(0, count, 4):
        digest.update(repr(sorted(texts[i].items())).encode())
        digest.update(Image.open(io.BytesIO(table.encoded(i))).tobytes())
  for name in ("answers.txt", "digits.txt", "infilling_train.tsv"):
    digest.update((path / name).read_bytes())
  assert (quickstart_world.VERSION, digest.hexdigest()[:16]) == (3, "574aa1e0f0ae59eb")


def test_the_digits_are_those_of_the_other_quickstart(path, digits):
  theirs = (digits / "valid_imgs.tsv").read_text().splitlines()
  lines = (path / "digits_valid.tsv").read_text().splitlines()
  assert [line.split("\t")[1] for line in lines] == [line.split("\t")[0] for line in theirs]
