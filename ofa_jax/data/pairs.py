"""Image-text pairs for contrastive training and retrieval: files -> numpy examples.

`PairData` says which files, `PairRows` are the training examples (one a caption-image edge),
`ImageRows` and `TextRows` the two pools of a retrieval evaluation.
"""

import dataclasses
import glob
import os
import re
from collections.abc import Callable, Sequence

import numpy as np

from ofa_jax import storage
from ofa_jax.data.cache import DEFAULT_MAX_BYTES, ImageReader
from ofa_jax.data.captioned import has_captions, read_captioned
from ofa_jax.data.lmdb import LmdbImages, read_lmdb_pairs
from ofa_jax.data.protocols import Images
from ofa_jax.data.table import CAPTION, EXTENSIONS, IMAGE, read_table
from ofa_jax.data.tar import read_tar
from ofa_jax.data.tsv import FaultyRowsError, ImageTable, Texts, read_texts

Tokenize = Callable[[str], np.ndarray]  # str -> int32[T]


@dataclasses.dataclass
class PairData:
  """The files of one data set.

  Attributes:
    images: TSV files, or one LMDB `imgs` folder; or what holds the captions too: tables (`.csv`,
      `.tsv`) of image paths, WebDataset shards (`.tar`), one folder of pictures with a `.txt`
      beside each. A name may be a pattern: `{000..123}`, `{a,b}`, `*`.
    texts: JSONL files, or one LMDB `pairs` folder; nothing where the captions are beside the
      images.
    weight: share of the data set in a mixture.
    image: a table's column of image paths.
    caption: a table's column of captions (None: "title"); the field of a shard's `.json` members
      (None: its `.txt` members).
    root: the folder that a table's paths are relative to. None: the table's.
  """

  images: tuple[str, ...]
  texts: tuple[str, ...] = ()
  weight: float = 1.0
  image: str = IMAGE
  caption: str | None = None
  root: str | None = None

  @classmethod
  def of(
    cls,
    path: str | os.PathLike,
    split: str | None = None,
    *,
    weight: float = 1.0,
    image: str = IMAGE,
    caption: str | None = None,
    root: str | None = None,
  ) -> "PairData":
    """Finds the files of a split in a data folder, or takes a file or pattern as it is.

    Looks for `{split}_imgs*.tsv` with `{split}_texts*.jsonl`, then for LMDB folders in
    `lmdb/{split}` and `{split}`, for a table `{split}.csv` or `{split}.tsv`, for shards
    `{split}*.tar` or `{split}/*.tar`, and for pictures with captions in `.txt` files beside them in
    `{split}` or, of "train", in the folder itself.

    Args:
      path: the folder; without `split` a file, or a pattern of files, that holds captions too, or
        an `_imgs.tsv` that has its `_texts.jsonl` beside it.
      split: such as "train".
      weight, image, caption, root: the fields of that name.

    Raises:
      ValueError: none of these is there.
    """
    rest = {"weight": weight, "image": image, "caption": caption, "root": root}
    if split is None:
      path = os.fspath(path)
      texts = re.sub(r"_imgs(.*)\.tsv$", r"_texts\1.jsonl", path)
      beside = (texts,) if texts != path and storage.is_file(texts) else ()
      return cls((path,), beside, **rest)
    folder = storage.of(path)
    images = sorted(folder.glob(f"{split}_imgs*.tsv"))
    # Features, and annotations turned round, may lie beside them.
    texts = sorted(
      path
      for path in folder.glob(f"{split}_texts*.jsonl")
      if not path.name.endswith((".tr.jsonl", "_feat.jsonl"))
    )
    if images and texts:
      return cls(tuple(map(str, images)), tuple(map(str, texts)), **rest)
    for lmdb in (folder / "lmdb" / split, folder / split):
      if (lmdb / "imgs").is_dir() and (lmdb / "pairs").is_dir():
        return cls((str(lmdb / "imgs"),), (str(lmdb / "pairs"),), **rest)
    for pattern in (*(f"{split}{e}" for e in EXTENSIONS), f"{split}*.tar", f"{split}/*.tar"):
      files = sorted(folder.glob(pattern))
      if files:
        return cls(tuple(map(str, files)), **rest)
    for place in (folder / split, *([folder] if split == "train" else [])):
      if place.is_dir() and has_captions(place):
        return cls((str(place),), **rest)
    splits = sorted(p.name.removesuffix("_texts.jsonl") for p in folder.glob("*_texts.jsonl"))
    raise ValueError(
      f"Expected {split}_imgs.tsv and {split}_texts.jsonl, lmdb/{split}/{{imgs,pairs}}, "
      f"{split}.csv or {split}*.tar, found none of these in {folder} (splits there: "
      f"{', '.join(splits) or 'none'}). Check folder and split. Pictures want a .txt with the "
      "caption beside each."
    )

  def load(self, *, index_dir: str | None = None) -> tuple[Images, Texts]:
    """Opens the images and reads the captions; errors of the files are raised here."""
    if self.texts:
      return self.load_images(index_dir=index_dir), self.load_texts()
    files = expand(self.images)
    if all(file.lower().endswith(EXTENSIONS) for file in files):
      return read_table(files, image=self.image, caption=self.caption or CAPTION, root=self.root)
    if len(files) == 1 and storage.is_dir(files[0]):
      return read_captioned(files[0])
    if all(map(is_shard, files)):
      return read_tar(files, caption=self.caption, index_dir=index_dir)
    raise ValueError(
      f"Expected tables ({', '.join(EXTENSIONS)}) or .tar shards, which hold captions too, or "
      f"`texts` beside the images, found no texts and {', '.join(files[:3])}."
    )

  def load_images(self, *, index_dir: str | None = None) -> Images:
    """Opens the images."""
    if not self.texts:
      return self.load(index_dir=index_dir)[0]
    if _is_folder(self.images):
      return LmdbImages(self.images[0])
    return ImageTable(expand(self.images), index_dir=index_dir)

  def load_texts(self) -> Texts:
    """Reads the captions."""
    if not self.texts:
      return self.load()[1]
    return read_lmdb_pairs(self.texts[0]) if _is_folder(self.texts) else read_texts(self.texts)


class PairRows:
  """One row for each edge between a caption and an image, in file order.

  Args:
    images: the image table.
    texts: the captions; those without an image have no row.
    size: side of the images in pixels.
    tokenize: str -> int32[T].
    exact, augment, cache_dir, cache_bytes: see `ofa_jax.data.cache.ImageReader`.

  Raises:
    ValueError: a caption names an image that is not in the table, or there is no edge at all.
  """

  def __init__(
    self,
    images: Images,
    texts: Texts,
    *,
    size: int,
    tokenize: Tokenize,
    exact: bool = False,
    augment: str = "none",
    cache_dir: str | os.PathLike | None = None,
    cache_bytes: int = DEFAULT_MAX_BYTES,
  ):
    self.texts = texts
    self.notes = texts.notes
    self.edges = find_edges(images, texts)
    numbers = {}
    captions = np.array([numbers.setdefault(text, len(numbers)) for text in texts.texts])
    self._caption_index = _first_row(captions[self.edges[:, 0]])
    self._image_index = _first_row(self.edges[:, 1])
    self._tokenize = tokenize
    self._reader = ImageReader(
      images,
      size=size,
      exact=exact,
      augment=augment,
      cache_dir=cache_dir,
      cache_bytes=cache_bytes,
    )

  def __len__(self) -> int:
    return len(self.edges)

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """`image: uint8[S, S, 3]`, `tokens: int32[T]`, `image_index`, `caption_index`: int32.

    The two numbers are the first row with the same image and the first with an equal caption, so
    that rows which are no negatives of each other can be told. Raises BadRow when the image cannot
    be read.
    """
    text, image = self.edges[i]
    return {
      "image": self._reader.read(int(image), rng),
      "tokens": self._tokenize(self.texts.texts[text]),
      "image_index": self._image_index[i],
      "caption_index": self._caption_index[i],
    }

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch where a row is bad; index -1 equals no other."""
    return {
      "image": np.zeros((self._reader.size, self._reader.size, 3), np.uint8),
      "tokens": np.zeros_like(self._tokenize("")),
      "image_index": np.int32(-1),
      "caption_index": np.int32(-1),
    }

  def close(self) -> None:
    """Closes the decode cache."""
    self._reader.close()


class ImageRows:
  """The images of a table, in table order: the image pool of an evaluation.

  Args:
    images: the image table.
    size: side of the images in pixels.
    exact, cache_dir, cache_bytes: see `ofa_jax.data.cache.ImageReader`.
  """

  def __init__(
    self,
    images: Images,
    *,
    size: int,
    exact: bool = True,
    cache_dir: str | os.PathLike | None = None,
    cache_bytes: int = DEFAULT_MAX_BYTES,
  ):
    self.notes = ()
    self.ids = images.ids
    self._reader = ImageReader(
      images, size=size, exact=exact, cache_dir=cache_dir, cache_bytes=cache_bytes
    )

  def __len__(self) -> int:
    return len(self.ids)

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """`image: uint8[S, S, 3]`. Raises BadRow when it cannot be read."""
    return {"image": self._reader.read(i, rng)}

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch where a row is bad."""
    return {"image": np.zeros((self._reader.size, self._reader.size, 3), np.uint8)}

  def close(self) -> None:
    """Closes the decode cache."""
    self._reader.close()


class TextRows:
  """Texts in order: the text pool of an evaluation, or the prompts of a classifier.

  Args:
    texts: captions or prompts.
    tokenize: str -> int32[T].
    images_of: for each text the rows of the image pool that it describes, for scoring.
    notes: see `ofa_jax.data.protocols.Rows`.
  """

  def __init__(
    self,
    texts: Sequence[str],
    *,
    tokenize: Tokenize,
    images_of: Sequence[Sequence[int]] | None = None,
    notes: Sequence[str] = (),
  ):
    self.images_of = images_of
    self.texts = texts
    self.notes = notes
    self._tokenize = tokenize

  def __len__(self) -> int:
    return len(self.texts)

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """`tokens: int32[T]`."""
    return {"tokens": self._tokenize(self.texts[i])}

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch as padding."""
    return {"tokens": np.zeros_like(self._tokenize(""))}

  def close(self) -> None:
    """Nothing is cached."""


def find_edges(images: Images, texts: Texts) -> np.ndarray:
  """int32[E, 2]: the row of the caption and of the image of every edge, in file order.

  Raises:
    ValueError: an image id is not in the table (all are counted, the first five named), or there
      is no edge.
  """
  ids = [image_id for group in texts.image_ids for image_id in group]
  captions = np.repeat(np.arange(len(texts)), [len(group) for group in texts.image_ids])
  rows = images.find(ids)
  lost = np.flatnonzero(rows < 0)
  if len(lost):
    raise FaultyRowsError(
      f"Expected every image_ids entry in {', '.join(images.files[:3])}, found {len(lost)} of "
      f"{len(ids)} missing: "
      + "; ".join(f"{ids[k]} (named by {texts.name(captions[k])})" for k in lost[:5])
      + f". The table has ids such as {', '.join(images.ids[:3])}: add the images, or remove the "
      "ids from the captions.",
      [(texts.name(captions[k]), f"names the image {ids[k]!r}, which is missing") for k in lost],
    )
  if not len(ids):
    raise ValueError(
      f"Expected captions with image_ids, found only empty lists in {', '.join(texts.files[:3])}. "
      "Training pairs need at least one image a caption."
    )
  return np.stack([captions, rows], axis=1).astype(np.int32)


def expand(patterns: Sequence[str]) -> list[str]:
  """File names from patterns with `{000..123}`, `{a,b}`, `*`, `?` and `[...]`, in order.

  A name without any of these is given as it is, whether there is such a file or not.

  Raises:
    ValueError: a pattern with `*`, `?` or `[...]` that no file has.
  """
  names = []
  for pattern in patterns:
    for name in _braces(os.fspath(pattern)):
      files = [name]
      if glob.has_magic(name) and not storage.exists(name):
        files = storage.glob(name)
      if not files:
        raise ValueError(f"Expected files like {name}, found none. Check the pattern.")
      names += files
  return names


def is_shard(path: str) -> bool:
  """Whether a file's name is one of a tar file, compressed ones included."""
  return ".tar" in path or path.endswith(".tgz")


def _braces(pattern: str) -> list[str]:
  """`a{01..03}` -> a01, a02, a03; `a{b,c}` -> ab, ac; several braces are combined."""
  braces = re.search(r"\{([^{}]*)\}", pattern)
  if not braces:
    return [pattern]
  ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
  parts = braces[1].split(",")
  if ends:
    width = len(ends[1]) if ends[1].startswith("0") else 0
    parts = [f"{i:0{width}}" for i in range(int(ends[1]), int(ends[2]) + 1)]
  before, after = pattern[: braces.start()], pattern[braces.end() :]
  return [name for part in parts for name in _braces(f"{before}{part}{after}")]


def _first_row(values: np.ndarray) -> np.ndarray:
  """int32[E]: for each element the place where its value stands first."""
  _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
  return first[inverse].astype(np.int32)


def _is_folder(paths: tuple[str, ...]) -> bool:
  return len(paths) == 1 and storage.is_dir(paths[0])
