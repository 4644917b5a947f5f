"""The pictures of a folder with their Chinese-CLIP features, which are computed once.

Features lie in the user's cache folder, one file for each folder and model; where a picture or the
model has changed they are computed anew, and a run that was killed goes on.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from ofa_jax import api, cli, extract_features, partial, storage
from ofa_jax.data import features, folder, images
from ofa_jax.scoring import retrieval

THUMBNAIL = 384  # pixels of the longer side


@dataclasses.dataclass(frozen=True)
class Hit:
  """A picture that was found.

  Attributes:
    name: its path in the folder.
    cosine: of its features and what was searched for.
    thumbnail: the picture, small.
  """

  name: str
  cosine: float
  thumbnail: Image.Image


@dataclasses.dataclass(frozen=True)
class Library:
  """Pictures and features.

  Attributes:
    root: the folder.
    files: of the pictures that can be read.
    vectors: float32[N, E] of them, normalised.
  """

  root: pathlib.Path
  files: tuple[str, ...]
  vectors: np.ndarray

  def __len__(self) -> int:
    return len(self.files)

  def nearest(self, query: np.ndarray, *, most: int) -> list[Hit]:
    """The pictures nearest to features float32[E], the nearest first.

    A picture that was removed, or cannot be read any more, is left out.
    """
    query = query / np.linalg.norm(query)
    (rows,) = retrieval.top_k(query[None], self.vectors, k=min(most, len(self)))
    hits = []
    for row in rows:
      shown = thumbnail(self.files[row], root=self.root)
      if shown is not None:
        name = os.path.relpath(self.files[row], self.root)
        hits.append(Hit(name, float(self.vectors[row] @ query), shown))
    return hits


def open_library(
  model: api.CNCLIPModel, root: str | os.PathLike, *, say: Callable[[str], None] = print
) -> Library:
  """Finds the pictures of a folder and computes their features, or reads them where they are known.

  Links that lead out of the folder are not followed.

  Args:
    model: from `load_from_name`.
    root: the folder.
    say: takes a line about what is done.

  Raises:
    ValueError: there is no such folder, or no picture in it that can be read.
  """
  if storage.in_bucket(root) or not os.path.isdir(root):
    raise ValueError(f"Expected a folder of pictures in --images, found no local folder {root}")
  root = pathlib.Path(os.path.realpath(root))
  files = folder.image_files(root)
  outside = sum(not _is_inside(file, root) for file in files)
  if outside:
    say(f"Left out {outside} pictures behind links that lead out of {root}")
  # Each once, whatever links lead to it.
  inside = list(dict.fromkeys(os.path.realpath(x) for x in files if _is_inside(x, root)))
  if not inside:
    raise ValueError(
      f"Expected pictures ({', '.join(folder.EXTENSIONS)}) in the folder {root}, found none"
    )
  place = _place(model, root, inside)
  if not place.exists():
    say(f"Computing the features of {len(inside):,} pictures, once: they are kept in {place}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with cli.sole_writer(place, flag="--images"):
      table = folder.ImageFiles(inside)
      count = extract_features.extract_images(
        model, table, output=place, batch_size=64, max_bad_rate=1.0
      )
      if not count:
        place.unlink()
        raise ValueError(f"Expected pictures in the folder {root}, found none that can be read")
    _remove_older(place)
  known = features.read_features(place, kind="image")
  say(f"{len(known):,} of {len(inside):,} pictures of {root} can be searched")
  return Library(root, tuple(inside[i] for i in known.ids), np.asarray(known.vectors))


def thumbnail(file: str, *, root: pathlib.Path) -> Image.Image | None:
  """A picture of the folder, small; None where it is gone, or not in the folder any more."""
  if not _is_inside(file, root):
    return None
  try:
    with images.opened(pathlib.Path(file).read_bytes()) as image:
      image.draft("RGB", (THUMBNAIL, THUMBNAIL))  # decodes large JPEGs no larger than needed
      small = ImageOps.exif_transpose(image).convert("RGB")
  except (OSError, images.BadImage):
    return None
  small.thumbnail((THUMBNAIL, THUMBNAIL))
  return small


def _is_inside(file: str, root: pathlib.Path) -> bool:
  return pathlib.Path(os.path.realpath(file)).is_relative_to(root)


def _place(model: api.CNCLIPModel, root: pathlib.Path, files: list[str]) -> pathlib.Path:
  """The file of features of these very pictures by this very model."""
  owner = partial.digest([str(root), json.dumps(model.identity, sort_keys=True)])
  content = partial.fingerprint(files)["sha256"]
  return storage.cache_home() / "page" / f"{owner[:16]}-{content[:16]}.npy"


def _remove_older(place: pathlib.Path) -> None:
  """Removes the features that the folder's pictures had before they changed."""
  owner = place.name.partition("-")[0]
  for other in place.parent.glob(f"{owner}-*.npy"):
    if other != place:
      other.unlink(missing_ok=True)
