"""Labelled images of TensorFlow Datasets by name, read without TensorFlow.

Random access needs the `array_record` files that `prepare` asks for; they go to `TFDS_DATA_DIR`
(default `~/tensorflow_datasets`).
"""

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ofa_jax.data.images import BadImage, decode
from ofa_jax.data.tsv import BadRow

PREFIX = "tfds:"  # of a name that stands in place of a file's


class TfdsRows:
  """The images of one split with their labels, in the data set's order.

  Args:
    name: such as "cifar100"; downloaded and prepared once.
    split: such as "test".
    size: side of the images in pixels.

  Attributes:
    classes: the data set's own class names.

  Raises:
    ValueError: no such data set or split, no image with a label in it, or only files without random
      access.
  """

  def __init__(self, name: str, *, split: str, size: int):
    builder = prepared(name)
    if builder.info.supervised_keys is None:
      raise ValueError(
        f"Expected a data set of images with one label each, found {name} with "
        f"{', '.join(builder.info.features)}"
      )
    self._image, self._label = builder.info.supervised_keys
    self.classes = builder.info.features[self._label].names
    self._source = source(builder, split, undecoded=(self._image,))
    self._name, self._size = f"{PREFIX}{name}/{split}", size
    self.notes = ()

  def __len__(self) -> int:
    return len(self._source)

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """`image: uint8[S, S, 3]`, `label: int32`. Raises BadRow when the image cannot be read."""
    record = self._source[i]
    try:
      image = decode(record[self._image], size=self._size)
    except BadImage as error:
      raise BadRow(f"{self._name}[{i}]", str(error)) from error
    return {"image": image, "label": np.int32(record[self._label])}

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch as padding."""
    return {"image": np.zeros((self._size, self._size, 3), np.uint8), "label": np.int32(-1)}

  def close(self) -> None:
    """Nothing is cached, and the files close with the last reference to their reader."""


def named(paths: Sequence[str], *, usual: str) -> tuple[str, str]:
  """The data set and the split of "tfds:NAME" or "tfds:NAME:SPLIT"; else the `usual` split.

  Raises:
    ValueError: there are several paths.
  """
  if len(paths) != 1:
    raise ValueError(
      f"Expected one data set of TensorFlow Datasets and no file beside it, found "
      f"{', '.join(paths)}; several splits are tfds:NAME:train+validation"
    )
  name, _, split = paths[0].removeprefix(PREFIX).partition(":")
  return name, split or usual


def prepared(name: str) -> Any:
  """The builder of a data set, such as "cifar100" or "glue/cola", downloaded and prepared once.

  Raises:
    ValueError: there is none of this name.
  """
  import tensorflow_datasets as tfds  # slow to import, and rarely needed

  # Sets that are described in modules of an older form, GLUE's too, are known once these are read.
  with contextlib.suppress(ModuleNotFoundError):
    importlib.import_module(f"tensorflow_datasets.text.{name.partition('/')[0]}")
  try:
    builder = tfds.builder(name, file_format="array_record")
    builder.download_and_prepare()
  except tfds.core.DatasetNotFoundError as error:
    reason = str(error).split("\n")[0]
    raise ValueError(
      f"Expected the name of a TensorFlow data set, found {name!r}: {reason}"
    ) from error
  return builder


def source(builder: Any, split: str, *, undecoded: Sequence[str] = ()) -> Sequence[Any]:
  """The records of a split by number; features `undecoded` are bytes as they are stored.

  Raises:
    ValueError: no such split, or only files without random access.
  """
  import tensorflow_datasets as tfds

  decoders = {feature: tfds.decode.SkipDecoding() for feature in undecoded}
  try:
    return builder.as_data_source(split, decoders=decoders or None)
  except NotImplementedError as error:
    raise ValueError(f"{builder.info.full_name}: {error}") from error
