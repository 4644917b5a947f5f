"""A small data set of TensorFlow Datasets, shaped as imagenet2012: pictures with a label each."""

import io
import pathlib

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n01484850", "n02099601")


def build(folder: pathlib.Path, *, rows: int = 6):
  """The builder of a prepared data set with two splits, train and validation."""
  import tensorflow_datasets as tfds

  class Pictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    __module__ = "pictures"  # else tfds looks for its metadata in the package `tests`

    def _info(self):
      label = tfds.features.ClassLabel(names=CLASSES)
      features = {"image": tfds.features.Image(encoding_format="jpeg"), "label": label}
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict({**features, "file_name": tfds.features.Text()}),
        supervised_keys=("image", "label"),
      )

    def _split_generators(self, download):
      return {"train": self._generate_examples(rows), "validation": self._generate_examples(3)}

    def _generate_examples(self, count):
      for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        file.seek(0)
        yield i, {"image": file, "label": i % len(CLASSES), "file_name": f"{i}.JPEG"}

  builder = Pictures(data_dir=folder, file_format="array_record")
  builder.download_and_prepare()
  return builder
