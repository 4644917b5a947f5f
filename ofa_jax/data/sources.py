"""Pictures, and pictures with texts, out of whatever training reads: one opener for all commands.

photos/            a folder of pictures, perhaps with folders in it; captions in .txt files beside
photos.csv, .tsv   a table with a header, `filepath` and perhaps `title`
shard-{0..9}.tar   WebDataset shards
valid_imgs.tsv     Chinese-CLIP's: id, tab, base64; captions in valid_texts.jsonl beside it
lmdb/valid/imgs    its LMDB folder; captions in `pairs` beside it
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from ofa_jax import staging, storage
from ofa_jax.data.folder import EXTENSIONS as PICTURES
from ofa_jax.data.folder import ImageFiles, image_files
from ofa_jax.data.lmdb import LmdbImages, read_lmdb_pairs
from ofa_jax.data.pairs import PairData, expand, is_shard
from ofa_jax.data.protocols import Images, TextImages
from ofa_jax.data.table import EXTENSIONS as TABLES
from ofa_jax.data.table import IMAGE as FILEPATH
from ofa_jax.data.table import header, read_columns
from ofa_jax.data.tar import TarImages, read_tar_images
from ofa_jax.data.tsv import IMAGE, ImageTable, Table, Texts, check_files, read_texts


def open_images(path: str | os.PathLike) -> Images:
  """The pictures of a folder, table, shards, TSV or LMDB folder; captions are not needed.

  Raises:
    ValueError: there are none, or the files are faulty.
  """
  path = os.fspath(path)
  if storage.is_dir(path):
    if storage.exists(os.path.join(path, "data.mdb")):
      return LmdbImages(path)
    files = image_files(storage.of(path))
    if not files:
      raise ValueError(
        f"Expected pictures ({', '.join(PICTURES)}) or data.mdb of an LMDB in the folder {path}, "
        "found none. Give the folder of the pictures, or the file that names them."
      )
    return ImageFiles([storage.absolute(file) for file in files])
  files = expand([path])
  check_files(files)
  if all(map(is_shard, files)):
    return read_tar_images(files)
  if is_table(files[0]):
    names = (image for (image,) in read_columns(files, [FILEPATH]))
    return ImageFiles(list(dict.fromkeys(names)))
  return ImageTable(files)


def open_texts(path: str | os.PathLike) -> Texts:
  """The captions of a JSONL file, a folder, a table, shards, or an LMDB folder.

  Raises:
    ValueError: there are none, or the files are faulty.
  """
  path = os.fspath(path)
  if storage.exists(os.path.join(path, "data.mdb")):
    return read_lmdb_pairs(path)
  if path.endswith((".jsonl", ".json")):
    return read_texts([path])
  return PairData.of(path).load_texts()


def ids_are_paths(images: Images) -> bool:
  """Whether pictures are named by where they lie, and not by ids of a data set's own."""
  return isinstance(images, ImageFiles | TarImages)


def is_table(path: str) -> bool:
  """Whether a file is a table of image paths with a header, and no TSV of base64."""
  return path.lower().endswith(".csv") or (
    path.lower().endswith(TABLES) and FILEPATH in header(path)
  )


class PictureTable:
  """Pictures and texts as rows by name, as `tsv.Table` has those of OFA's files.

  Args:
    images: the pictures.
    rows: the picture of each row.
    texts: of each row, by column.
    tables: the files that rows and texts are from.
  """

  def __init__(
    self,
    images: Images,
    *,
    rows: Sequence[int],
    texts: Mapping[str, Sequence[str]],
    tables: Sequence[str] = (),
  ) -> None:
    self.files = (*tables, *images.files)
    self.columns = {name: i for i, name in enumerate((*texts, IMAGE))}
    self._images, self._rows, self._texts = images, np.asarray(rows), texts

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, i: int) -> str:
    """Where the picture of row `i` is, for messages."""
    return self._images.name(int(self._rows[i]))

  def text(self, i: int, column: str) -> str:
    """One column of row `i`."""
    return self._texts[column][i]

  def encoded(self, i: int) -> bytes:
    """The bytes of the picture of row `i`. Raises BadRow when they cannot be had."""
    return self._images.encoded(int(self._rows[i]))

  def close(self) -> None:
    """The files close with the last reference to their reader."""


def open_rows(
  paths: Sequence[str], *, columns: Mapping[str, int | str], places: Mapping[str, int]
) -> TextImages:
  """The rows of files whose pictures a model is asked about.

  Args:
    paths: of OFA's TSV files; or one of the forms above, whose rows have an "id" and an "image".
      A table gives texts, too.
    columns: places, or in a table names, of the columns, by what they are read as; empty: those
      that the table has under these names.
    places: the columns of OFA's files where `columns` says nothing.

  Raises:
    ValueError: faulty files; a place where names are expected, or the other way round.
  """
  files = [] if any(map(storage.is_dir, paths)) else expand(paths)
  tables = [path for path in files if storage.is_file(path) and is_table(path)]
  named = [f"{name}:{place}" for name, place in columns.items() if not isinstance(place, int)]
  if not tables:
    if named:
      raise ValueError(
        f"Expected numbers of columns, from 0, in files without a header, found {', '.join(named)}"
      )
    if _is_ofa(files, columns, places):
      return Table(files, columns=columns or places)
    if len(paths) > 1 or columns:
      raise ValueError(
        f"Expected one source of pictures, whose rows are id and picture, found "
        f"{', '.join(paths)} with columns {', '.join(columns) or 'of the task'}"
      )
    images = open_images(paths[0])
    return PictureTable(images, rows=range(len(images)), texts={"id": images.ids})
  numbered = [f"{name}:{place}" for name, place in columns.items() if isinstance(place, int)]
  if len(tables) < len(files) or numbered:
    raise ValueError(
      f"Expected tables with a header and names of their columns, found {', '.join(files[:3])} "
      f"and {', '.join(numbered) or 'no numbers'}"
    )
  return _named(tables, columns, texts=places)


def _is_ofa(
  files: Sequence[str], columns: Mapping[str, int | str], places: Mapping[str, int]
) -> bool:
  """TSV files in OFA's form: neither shards nor folders nor Chinese-CLIP's id and base64."""
  if not files or all(map(is_shard, files)):
    return False
  check_files(files)
  if IMAGE not in places:
    return True  # two columns of texts, and not an id and a picture
  with storage.opened(staging.staged(files[0])) as file:
    return bool(columns) or file.readline().count(b"\t") != 1


def _named(
  tables: Sequence[str], columns: Mapping[str, int | str], *, texts: Mapping[str, int]
) -> PictureTable:
  """The rows of tables with a header."""
  known = header(tables[0])
  wanted = dict(columns) or {name: name for name in texts if name != IMAGE and name in known}
  image = str(wanted.pop(IMAGE, FILEPATH))
  rows = list(read_columns(tables, [image, *map(str, wanted.values())]))
  number = {file: i for i, file in enumerate(dict.fromkeys(row[0] for row in rows))}
  read = dict(zip(wanted, zip(*(row[1:] for row in rows), strict=True), strict=True))
  read.setdefault("id", [row[0] for row in rows])
  places = [number[row[0]] for row in rows]
  return PictureTable(ImageFiles(list(number)), rows=places, texts=read, tables=tables)
