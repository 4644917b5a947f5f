"""Images that are files of their own; those of a folder of classes have labels."""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from ofa_jax import staging, storage
from ofa_jax.data.cache import ImageReader
from ofa_jax.data.tsv import BadRow

# torchvision's list, so that the images counted are those of the original; the formats among them
# that are not decoded here are reported as bad rows and not left out in silence.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# In a folder of drawn pictures: an object a caption, with the names of its files.
DRAWN = "drawn.jsonl"


class ImageFiles:
  """Image files in a given order; their ids are their paths.

  Args:
    files: different paths.
  """

  def __init__(self, files: Sequence[str]):
    self.files = tuple(files)

  def __len__(self) -> int:
    return len(self.files)

  @property
  def ids(self) -> list[str]:
    """The path of every image."""
    return list(self.files)

  def find(self, ids: Sequence[str]) -> np.ndarray:
    """The row of each path: int64[N], -1 where there is no such image."""
    row = {path: i for i, path in enumerate(self.files)}
    return np.array([row.get(path, -1) for path in ids], np.int64)

  def name(self, i: int) -> str:
    """The path of image `i`."""
    return self.files[i]

  def encoded(self, i: int) -> bytes:
    """The bytes of image file `i`; BadRow when it cannot be read."""
    try:
      return storage.read_bytes(staging.staged(self.files[i]))
    except OSError as error:
      raise BadRow(self.name(i), str(error)) from error


class ImageFolder(ImageFiles):
  """Image files below the class folders of a directory; the class of a file is its folder's rank.

  Args:
    directory: has one folder a class. Folders are ranked by name as strings, so numbers need
      leading zeros beyond ten classes.

  Raises:
    ValueError: no such directory, no class folders, or a class without images.
  """

  def __init__(self, directory: str | os.PathLike):
    root = storage.of(directory)
    if not storage.is_dir(root):
      raise ValueError(f"Expected a folder of class folders, found no folder {root}.")
    self.classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    groups = [image_files(root / name) for name in self.classes]
    empty = [name for name, group in zip(self.classes, groups, strict=True) if not group]
    if empty or not self.classes:
      raise ValueError(
        f"Expected images ({', '.join(EXTENSIONS)}) in every class folder of {root}, found "
        f"{len(self.classes)} class folders, {len(empty)} of them without any: "
        f"{', '.join(empty[:5])}. Add images or remove these folders."
      )
    super().__init__([path for group in groups for path in group])
    self.labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])


class FolderRows:
  """The images of a folder with their labels.

  Args:
    folder: the images.
    size: side of the images in pixels.
    exact: see `ofa_jax.data.images.decode`.
  """

  def __init__(self, folder: ImageFolder, *, size: int, exact: bool = True):
    self.notes = ()
    self.labels = folder.labels
    self._reader = ImageReader(folder, size=size, exact=exact)

  def __len__(self) -> int:
    return len(self.labels)

  def example(self, i: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """`image: uint8[S, S, 3]`, `label: int32`. Raises BadRow when the image cannot be read."""
    return {"image": self._reader.read(i, rng), "label": np.int32(self.labels[i])}

  def blank(self) -> dict[str, np.ndarray]:
    """What stands in a batch where a row is bad."""
    size = self._reader.size
    return {"image": np.zeros((size, size, 3), np.uint8), "label": np.int32(-1)}

  def close(self) -> None:
    """Nothing is cached."""


def image_files(folder: pathlib.Path) -> list[str]:
  """Files below a folder in torchvision's order: folder by folder, names sorted, links followed.

  Of a folder that `ofa_jax.generate` drew, the pictures alone, without the page of them.
  """
  if storage.exists(folder / DRAWN):
    return _drawn(folder / DRAWN)
  if storage.in_bucket(folder):
    names = [n for n in storage.files_below(folder) if n.lower().endswith(EXTENSIONS)]
    return [f"{folder}/{name}" for name in sorted(names, key=os.path.split)]
  files = []
  for parent, _, names in sorted(os.walk(folder, followlinks=True)):
    files += [os.path.join(parent, n) for n in sorted(names) if n.lower().endswith(EXTENSIONS)]
  return files


def _drawn(path: pathlib.Path) -> list[str]:
  """The pictures that a list names, beside it: one that came with a folder names no others."""
  try:
    lines = [json.loads(line) for line in storage.read_bytes(path).splitlines()]
    names = [os.fspath(name) for line in lines for name in line.get("files", ())]
  except (ValueError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{path}: expected the list of a folder that ofa_jax.generate drew, found {error}. Remove it "
      "to take all pictures of the folder"
    ) from error
  return [str(path.parent / name) for name in names if name == os.path.basename(name)]
