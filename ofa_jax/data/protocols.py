"""What a data set is to the rest of the package: protocols that its readers have in common.

`Rows` are what batches are made of, `Images` the encoded pictures that some rows are read from.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Rows(Protocol):
  """Examples by number, all with the same fields; may be read from several threads.

  A field called `*_index` is the number of a row of theirs.

  Attributes:
    notes: what a person should know of rows that were left out, one line each.
  """

  notes: Sequence[str]

  def __len__(self) -> int:
    """Returns the number of rows."""

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """The fields of row `i`.

    Args:
      i: from 0.
      rng: the row's own generator; None in evaluation.

    Raises:
      BadRow: it cannot be read.
    """

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch as padding or for a bad row: every field's shape and dtype."""

  def close(self) -> None:
    """Writes out what is cached and closes the files."""


class EncodedImages(Protocol):
  """Image files by number, as they are stored.

  Attributes:
    files: where the bytes are; a change of these is a change of the images.
  """

  files: Sequence[str]

  def __len__(self) -> int:
    """Returns the number of images."""

  def name(self, i: int) -> str:
    """Where image `i` is, for messages."""

  def encoded(self, i: int) -> bytes:
    """The bytes of image file `i`. Raises BadRow when they cannot be had."""


@runtime_checkable
class Images(EncodedImages, Protocol):
  """Image files that have ids, each once: the images of one data set."""

  @property
  def ids(self) -> list[str]:
    """The id of every image, in order."""

  def find(self, ids: Sequence[str]) -> np.ndarray:
    """The number of each id: int64[N], -1 where there is no such image."""


class TextImages(EncodedImages, Protocol):
  """Rows by number that have texts, and perhaps an image file each, by the names of columns.

  Attributes:
    columns: the names; "image" is not a text.
  """

  columns: Mapping[str, int]

  def text(self, i: int, column: str) -> str:
    """One column of row `i`. Raises BadRow when it cannot be read."""

  def close(self) -> None:
    """Closes the files."""
