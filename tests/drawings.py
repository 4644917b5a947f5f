"""Curves and pages of pictures are drawn where that is tested; elsewhere one dot stands for them.

Drawing takes a third of the time of a small run.
"""

import contextlib
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import pytest
from PIL import Image

from ofa_jax import pictures, storage
from ofa_jax.engine import curves

_plot, _png = curves.plot, pictures._png


def _dot() -> bytes:
  file = io.BytesIO()
  Image.new("L", (1, 1)).save(file, "PNG")
  return file.getvalue()


def _plot_dot(rows: Sequence[Mapping[str, float]], path: str | os.PathLike) -> None:
  """As `curves.plot`."""
  if not curves.panels(rows):
    return
  if storage.in_bucket(path):
    storage.write_bytes(path, _dot())
  else:
    pathlib.Path(path).write_bytes(_dot())


@contextlib.contextmanager
def left_out() -> Iterator[None]:
  """Within, files have their names and kinds, and show nothing."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(curves, "plot", _plot_dot)
    patch.setattr(pictures, "_png", lambda *_: _dot())
    yield


@contextlib.contextmanager
def made() -> Iterator[None]:
  """Within `left_out`, they are drawn after all."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(curves, "plot", _plot)
    patch.setattr(pictures, "_png", _png)
    yield
