"""Pictures with captions as the rows of a table: OFA's TSV, or the pairs that others have."""

from collections.abc import Mapping, Sequence

import numpy as np

from ofa_jax import staging, storage
from ofa_jax.data import held_out, splits
from ofa_jax.data.pairs import expand, find_edges, is_shard
from ofa_jax.data.protocols import TextImages
from ofa_jax.data.sources import PictureTable, is_table
from ofa_jax.data.text import REFERENCES
from ofa_jax.data.tsv import Table, check_files


class SomeRows:
  """Some of the rows of a table, in their order.

  Args:
    table: all of them.
    rows: the numbers of those that are left.
  """

  def __init__(self, table: TextImages, rows: Sequence[int]):
    self.files, self.columns = table.files, table.columns
    self._table, self._rows = table, np.asarray(rows)

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, i: int) -> str:
    """Where row `i` is, for messages."""
    return self._table.name(int(self._rows[i]))

  def text(self, i: int, column: str) -> str:
    """One column of row `i`. Raises BadRow when it cannot be read."""
    return self._table.text(int(self._rows[i]), column)

  def encoded(self, i: int) -> bytes:
    """The bytes of image file `i`. Raises BadRow when they cannot be had."""
    return self._table.encoded(int(self._rows[i]))

  def close(self) -> None:
    """Closes the files."""
    self._table.close()


def load(
  given: Mapping[str, Sequence[str]],
  split: str,
  *,
  columns: Mapping[str, int],
  hold_out: float = 0.0,
  grouped: bool = False,
) -> tuple[TextImages, Sequence[str]]:
  """Opens the captions of a split: uniq_id, image_id, caption and image.

  Args:
    given: by split, OFA's TSV files; or one source of pairs (`splits.load`), each pair of which is
      a row in training, and otherwise each picture, with all of its captions.
    split: its name.
    columns: places of the columns in OFA's files.
    hold_out: share of the training pictures that are "valid" where nothing was given for that.
    grouped: whether a picture of pairs is one row in training, too.

  Returns:
    The rows, and what a person should know of those that were left out.

  Raises:
    ValueError: nothing was given, or faulty files.
  """
  files = given.get(split)
  divided = split in ("train", "valid") and hold_out > 0 and not given.get("valid")
  files = given.get("train") if divided and not files else files
  if files and _are_ofas(files):
    table = Table(files, columns=columns)
    return _divided(table, split, share=hold_out) if divided else (table, ())
  sources = splits.load(given, split, hold_out=hold_out)
  if len(sources) > 1:
    raise ValueError(f"Expected one source of captions for {split!r}, found {len(sources)}")
  images, texts, _ = sources[0]
  edges, ids = find_edges(images, texts), images.ids
  captions = [texts.texts[text] for text, _ in edges]
  rows = edges[:, 1].tolist()
  if split != "train" or grouped:
    of = {}
    for row, caption in zip(rows, captions, strict=True):
      of.setdefault(row, []).append(caption)
    rows, captions = list(of), [REFERENCES.join(group) for group in of.values()]
  columns = {
    "uniq_id": [str(i) for i in range(len(rows))],
    "image_id": [ids[row] for row in rows],
    "caption": captions,
  }
  return PictureTable(images, rows=rows, texts=columns), texts.notes


def _are_ofas(paths: Sequence[str]) -> bool:
  """Whether paths are TSV files without a header that have more than id and base64."""
  if any(map(storage.is_dir, paths)):
    return False
  files = expand(paths)
  if all(map(is_shard, files)):
    return False
  check_files(files)
  if any(map(is_table, files)):
    return False
  with storage.opened(staging.staged(files[0])) as file:
    return file.readline().count(b"\t") != 1


def _divided(table: Table, split: str, *, share: float) -> tuple[SomeRows, Sequence[str]]:
  """The rows whose pictures are held out, or the others."""
  chosen = held_out.choose([table.text(i, "image_id") for i in range(len(table))], share)
  side = SomeRows(table, np.flatnonzero(chosen == (split == "valid")))
  note = f"Held out {len(side):,} of {len(table):,} rows, by their pictures, for the evaluations"
  return side, () if split == "train" else (f"{note}, as task.valid is not given",)
