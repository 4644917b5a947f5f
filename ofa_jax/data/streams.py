"""The training data of a run: one data set, or several of different shapes, a stream each, by name.

`by_name` and `unnamed` let one stream without a name and several with names go through the same
code.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from ofa_jax.data.protocols import Rows

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Streams:
  """Rows and batch sizes by stream; a single one has the name None.

  Attributes:
    rows: of each.
    sizes: rows of a global batch of each, the main one first.
  """

  rows: Mapping[str | None, Rows]
  sizes: Mapping[str | None, int]

  @classmethod
  def of(cls, rows: Mapping[str, Rows] | Rows, sizes: Mapping[str, int] | int) -> "Streams":
    """What a task gives as `examples` and `batch_sizes`.

    Raises:
      ValueError: these are not of the same streams.
    """
    streams = cls(by_name(rows), by_name(sizes))
    if streams.rows.keys() != streams.sizes.keys():
      of_rows, of_sizes = (
        "one stream without a name" if None in names else f"streams {', '.join(names)}"
        for names in (streams.rows, streams.sizes)
      )
      raise ValueError(
        f"Expected data for the {of_sizes} that have a batch size, found {of_rows}. `examples` and "
        "`batch_sizes` of a task name the same streams."
      )
    return streams

  def __len__(self) -> int:
    """Rows of the main stream, which make an epoch."""
    return self.num_rows[next(iter(self.sizes))]

  @property
  def num_rows(self) -> dict[str | None, int]:
    """Rows of each stream."""
    return {name: len(rows) for name, rows in self.rows.items()}

  @property
  def notes(self) -> list[str]:
    """What a person should know of rows that were left out of any stream."""
    return [note for rows in self.rows.values() for note in rows.notes]

  def close(self) -> None:
    """Closes all rows."""
    for rows in self.rows.values():
      rows.close()


def by_name(streams: Mapping[str, T] | T) -> dict[str | None, T]:
  """What belongs to each stream, by its name; a single one without a name is that of None."""
  return dict(streams) if isinstance(streams, Mapping) else {None: streams}


def unnamed(streams: Mapping[str | None, T]) -> Mapping[str, T] | T:
  """The inverse of `by_name`."""
  return streams.get(None, streams)
