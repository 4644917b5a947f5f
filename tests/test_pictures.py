import io

import numpy as np
import pytest
from PIL import Image

from ofa_jax import pictures

COLOURS = {name: tuple(bytes.fromhex(getattr(pictures, name)[1:])) for name in ("RIGHT", "WRONG")}


def picture(grey):
  return np.full((20, 30, 3), grey, np.uint8)


def opened(page):
  image = Image.open(io.BytesIO(page))
  assert image.format == "PNG"
  return np.asarray(image.convert("RGB"))


def has(pixels, colour):
  return bool((np.abs(pixels.astype(int) - colour).max(-1) < 30).any())


def test_captions_are_green_where_right_and_red_where_wrong():
  expected = [["a dog", "one dog"], ["a cat"]]
  right = opened(pictures.captions([picture(9)] * 2, ["one dog", "a cat"], expected))
  wrong = opened(pictures.captions([picture(9)] * 2, ["a cat", ""], expected))
  half = opened(pictures.captions([picture(9)] * 2, ["a dog", "a cow"], expected))
  found = [[has(p, COLOURS[name]) for name in ("RIGHT", "WRONG")] for p in (right, wrong, half)]
  assert found == [[True, False], [False, True], [True, True]]


def test_a_page_has_every_picture_at_its_place():
  page = opened(
    pictures.captions([picture(40 + i) for i in range(5)], [""] * 5, [[""]] * 5, columns=2)
  )
  places = []
  for i in range(5):
    y, x = np.nonzero((page == 40 + i).all(-1))
    assert len(y) > 10_000
    places.append((y.mean(), x.mean()))
  rows, columns = np.array(places).T
  assert rows[0] == rows[1] < rows[2] == rows[3] < rows[4]
  assert columns[0] == columns[2] == columns[4] < columns[1] == columns[3]


def test_texts_may_hold_anything():
  texts = ["$x_{", "\\frac", "中文" * 40, "a\tb\n\x00c", "word " * 100, "x" * 500, "😀"]
  page = opened(pictures.captions([picture(0)] * 7, texts, [texts] * 7))
  assert page.shape[1] < 1300  # nothing makes the page wider
  assert page.shape[0] < 5000


def test_retrieval_frames_the_right_pictures():
  images = [[picture(40), picture(80)], [picture(120)]]
  page = opened(pictures.retrieval(["a dog", "中文"], images, [[False, True], [False]]))
  y, x = np.nonzero(np.abs(page.astype(int) - COLOURS["RIGHT"]).max(-1) < 5)
  inside = np.nonzero((page == 80).all(-1))
  assert x.min() < inside[1].min() < inside[1].max() < x.max()
  assert y.min() < inside[0].min() < inside[0].max() < y.max()
  other = np.nonzero((page == 40).all(-1))
  assert other[1].max() < x.min()


def test_a_page_of_nothing_is_refused():
  with pytest.raises(ValueError, match="found none"):
    pictures.captions([], [], [])
