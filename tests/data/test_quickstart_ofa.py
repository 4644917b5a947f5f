import collections
import hashlib
import io
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from ofa_jax.data import prompts, quickstart_ofa
from ofa_jax.data.quickstart_ofa import COLOURS, SHAPES, Scene, draw, scenes
from ofa_jax.data.text import reference_captions, target_caption
from ofa_jax.data.tsv import Table
from ofa_jax.tokenizers.ofa import OFATokenizer

COLUMNS = {"id": 0, "image_id": 1, "caption": 2, "objects": 3, "image": 4}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return quickstart_ofa.shapes(tmp_path_factory.mktemp("data") / "new")


def open_split(path, split):
  table = Table([path / f"{split}.tsv"], columns=COLUMNS)
  return table, [reference_captions(table.text(i, "caption")) for i in range(len(table))]


@pytest.mark.parametrize(
  ("scene", "captions"),
  [
    (Scene((("red", "cross"),)), ("a red cross", "there is a red cross")),
    (Scene((("red", "cross"),), 3), ("three red crosses", "there are three red crosses")),
    (
      Scene((("red", "cross"), ("blue", "circle")), beside=True),
      ("a red cross left of a blue circle", "a blue circle right of a red cross"),
    ),
    (
      Scene((("red", "cross"), ("blue", "circle"))),
      ("a red cross above a blue circle", "a blue circle below a red cross"),
    ),
  ],
)
def test_captions(scene, captions):
  assert scene.captions == captions


def test_a_caption_names_one_scene_only():
  single, double = scenes()
  said = collections.Counter(c for scene in single + double for c in scene.captions)
  assert len(single) == 6 * 4 * 4
  assert len(double) == 24 * 23 * 2
  assert set(said.values()) == {1}


def blobs(image, colour):
  """Centres (x, y) of the connected areas of about one colour."""
  near = np.abs(np.asarray(image).astype(int) - COLOURS[colour]).max(-1) < 40
  centres = []
  while near.any():
    area, edge = np.zeros_like(near), [tuple(np.argwhere(near)[0])]
    while edge:
      y, x = edge.pop()
      if 0 <= y < near.shape[0] and 0 <= x < near.shape[1] and near[y, x]:
        near[y, x], area[y, x] = False, True
        edge += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    if area.sum() > 20:  # not the blend at an edge
      y, x = np.argwhere(area).mean(0)
      centres.append((x, y))
  return centres


def test_pictures_show_what_the_captions_say():
  rng = np.random.default_rng(1)
  single, double = scenes()
  for i in rng.choice(len(single), 40):
    image = draw(single[i], rng)
    assert (image.size, image.mode) == ((48, 48), "RGB")
    assert len(blobs(image, single[i].things[0][0])) == single[i].count
  for i in rng.choice(len(double), 40):
    (first, _), (second, _) = double[i].things
    if first != second:
      image = draw(double[i], rng)
      ((x1, y1),), ((x2, y2),) = blobs(image, first), blobs(image, second)
      across, down = x2 - x1, y2 - y1
      assert (across if double[i].beside else down) > 12
      assert abs(down if double[i].beside else across) < 12


def test_shapes_look_different():
  pixels = [np.asarray(draw(Scene((("black", s),)), np.random.default_rng(0))) for s in SHAPES]
  for i, one in enumerate(pixels):
    assert all((one != other).any(-1).sum() > 30 for other in pixels[:i])


def test_files_are_in_the_originals_format(path):
  for split, count, captions in (("train", 6000, 1), ("valid", 400, 2)):
    table, said = open_split(path, split)
    assert len(table) == count
    assert {len(group) for group in said} == {captions}
    assert table.text(7, "id") == f"{split}7"
    assert table.text(7, "image_id") == f"{split}7.png"
    assert all(thing in table.text(1, "objects") for thing in ("&&", " "))
    image = Image.open(io.BytesIO(table.encoded(3)))
    assert (image.size, image.format) == ((48, 48), "PNG")
    # Nothing is lost by the clean-up before training.
    assert all(target_caption(c, max_words=20) == c for group in said for c in group)


def test_held_out_scenes_are_not_trained_on(path):
  scene_of = {c: s for kind in scenes() for s in kind for c in s.captions}
  trained = {scene_of[c] for group in open_split(path, "train")[1] for c in group}
  held_out = {scene_of[c] for group in open_split(path, "valid")[1] for c in group}
  assert not trained & held_out
  assert len(trained) == 80 + 920
  assert len(held_out) == 16 + 184
  # But every colour, shape and number of them is.
  parts = [{(t, None) for s in group for t in s.things} for group in (held_out, trained)]
  assert parts[0] <= parts[1]
  assert {s.count for s in held_out} == {s.count for s in trained} == {1, 2, 3, 4}


def test_the_tokenizer_knows_the_words(path):
  tokenizer = OFATokenizer.from_directory(path / "tokenizer")
  assert tokenizer.vocab_size < 400
  assert len(tokenizer.encode(prompts.caption())) == 6
  for split in ("train", "valid"):
    for group in open_split(path, split)[1]:
      for caption in group:
        ids = tokenizer.encode(" " + caption)
        assert len(ids) == len(caption.split())
        assert tokenizer.decode(ids) == " " + caption


def test_a_change_of_the_recipe_needs_a_new_version(path):
  digest = hashlib.sha256((path / "tokenizer/dict.txt").read_bytes())
  for split in ("train", "valid"):
    table, said = open_split(path, split)
    for i, group in enumerate(said):
      digest.update("&&".join(group).encode())
      digest.update(Image.open(io.BytesIO(table.encoded(i))).tobytes())
  assert (quickstart_ofa.VERSION, digest.hexdigest()[:16]) == (2, "68385cf026f59a98")


def test_two_processes_at_once(tmp_path):
  with multiprocessing.get_context("spawn").Pool(2) as pool:
    paths = pool.map(quickstart_ofa.shapes, [tmp_path] * 2, chunksize=1)
  assert paths[0] == paths[1]
  assert [p.name for p in tmp_path.iterdir()] == [paths[0].name]  # and no scratch folder
  assert len(Table([paths[0] / "valid.tsv"], columns=COLUMNS)) == 400
