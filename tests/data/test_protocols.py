"""Every reader of the package is what the rest of it takes readers for."""

import numpy as np
import pytest

from ofa_jax.data import pairs, tsv
from ofa_jax.data.folder import ImageFiles
from ofa_jax.data.lmdb import LmdbImages
from ofa_jax.data.protocols import Images, Rows
from ofa_jax.data.tar import TarImages
from ofa_jax.data.tfds import TfdsRows
from tests import tiny


def members(protocol):
  """Names that the classes of a protocol must have, but for what every class has."""
  return {
    name
    for part in protocol.__mro__
    for name in (*vars(part), *getattr(part, "__annotations__", ()))
    if not name.startswith("_") or name == "__len__"
  }


def test_rows_of_every_task(digits, shapes):
  contrastive = tiny.config(digits, evals=True)
  caption = tiny.caption_config(shapes, evals=True)
  opened = [config.task.examples("train") for config in (contrastive, caption)]
  evals = [*contrastive.evals, *caption.evals]
  opened += [rows for e in evals for rows in e.task.streams(e.split).values()]
  assert len(opened) == 2 + 2 + 2 + 1
  for rows in opened:
    assert isinstance(rows, Rows), type(rows)
    blank, example = rows.blank(), rows.example(0, None)
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {
      k: (v.shape, v.dtype) for k, v in example.items()
    }
    assert all(isinstance(note, str) for note in rows.notes)
    rows.close()


def test_members_that_are_missed_are_seen():
  assert members(Rows) == {"__len__", "example", "blank", "close", "notes"}
  assert not isinstance(ImageFiles(()), Rows) and isinstance(ImageFiles(()), Images)


@pytest.mark.parametrize("form", [tsv.ImageTable, ImageFiles, LmdbImages, TarImages])
def test_images_of_every_form(form):
  # `files` of all is set by their constructors.
  assert members(Images) - {"files"} <= set(dir(form)), form


def test_images_are_found_by_their_ids(digits):
  images = pairs.PairData.of(digits, "train").load_images()
  assert isinstance(images, Images) and images.files
  np.testing.assert_array_equal(images.find([images.ids[3], "none"]), [3, -1])
  assert images.encoded(3) and images.name(3)


def test_public_data_sets_are_rows_too():
  assert members(Rows) - {"notes"} <= set(dir(TfdsRows))
