"""Several data sets of different shapes in one run: one stream each, by name.

`by_name` and `unnamed` let one stream without a name and several with names go through the same
code.
"""

from collections.abc import Mapping
from typing import TypeVar

from ofa_jax.data.protocols import Rows

T = TypeVar("T")


def by_name(streams: Mapping[str, T] | T) -> dict[str | None, T]:
  """What belongs to each stream, by its name; a single one without a name is that of None."""
  return dict(streams) if isinstance(streams, Mapping) else {None: streams}


def unnamed(streams: Mapping[str | None, T]) -> Mapping[str, T] | T:
  """The inverse of `by_name`."""
  return streams.get(None, streams)


def check_streams(streams: Mapping[str | None, Rows], sizes: Mapping[str | None, int]) -> None:
  """Raises ValueError unless the data and the batch sizes are of the same streams."""
  if streams.keys() == sizes.keys():
    return
  of_data, of_sizes = (
    "one stream without a name" if None in names else f"streams {', '.join(names)}"
    for names in (streams, sizes)
  )
  raise ValueError(
    f"Expected data for the {of_sizes} that have a batch size, found {of_data}. `examples` and "
    "`batch_sizes` of a task name the same streams."
  )
