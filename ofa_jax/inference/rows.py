"""The rows of a file that a model is asked about: their pictures and their texts."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from ofa_jax.data.cache import ImageReader
from ofa_jax.data.protocols import TextImages
from ofa_jax.data.rows import Row
from ofa_jax.data.tsv import IMAGE, BadRow

TEXTS = ("id", "text", "text2", "premise", "objects")
MAY_BE_EMPTY = ("id", "objects")


class TaskRows:
  """The rows of a table: "image" as pixels, its "size" (w, h) before, and `TEXTS` as strings.

  Args:
    table: with the columns of a task.
    size: side of the images given, in pixels.
    begin: rows that are left out at the beginning.
    end: the first row that is left out at the end; None: none is.
    square: makes an image out of a picture, see `Answering.square`.
  """

  def __init__(
    self,
    table: TextImages,
    *,
    size: int,
    begin: int = 0,
    end: int | None = None,
    square: Callable[[Image.Image, int], np.ndarray] | None = None,
  ):
    self._table, self._size, self._square = table, size, square
    self._begin, self._end = begin, len(table) if end is None else end
    self._reader = ImageReader(table, size=size, rgb_first=True)

  def __len__(self) -> int:
    return self._end - self._begin

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """One row. Raises BadRow when it cannot be read."""
    del rng
    row = Row(self._table, self._begin + i, reader=self._reader)
    example = self.blank()
    for place, name in enumerate(TEXTS):
      if name in self._table.columns:
        example["texts"][place] = text = row[name]
        if not text.strip() and name not in MAY_BE_EMPTY:
          raise BadRow(row.name, f"the {name} is empty")
    if IMAGE in example:
      image = self._square(row.image(), self._size) if self._square else row.square(None)
      example |= {IMAGE: image, "size": np.array(row.size, np.float32)}
    return example

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch where a row is bad."""
    blank = {"texts": np.array([""] * len(TEXTS), object)}
    if IMAGE in self._table.columns:
      blank[IMAGE] = np.zeros((self._size, self._size, 3), np.uint8)
      blank["size"] = np.full(2, self._size, np.float32)
    return blank
