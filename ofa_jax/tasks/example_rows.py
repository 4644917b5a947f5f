"""The rows of a table as examples of a task of OFA."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ofa_jax.data.cache import ImageReader
from ofa_jax.data.protocols import TextImages
from ofa_jax.data.rows import Row
from ofa_jax.data.tsv import IMAGE

if TYPE_CHECKING:
  from ofa_jax.tasks.seq2seq import Seq2Seq


class Rows:
  """The rows of a table as examples of a task.

  Attributes:
    table: the files.
  """

  def __init__(self, task: "Seq2Seq", table: TextImages, notes: Sequence[str] = ()):
    self.table = table
    self.notes = notes
    self._task = task
    self._fields = task.blank().keys()
    self._reader = None
    if IMAGE in task.fields:
      self._reader = ImageReader(
        table,
        size=task.image_size,
        rgb_first=True,
        cache_dir=task.cache_dir,
        cache_bytes=task.cache_bytes,
      )

  def __len__(self) -> int:
    return len(self.table)

  def row(self, i: int) -> Row:
    """Row `i`, of which only what is asked for is read."""
    return Row(self.table, i, reader=self._reader)

  def image(self, i: int, *, size: int) -> np.ndarray:
    """uint8[size, size, 3] of row `i`, for people. Raises BadRow when it cannot be read."""
    return ImageReader(self.table, size=size, rgb_first=True).read(i, None)

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """The fields of `Seq2Seq.blank`. Raises BadRow when the row cannot be read."""
    example = self._task.assemble(self._task.example(self.row(i), rng), warn=rng is not None)
    if example.keys() != self._fields:
      raise ValueError(
        f"Expected {', '.join(sorted(self._fields))}, the fields of `blank`, from "
        f"{type(self._task).__name__}.example, found {', '.join(sorted(example))}"
      )
    return example

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch where a row is bad."""
    return self._task.blank()

  def close(self) -> None:
    """Closes the decode cache and the files."""
    if self._reader:
      self._reader.close()
    self.table.close()
