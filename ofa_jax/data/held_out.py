"""Pictures that a run keeps back for its evaluations, where a person has given data to train only.

Which ones is a function of their ids: the same in every run and on every host, without a file.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from ofa_jax import storage
from ofa_jax.data.protocols import Images
from ofa_jax.data.tsv import Texts


def choose(ids: Sequence[str], share: float) -> np.ndarray:
  """Which of the ids are held out: bool[N], round(share * N) of them and at least one.

  They are those whose hashes are lowest. Of paths only what lies below their common folder counts,
  so that a data set that was moved is divided as before.

  Args:
    ids: of the pictures; equal ones fall to the same side.
    share: of the different ids, between 0 and 1.

  Raises:
    ValueError: there are not two different ids.
  """
  names = sorted(set(ids))
  if len(names) < 2:
    raise ValueError(
      f"Expected at least 2 pictures to hold some of them out for the evaluations, found "
      f"{len(names)}. Give data to evaluate on in task.valid."
    )
  begin = 0
  if all(map(os.path.isabs, names)):
    begin = len(os.path.commonpath(names))
  elif all(map(storage.in_bucket, names)):  # the pictures that a local copy would hold out
    begin = 5 + len(os.path.commonpath([name[5:] for name in names]))
  ranked = sorted(names, key=lambda name: hashlib.sha256(name[begin:].encode()).digest())
  chosen = set(ranked[: min(max(1, round(share * len(names))), len(names) - 1)])
  return np.array([name in chosen for name in ids], bool)


class SomeImages:
  """Some of the images of a data set, in their order.

  Args:
    images: all of them.
    rows: the numbers of those that are left.
  """

  def __init__(self, images: Images, rows: Sequence[int]):
    self.files = images.files
    self._images, self._rows = images, np.asarray(rows)
    self._ids = images.ids

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def ids(self) -> list[str]:
    """The id of every image, in order."""
    return [self._ids[i] for i in self._rows]

  def find(self, ids: Sequence[str]) -> np.ndarray:
    """The number of each id: int64[N], -1 where there is no such image."""
    place = np.full(len(self._images) + 1, -1, np.int64)  # of -1 at the end
    place[self._rows] = np.arange(len(self._rows))
    return place[self._images.find(ids)]

  def name(self, i: int) -> str:
    """Where image `i` is, for messages."""
    return self._images.name(int(self._rows[i]))

  def encoded(self, i: int) -> bytes:
    """The bytes of image file `i`. Raises BadRow when they cannot be had."""
    return self._images.encoded(int(self._rows[i]))


def divide(
  images: Images, texts: Texts, *, share: float, held_out: bool
) -> tuple[SomeImages, Texts]:
  """One side of a data set that is divided by its pictures.

  Args:
    images, texts: the whole.
    share: of the pictures that are held out.
    held_out: those that are, or the others.

  Returns:
    The pictures of this side and the captions that any of them has.
  """
  ids = images.ids
  chosen = choose(ids, share)
  side = SomeImages(images, np.flatnonzero(chosen == held_out))
  mine = set(side.ids)
  unknown = set().union(*texts.image_ids) - set(ids)  # are told when the edges are looked for
  groups = [tuple(i for i in group if i in mine or i in unknown) for group in texts.image_ids]
  left = [i for i, group in enumerate(groups) if group or not texts.image_ids[i]]
  notes = texts.notes
  if held_out:
    notes = (
      *notes,
      f"Held out {len(side):,} of {len(ids):,} pictures for the evaluations, as task.valid is not "
      "given; they are the same in every run",
    )
  return side, dataclasses.replace(
    texts,
    text_ids=[texts.text_ids[i] for i in left],
    texts=[texts.texts[i] for i in left],
    image_ids=[groups[i] for i in left],
    places=texts.places[left],
    notes=notes,
  )
