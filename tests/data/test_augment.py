"""AutoAugment: every operation is Pillow's own call, and the crop is of the stated size."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from ofa_jax.data import augment
from ofa_jax.data.cache import ImageReader
from ofa_jax.data.tsv import ImageTable
from tests.data.samples import encode, photograph, write_tsv

FILL = (123, 117, 104)


@pytest.fixture
def picture():
  y, x = np.mgrid[:40, :48]
  pixels = np.stack([4 * x + y, 5 * y, 255 - 3 * x], axis=-1)
  pixels += np.random.default_rng(0).integers(0, 20, pixels.shape)
  return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


DIRECT = {
  ("posterize", 8, 1): lambda i: ImageOps.posterize(i, 7),
  ("posterize", 5, 1): lambda i: ImageOps.posterize(i, 6),
  ("rotate", 9, 1): lambda i: i.rotate(27.0, Image.Resampling.BICUBIC, fillcolor=FILL),
  ("rotate", 3, -1): lambda i: i.rotate(-9.0, Image.Resampling.BICUBIC, fillcolor=FILL),
  ("shear_x", 5, -1): lambda i: i.transform(
    (48, 40), Image.Transform.AFFINE, (1, -0.15, 0, 0, 1, 0), Image.Resampling.BICUBIC,
    fillcolor=FILL,
  ),
  ("solarize", 5, 1): lambda i: ImageOps.solarize(i, 128),
  ("solarize", 8, 1): lambda i: ImageOps.solarize(i, 204),
  ("autocontrast", 5, 1): ImageOps.autocontrast,
  ("equalize", 0, 1): ImageOps.equalize,
  ("invert", 0, 1): ImageOps.invert,
  ("color", 4, 1): lambda i: ImageEnhance.Color(i).enhance(0.82),
  ("color", 0, 1): lambda i: ImageEnhance.Color(i).enhance(0.1),
  ("contrast", 8, 1): lambda i: ImageEnhance.Contrast(i).enhance(1.54),
  ("sharpness", 7, 1): lambda i: ImageEnhance.Sharpness(i).enhance(1.36),
}  # fmt: skip


@pytest.mark.parametrize(("name", "magnitude", "sign"), DIRECT, ids=str)
def test_operations_are_pillows(picture, name, magnitude, sign):
  expected = DIRECT[name, magnitude, sign](picture)
  found = augment.OPERATIONS[name](picture, magnitude, sign)
  np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
  assert np.any(np.asarray(found) != np.asarray(picture))


def test_all_operations_are_tested():
  used = {name for policy in augment.POLICIES for name, _, _ in policy}
  assert used == set(augment.OPERATIONS) == {name for name, _, _ in DIRECT}
  assert len(augment.POLICIES) == 25 and all(len(p) == 2 for p in augment.POLICIES)


def test_operations_have_their_probability(picture):
  policy = (("invert", 0.25, 0), ("posterize", 0.0, 8))
  rng = np.random.default_rng(0)
  results = [np.asarray(augment.apply_policy(picture, policy, rng)) for _ in range(400)]
  inverted = np.asarray(ImageOps.invert(picture))
  assert all(np.array_equal(r, picture) or np.array_equal(r, inverted) for r in results)
  assert 70 < sum(np.array_equal(r, inverted) for r in results) < 130


def test_crops_have_the_stated_area_and_aspect():
  rng = np.random.default_rng(0)
  boxes = np.array([augment.random_box(258, 258, rng) for _ in range(300)])
  left, upper, right, lower = boxes.T
  assert left.min() == 0 and upper.min() == 0 and right.max() == 258 and lower.max() == 258
  area = (right - left) * (lower - upper) / 258**2
  assert area.min() > 0.89 and area.max() <= 1.0 and area.std() > 0.01
  aspect = (right - left) / (lower - upper)
  assert aspect.min() < 0.95 and aspect.max() > 1.05


def test_a_crop_that_never_fits_is_central():
  assert augment.random_box(1000, 10, np.random.default_rng(0)) == (493, 0, 506, 10)


def test_the_cache_changes_no_augmented_image(tmp_path):
  photo = encode(photograph(), format="JPEG")
  table = ImageTable([str(write_tsv(tmp_path / "a.tsv", [("1", photo)]))])
  plain = ImageReader(table, size=24, augment="auto")
  cached = ImageReader(table, size=24, augment="auto", cache_dir=tmp_path / "cache")
  for _ in range(2):  # the second time from the cache
    for seed in range(3):
      first = plain.read(0, np.random.default_rng(seed))
      again = cached.read(0, np.random.default_rng(seed))
      assert first.shape == (24, 24, 3) and first.dtype == np.uint8
      np.testing.assert_array_equal(again, first)
  evaluated = [reader.read(0, None) for reader in (plain, ImageReader(table, size=24))]
  np.testing.assert_array_equal(*evaluated)
