"""OFA's images, from files to normalised pixels, equal to what the original's loader gives.

The images of the goldens are RGB, grey, RGBA and palette PNGs and a JPEG.
"""

import json

import numpy as np
import pytest

from ofa_jax.data import images
from ofa_jax.data.cache import ImageReader
from ofa_jax.data.tsv import Table
from tests.ofa_files import GOLDEN

FOLDER = GOLDEN / "caption"
CASES = ("train", "train_480", "train_imagenet_norm", "val", "scst")


def load(case, tmp_path):
  golden = json.loads((FOLDER / f"{case}.json").read_text())
  numbers = map(int, golden["selected_cols"].split(","))
  columns = dict(zip(("id", "image", "caption"), numbers, strict=True))
  return golden, Table([FOLDER / golden["tsv"]], columns=columns, index_dir=str(tmp_path))


@pytest.mark.parametrize("case", CASES)
def test_images(case, tmp_path):
  golden, table = load(case, tmp_path)
  how = (
    {"mean": images.IMAGENET_MEAN, "std": images.IMAGENET_STD}
    if case == "train_imagenet_norm"
    else {"mean": images.HALF_MEAN, "std": images.HALF_STD}
  )
  reader = ImageReader(table, size=golden["kwargs"]["patch_image_size"], rgb_first=True)
  with np.load(FOLDER / "images.npz") as pixels:
    for i, item in enumerate(golden["items"]):
      expected = item["patch_image"]
      image = images.normalize(reader.read(i, None), **how).transpose(2, 0, 1)
      assert list(image.shape) == expected["shape"]
      assert (image.min(), image.max()) == (expected["min"], expected["max"])
      assert image.mean(dtype=np.float64) == pytest.approx(expected["mean"], abs=1e-12)
      # The original's deviation is torch's, which divides by one less.
      assert image.std(dtype=np.float64, ddof=1) == pytest.approx(expected["std"], abs=1e-6)
      # Validation and self-critical training read the images of the training file.
      stored = pixels[expected["npz_key"].replace("val", "train").replace("scst", "train")]
      part = image[:, ::16, ::16] if expected["stored"] != "full" else image
      np.testing.assert_array_equal(part, stored)
