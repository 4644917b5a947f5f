"""One row of a table, of which only what is asked for is read.

A task makes its example out of a `Row`: texts by the names of their columns, the stored picture's
size without decoding it, and the picture. Whatever must move with the pixels (boxes, crops) is made
where they are.
"""

import functools
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from ofa_jax.data import images
from ofa_jax.data.cache import ImageReader
from ofa_jax.data.protocols import TextImages
from ofa_jax.data.tsv import IMAGE, BadRow


class Row(Mapping[str, str]):
  """One row: a mapping from the names of its text columns to the texts.

  Everything raises BadRow where the row cannot be read.

  Args:
    table: the files.
    index: which of its rows.
    reader: gives pictures squashed to the task's square; None: the rows have none.

  Attributes:
    index: which row of the table it is.
    name: `file:line id`, for messages.
  """

  def __init__(self, table: TextImages, index: int, *, reader: ImageReader | None = None):
    self.index = index
    self._table, self._reader = table, reader

  @property
  def name(self) -> str:
    return self._table.name(self.index)

  def __getitem__(self, column: str) -> str:
    if column not in self._table.columns or column == IMAGE:
      raise KeyError(column)
    return self._table.text(self.index, column)

  def __iter__(self) -> Iterator[str]:
    return (column for column in self._table.columns if column != IMAGE)

  def __len__(self) -> int:
    return sum(1 for _ in self)

  @property
  def size(self) -> tuple[int, int]:
    """Width and height of the stored picture in pixels, out of its header."""
    return self._picture(images.size)

  def image(self) -> Image.Image:
    """The stored picture, decoded whole, in RGB."""
    return self._picture(images.open_rgb)

  def cropped(self, size: int) -> np.ndarray:
    """uint8[size, size, 3]: the middle of the stored picture as OpenAI's CLIP is given it."""
    return self._picture(functools.partial(images.decode_cropped, size=size))

  def square(self, rng: np.random.Generator | None) -> np.ndarray:
    """uint8[S, S, 3]: the whole picture squashed to the task's size, out of the decode cache.

    Args:
      rng: the row's own generator, for readers that augment; None outside training.
    """
    return self._reader.read(self.index, rng)

  def _picture(self, read):
    try:
      return read(self._table.encoded(self.index))
    except images.BadImage as error:
      raise BadRow(self.name, str(error)) from error
