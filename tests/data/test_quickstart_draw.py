"""The world's pictures as codes, and what is read off pictures."""

import pathlib
import runpy

import numpy as np
import pytest

from ofa_jax import hub
from ofa_jax.data import codes, quickstart_draw, quickstart_world
from ofa_jax.data.quickstart_draw import Truth
from ofa_jax.data.quickstart_world import Thing, caption, draw, scene

RECIPE = pathlib.Path(__file__).parent.parent.parent / "configs" / "quickstart.py"


@pytest.fixture(scope="module")
def world():
  """(scene, picture uint8[64, 64, 3]) of 160 scenes."""
  made = []
  for i in range(160):
    rng = np.random.default_rng((5, i))
    shown = scene(rng, novel=i % 2 == 1)
    made.append((shown, np.asarray(draw(shown, rng)[0])))
  return made


def test_true_pictures_are_all_right(world):
  captions, images = [caption(shown) for shown, _ in world], [image for _, image in world]
  assert [tuple(quickstart_draw.told(text)) for text in captions] == [shown for shown, _ in world]
  told = Truth()(captions, images)
  assert told.keys() == set(Truth.metrics)
  assert min(told.values()) > 0.97, told


def test_wrong_pictures_are_told(world):
  _, images = zip(*world, strict=True)
  one = next(image for shown, image in world if shown == (shown[0],) and shown[0].place == 0)
  thing = quickstart_draw.seen(one)[0]
  other = next(c for c in ("red", "blue") if c != thing.colour)
  shape = next(s for s in ("bar", "dot") if s != thing.shape)
  expected = {
    f"a {other} {thing.shape} top left": (1, 0, 1, 0, 0),
    f"a {thing.colour} {shape} top left": (1, 1, 0, 0, 0),
    f"a {thing.name} bottom left": (0, 0, 0, 0, 0),
    f"a {thing.name} top left and a red dot top right": (0.5, 0.5, 0.5, 0.5, 0),
    f"a {thing.name} top left": (1, 1, 1, 1, 1),
  }
  for text, shares in expected.items():
    assert tuple(Truth()([text], [one]).values()) == shares, text
  blank = np.full_like(images[0], 240)
  assert quickstart_draw.seen(blank) == []
  assert quickstart_draw.told("nothing") == []
  assert Thing("red", "dot", 1) in quickstart_draw.told("a red dot top right")


def test_a_mosaic_of_patches_shows_what_its_picture_does(world):
  """Of pictures that made no patch; with as few as a test learns from most things stay right."""
  images = np.stack([image for _, image in world])
  patches = quickstart_draw.learn(
    np.stack([quickstart_draw.cut(image) for image in images[:120]]), number=256
  )
  assert patches.shape == (256, 8, 8, 3) and np.isfinite(patches).all()
  numbers = [quickstart_draw.encode(image, patches) for image in images]
  assert all(x.shape == (8, 8) and 0 <= x.min() <= x.max() < 256 for x in numbers)
  mosaics = [quickstart_draw.decode(x, patches) for x in numbers]
  assert np.abs(np.stack(mosaics).astype(float) - images).mean() < 8
  captions = [caption(shown) for shown, _ in world]
  told = Truth()(captions[120:], mosaics[120:])
  assert told["place"] > 0.97 and told["colour"] > 0.9 and told["right"] > 0.7, told


def test_few_patches_make_a_table_all_the_same():
  plain = np.zeros((3, 8, 8, 8, 8, 3), np.float32)
  assert quickstart_draw.learn(plain, number=16).shape == (16, 8, 8, 3)


def test_both_recipes_read_what_is_written(tmp_path, monkeypatch):
  monkeypatch.setattr(quickstart_world, "PICTURES", dict.fromkeys(quickstart_world.PICTURES, 12))
  recipe = runpy.run_path(str(RECIPE))
  task = recipe["draw"](tmp_path).task
  first = task.examples("train").example(0, np.random.default_rng(0))
  (folder,) = tmp_path.glob("draw-*")
  patches = np.load(folder / "patches.npy")
  assert hub.config_of(task.codec).num_codes == len(patches) == quickstart_draw.NUM_CODES
  own = first["target"][:-1] - task.words.code_id(0)
  assert quickstart_draw.decode(own.reshape(8, 8), patches).shape == (64, 64, 3)
  for evaluation in recipe["draw"](tmp_path).evals:
    (rows,) = evaluation.task.streams(evaluation.split).values()
    assert len(rows) == 12
    row = rows.row(3)
    expected = quickstart_draw.encode(np.asarray(row.image()), patches).ravel()
    found = codes.parse(row["codes"], count=64, num_codes=len(patches))
    assert found.tolist() == expected.tolist()
  judge = recipe["judge"](tmp_path).task
  streams = judge.streams("valid")
  assert len(streams["image"]) == 12 == sum(map(len, streams["text"].images_of))
