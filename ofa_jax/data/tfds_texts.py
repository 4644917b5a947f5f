"""Texts of TensorFlow Datasets by name, such as "tfds:glue/cola", as rows of a table.

They are opened as the labelled images are (`data/tfds.py`), without TensorFlow.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ofa_jax.data import tfds
from ofa_jax.data.tfds import PREFIX
from ofa_jax.data.tsv import BadRow


def is_tfds(path: str) -> bool:
  """Whether a data file is named by a data set of TensorFlow Datasets."""
  return path.startswith(PREFIX)


class TfdsTexts:
  """Rows of one split, in the order in which it is stored.

  Args:
    name: such as "glue/cola"; downloaded and prepared once.
    split: such as "validation".
    columns: features by the names that they are read as; those that the data set lacks are left
      out. A class is read as its name, and as "" where there is none (-1).

  Attributes:
    files: none on this machine that a person would know.

  Raises:
    ValueError: no such data set, split or feature, or only files without random access.
  """

  files: tuple[str, ...] = ()

  def __init__(self, name: str, *, split: str, columns: Mapping[str, str]):
    builder = tfds.prepared(name)
    features = builder.info.features
    missing = [feature for feature in columns.values() if feature not in features]
    if missing:
      raise ValueError(
        f"Expected the features {', '.join(columns.values())} in {name}, found no "
        f"{', '.join(missing)}, but {', '.join(features)}"
      )
    self.columns = {column: i for i, column in enumerate(columns)}
    self._features = dict(columns)
    self._names = {key: getattr(features[key], "names", None) for key in columns.values()}
    self._source = tfds.source(builder, split)
    self._place = f"{PREFIX}{name}/{split}"

  @classmethod
  def of(cls, paths: Sequence[str], *, columns: Mapping[str, str], split: str) -> "TfdsTexts":
    """The rows of "tfds:NAME" or "tfds:NAME:SPLIT"; `split` where none is named.

    Raises:
      ValueError: as above, or several paths.
    """
    name, split = tfds.named(paths, usual=split)
    return cls(name, split=split, columns=columns)

  def __len__(self) -> int:
    return len(self._source)

  def name(self, i: int) -> str:
    """Where row `i` is, for messages."""
    return f"{self._place}[{i}]"

  def text(self, i: int, column: str) -> str:
    """One column of row `i`. Raises BadRow where it is not UTF-8."""
    feature = self._features[column]
    value = self._source[i][feature]
    names = self._names[feature]
    if names is not None:
      return names[int(value)] if int(value) >= 0 else ""
    if isinstance(value, bytes):
      try:
        return value.decode("utf-8")
      except UnicodeDecodeError as error:
        raise BadRow(self.name(i), f"{column} is not UTF-8: {error.reason}") from error
    return str(np.asarray(value).item())

  def encoded(self, i: int) -> bytes:
    """Raises BadRow: there are no pictures."""
    raise BadRow(self.name(i), "the row has no picture")

  def close(self) -> None:
    """The files close with the last reference to their reader."""
