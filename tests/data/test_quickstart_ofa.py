import collections
import hashlib
import io
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from ofa_jax.data import prompts, quickstart_ofa
from ofa_jax.data.quickstart_ofa import COLOURS, CORNERS, SHAPES, Scene, draw, scenes
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
    (Scene((("red", "bar"),), 3), ("three red bars", "there are three red bars")),
    (
      Scene((("red", "dot"),), corner=1),
      ("a red dot at the top right", "there is a red dot at the top right"),
    ),
    (
      Scene((("red", "dot"), ("blue", "bar"))),
      ("a red dot and a blue bar", "a blue bar and a red dot"),
    ),
  ],
)
def test_captions(scene, captions):
  assert scene.captions == captions


def test_a_caption_names_one_scene_only():
  kinds = scenes()
  said = collections.Counter(c for kind in kinds for scene in kind for c in scene.captions)
  assert [len(kind) for kind in kinds] == [18 * 3, 18 * 4, 18 * 17 // 2]
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
  several, alone, pairs = scenes()
  for i in rng.choice(len(several), 40):
    image = draw(several[i], rng)
    assert (image.size, image.mode) == ((64, 64), "RGB")
    assert len(blobs(image, several[i].things[0][0])) == several[i].count
  for i in rng.choice(len(alone), 40):
    ((x, y),) = blobs(draw(alone[i], rng), alone[i].things[0][0])
    assert (
      CORNERS[alone[i].corner] == f"{'bottom' if y > 32 else 'top'} {'right' if x > 32 else 'left'}"
    )
  for i in rng.choice(len(pairs), 40):
    (first, _), (second, _) = pairs[i].things
    if first != second:
      image = draw(pairs[i], rng)
      assert len(blobs(image, first)) == len(blobs(image, second)) == 1


def test_shapes_look_different():
  pixels = [
    np.asarray(draw(Scene((("black", s),), corner=0), np.random.default_rng(0))) for s in SHAPES
  ]
  for i, one in enumerate(pixels):
    assert all((one != other).any(-1).sum() > 30 for other in pixels[:i])


def test_files_are_in_the_originals_format(path):
  for split, count, captions in (("train", 6000, 1), ("valid", 400, 2)):
    table, said = open_split(path, split)
    assert len(table) == count
    assert {len(group) for group in said} == {captions}
    assert table.text(7, "id") == f"{split}7"
    assert table.text(7, "image_id") == f"{split}7.png"
    assert all(thing in table.text(2, "objects") for thing in ("&&", " "))
    image = Image.open(io.BytesIO(table.encoded(3)))
    assert (image.size, image.format) == ((64, 64), "PNG")
    # Nothing is lost by the clean-up before training.
    assert all(target_caption(c, max_words=20) == c for group in said for c in group)


def test_held_out_pictures_are_new_ones_of_the_same_scenes(path):
  scene_of = {c: s for kind in scenes() for s in kind for c in s.captions}
  shown, pictures = {}, {}
  for split in ("train", "valid"):
    table, said = open_split(path, split)
    shown[split] = [scene_of[group[0]] for group in said]
    pictures[split] = {table.encoded(i) for i in range(len(table))}
  assert set(shown["train"]) == {scene for kind in scenes() for scene in kind}
  assert len(set(shown["valid"])) == 54 + 72 + 133  # all of the first two kinds
  assert len(pictures["train"]) > 5990 and not pictures["train"] & pictures["valid"]


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
  assert (quickstart_ofa.VERSION, digest.hexdigest()[:16]) == (4, "f698f709f3da5ba9")


def test_to_learn_from_rewards_there_are_all_captions(path):
  lines = [(path / f"{name}.tsv").read_text().splitlines() for name in ("train", "train_all")]
  for one, both in zip(*lines, strict=True):
    one, both = one.split("\t"), both.split("\t")
    assert one[2] in both[2].split("&&") and len(both[2].split("&&")) == 2
    assert one[:2] + one[3:] == both[:2] + both[3:]


def test_two_processes_at_once(tmp_path):
  with multiprocessing.get_context("spawn").Pool(2) as pool:
    paths = pool.map(quickstart_ofa.shapes, [tmp_path] * 2, chunksize=1)
  assert paths[0] == paths[1]
  assert [p.name for p in tmp_path.iterdir()] == [paths[0].name]  # and no scratch folder
  assert len(Table([paths[0] / "valid.tsv"], columns=COLUMNS)) == 400
