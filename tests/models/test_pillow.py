"""Resizing on a device against Pillow, to the byte."""

import jax
import numpy as np
import pytest
from PIL import Image

from ofa_jax.data import images
from ofa_jax.models import pillow


@pytest.mark.parametrize(
  ("kind", "size"),
  [
    ("bicubic", (7, 9)),
    ("bicubic", (40, 33)),
    ("bilinear", (29, 31)),
    ("bilinear", (5, 23)),
    ("lanczos", (8, 23)),
  ],
)
def test_every_byte_is_pillows(kind, size):
  rng = np.random.default_rng(0)
  pictures = rng.integers(0, 256, (3, 17, 23, 3), np.uint8)
  pictures[0] = np.where(pictures[0] > 127, 255, 0)  # where a cubic overshoots
  found = jax.jit(lambda x: pillow.resize(x, size, kind=kind))(pictures)
  resample = Image.Resampling[kind.upper()]
  for picture, x in zip(pictures, found, strict=True):
    expected = np.asarray(Image.fromarray(picture).resize(size[::-1], resample))
    np.testing.assert_array_equal(x, expected, strict=True)


@pytest.mark.parametrize("shape", [(24, 24), (17, 23), (31, 20)])
def test_clips_input_is_that_of_its_files(shape):
  picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
  found = pillow.clip_input(picture[None], size=16)[0]
  expected = images.normalize(images.cropped(Image.fromarray(picture), size=16))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
