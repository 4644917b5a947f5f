"""The ImageNet recipe's augmentation: every operation as the original's libraries do it."""

import collections
import json

import numpy as np
import pytest
from PIL import Image

from ofa_jax.data import augment, augment_imagenet, images, random_augment
from tests.ofa_files import GOLDEN

FOLDER = GOLDEN / "image_classify"
STORED = json.loads((FOLDER / "augmentation.json").read_text())
PICTURES = {
  name: Image.open(FOLDER / f"{name}.png").convert("RGB") for name in ("0", "1", "2", "tall")
}


def stored(name):
  with np.load(FOLDER / f"{name}.npz") as arrays:
    return dict(arrays)


class Replay:
  """A generator that gives what the original drew, in its order, by what was asked for."""

  def __init__(self, draws):
    self.draws = [list(draw) for draw in draws]

  def _take(self, kind, *bounds):
    for place, (name, *rest) in enumerate(self.draws):
      if name == kind and np.allclose(rest[:-1], bounds):
        return self.draws.pop(place)[-1]
    raise AssertionError(f"nothing drawn for {kind} {bounds} among {self.draws}")

  def random(self):
    return self._take("random")

  def uniform(self, low, high):
    return self._take("uniform", low, high)

  def integers(self, end):
    return self._take("randint", 0, end - 1)


def test_ofas_operations_are_the_originals():
  """All fourteen, of which its list has ten, at two levels, with either sign."""
  results = stored("ofa_ops")
  for key, expected in results.items():
    name, level, draw, picture = key.split("|")
    args = random_augment.arguments(name, int(level), float(draw))
    out = random_augment.apply(name, np.asarray(PICTURES[picture]), *args)
    np.testing.assert_array_equal(out, expected, err_msg=key)
  assert {key.split("|")[0] for key in results} >= set(random_augment.NAMES)
  for case in STORED["ofa_ops"]:
    expected = [x for x in case["args"] if not isinstance(x, list)]
    args = random_augment.arguments(case["op"], case["level"], case["uniform_draw_for_sign"] or 0.9)
    np.testing.assert_allclose(args, expected, rtol=1e-12, err_msg=case["op"])


def test_auto_contrast_may_be_repaired():
  """A channel without black becomes white as in the original; repaired, it is stretched."""
  image = np.dstack([np.array([[50, 100, 150]], np.uint8)] * 3)
  assert (random_augment.auto_contrast(image) == 255).all()
  assert random_augment.auto_contrast(image, repaired=True)[0, :, 0].tolist() == [0, 127, 255]
  black = np.dstack([np.array([[0, 100, 150]], np.uint8)] * 3)
  same = [random_augment.auto_contrast(black, repaired=repaired) for repaired in (False, True)]
  np.testing.assert_array_equal(*same)


def test_timms_operations_are_the_originals():
  results, done = stored("timm_ops"), set()
  for case in STORED["timm_ops"]:
    name, magnitude, sign = case["op"], case["magnitude"], case["sign"]
    args = augment_imagenet.arguments(name, magnitude or 0, sign or 1)
    np.testing.assert_allclose(args, case["args"], rtol=1e-12, err_msg=str(case))
    sign = {1: "+", -1: "-", None: ""}[sign]
    key = f"{name}|{'' if magnitude is None else magnitude}|{sign}"
    for picture in [x for x in PICTURES if f"{key}|{x}" in results or "error" in case]:
      out = np.asarray(augment_imagenet.OPERATIONS[name](PICTURES[picture], *args))
      if "error" in case:  # Pillow refuses, older ones gave black
        assert not out.any()
      else:
        np.testing.assert_array_equal(out, results.pop(f"{key}|{picture}"), err_msg=key)
    done.add(name)
  assert not results
  assert done == set(augment_imagenet.NAMES) == set(STORED["timm_op_list"])


def test_crops_are_timms():
  results = stored("random_resized_crop")
  for case in STORED["random_resized_crop"]:
    picture = PICTURES[str(case["image"])]
    draws = case.get("draws")
    if draws is None:  # nothing that was drawn fits
      box = augment.random_box(*picture.size, Replay([("uniform", 0.08, 1.0, 1.0)] * 10
        + [("uniform", np.log(3 / 4), np.log(4 / 3), 0.0)] * 10), shares=(0.08, 1.0))  # fmt: skip
    else:
      box = augment.random_box(*picture.size, Replay(draws), shares=(0.08, 1.0))
    top, left, height, width = case["top_left_height_width"]
    assert box == (left, top, left + width, top + height)
    out = np.asarray(augment_imagenet.cropped(picture, box, size=48, mirrored=False))
    key = f"{case['image']}|{str(case['case']).split()[0]}"
    np.testing.assert_array_equal(out[::2, ::2], results[key], err_msg=key)


def test_erased_boxes_are_timms():
  for case in STORED["random_erasing"]:
    draws = [("random", 0.1), *case["draws"][1:]]  # these cases were made to erase always
    box = augment_imagenet.erased_box(48, Replay(draws))
    assert box.tolist() == [case[name] for name in ("top", "left", "height", "width")]
  assert not augment_imagenet.erased_box(48, Replay([("random", 0.26)])).any()


@pytest.mark.parametrize("number", range(len(STORED["pipeline"])))
def test_the_whole_transform_is_the_originals(number):
  """What was drawn is done again; in the erased box are only the original's own random numbers."""
  case = STORED["pipeline"][number]
  top, left, height, width = case["crop"]
  image = augment_imagenet.cropped(
    PICTURES[str(case["image"])],
    (left, top, left + width, top + height),
    size=48,
    mirrored=case["flipped"],
  )
  for name, args in case["timm"]:
    if name.startswith(("Posterize", "Solarize")):  # whole numbers
      args = [round(x) for x in args]
    image = augment_imagenet.OPERATIONS[name](image, *args)
  image = np.asarray(image)
  for name, args in case["ofa"]:
    image = random_augment.apply(name, image, *args)
  pixels = images.normalize(image, mean=images.IMAGENET_MEAN, std=images.IMAGENET_STD)
  expected = stored("pipeline")[f"{case['image']}|{case['case']}"].transpose(1, 2, 0)
  same = np.ones((48, 48), bool)
  if "erase_size" in case:
    (_, height, width), (top, left) = case["erase_size"], case["erase_top_left"]
    same[top : top + height, left : left + width] = False
  same = same[::2, ::2]  # every second pixel is stored
  np.testing.assert_allclose(pixels[::2, ::2][same], expected[same], atol=1e-6)


def test_what_is_drawn_is_drawn_as_often_as_it_should(monkeypatch):
  counts = collections.Counter()

  def counted(module, names):
    for name in names:
      monkeypatch.setitem(
        module.OPERATIONS, name, lambda image, *a, key=(module, name): counts.update([key]) or image
      )

  counted(augment_imagenet, augment_imagenet.NAMES)
  counted(random_augment, random_augment.NAMES)
  monkeypatch.setattr(
    random_augment,
    "auto_contrast",
    lambda image, repaired: counts.update([(random_augment, "AutoContrast")]) or image,
  )
  rng, picture = np.random.default_rng(0), PICTURES["0"]
  boxes = []
  for _ in range(3000):
    out = augment_imagenet.augment(picture, rng, size=8)
    assert out.shape == (8, 8, 3) and out.dtype == np.uint8
    boxes.append(augment_imagenet.erased_box(48, rng))
  for module in (augment_imagenet, random_augment):
    each = [counts[module, name] / 3000 for name in module.NAMES]
    np.testing.assert_allclose(each, 1 / len(module.NAMES), rtol=0.3)  # two draws, half of them
  erased = np.array([box for box in boxes if box[2]])
  assert abs(len(erased) / 3000 - 0.25) < 0.03
  shares = erased[:, 2] * erased[:, 3] / 48**2
  assert shares.min() < 0.03 and 0.25 < shares.max() < 0.36
  assert (erased[:, :2] + erased[:, 2:] <= 48).all()
