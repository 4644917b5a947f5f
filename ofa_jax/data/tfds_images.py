"""Labelled images of TensorFlow Datasets by name, such as "tfds:imagenet2012", as rows of a table.

They are opened as for zero-shot classification (`data/tfds.py`), and not decoded here.
"""

from collections.abc import Sequence

from ofa_jax.data import tfds
from ofa_jax.data.tfds import PREFIX
from ofa_jax.data.tsv import IMAGE, BadRow


class TfdsImages:
  """Rows of one split, in the order in which it is stored.

  Args:
    name: such as "imagenet2012"; downloaded and prepared once.
    split: such as "validation".
    labels: what each class is read as, in the order of the data set's own classes.

  Attributes:
    files: none on this machine that a person would know; a decode cache cannot tell splits apart.
    columns: "label" and "image".

  Raises:
    ValueError: no such data set or split, no image with a label in it, another number of classes,
      or only files without random access.
  """

  files: tuple[str, ...] = ()

  def __init__(self, name: str, *, split: str, labels: Sequence[str]):
    builder = tfds.prepared(name)
    if builder.info.supervised_keys is None:
      raise ValueError(
        f"Expected a data set of images with one label each, found {name} with "
        f"{', '.join(builder.info.features)}"
      )
    self._image, self._label = builder.info.supervised_keys
    classes = builder.info.features[self._label].names
    if len(labels) != len(classes):
      raise ValueError(
        f"Expected words for the {len(classes)} classes of {name}, {classes[0]} to {classes[-1]}, "
        f"in this order, found {len(labels)}"
      )
    self.columns = {"label": 0, IMAGE: 1}
    self._labels = tuple(labels)
    self._source = tfds.source(builder, split, undecoded=(self._image,))
    self._place = f"{PREFIX}{name}/{split}"

  @classmethod
  def of(cls, paths: Sequence[str], *, split: str, labels: Sequence[str]) -> "TfdsImages":
    """The rows of "tfds:NAME" or "tfds:NAME:SPLIT"; `split` where none is named.

    Raises:
      ValueError: as above, or several paths.
    """
    name, split = tfds.named(paths, usual=split)
    return cls(name, split=split, labels=labels)

  def __len__(self) -> int:
    return len(self._source)

  def name(self, i: int) -> str:
    """Where row `i` is, for messages."""
    return f"{self._place}[{i}]"

  def text(self, i: int, column: str) -> str:
    """What the class of row `i` is read as; "" where it has none (-1)."""
    del column
    number = int(self._source[i][self._label])
    if number >= len(self._labels):
      raise BadRow(self.name(i), f"expected a class below {len(self._labels)}, found {number}")
    return self._labels[number] if number >= 0 else ""

  def encoded(self, i: int) -> bytes:
    """The bytes of the picture of row `i`."""
    return self._source[i][self._image]

  def close(self) -> None:
    """The files close with the last reference to their reader."""
