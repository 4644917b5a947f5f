import base64
import io
import re

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from ofa_jax import fonts, pictures

pytestmark = pytest.mark.usefixtures("drawn")
COLOURS = {name: tuple(bytes.fromhex(getattr(pictures, name)[1:])) for name in ("RIGHT", "WRONG")}


def picture(grey):
  return np.full((20, 30, 3), grey, np.uint8)


def opened(page):
  image = Image.open(io.BytesIO(page))
  assert image.format == "PNG"
  return np.asarray(image.convert("RGB"))


def captions(images, *texts, **options):
  return pictures.captions("x", images, *texts, **options)["x.png"]


def has(pixels, colour):
  return bool((np.abs(pixels.astype(int) - colour).max(-1) < 30).any())


def test_captions_are_green_where_right_and_red_where_wrong():
  expected = [["a dog", "one dog"], ["a cat"]]
  right = opened(captions([picture(9)] * 2, ["one dog", "a cat"], expected))
  wrong = opened(captions([picture(9)] * 2, ["a cat", ""], expected))
  half = opened(captions([picture(9)] * 2, ["a dog", "a cow"], expected))
  found = [[has(p, COLOURS[name]) for name in ("RIGHT", "WRONG")] for p in (right, wrong, half)]
  assert found == [[True, False], [False, True], [True, True]]


def test_a_page_has_every_picture_at_its_place():
  page = opened(captions([picture(40 + i) for i in range(5)], [""] * 5, [[""]] * 5, columns=2))
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
  page = opened(captions([picture(0)] * 7, texts, [texts] * 7))
  assert page.shape[1] < 1300  # nothing makes the page wider
  assert page.shape[0] < 5000


def test_retrieval_frames_the_right_pictures():
  images = [[picture(40), picture(80)], [picture(120)]]
  page = opened(
    pictures.retrieval("x", ["a dog", "中文"], images, [[False, True], [False]])["x.png"]
  )
  y, x = np.nonzero(np.abs(page.astype(int) - COLOURS["RIGHT"]).max(-1) < 5)
  inside = np.nonzero((page == 80).all(-1))
  assert x.min() < inside[1].min() < inside[1].max() < x.max()
  assert y.min() < inside[0].min() < inside[0].max() < y.max()
  other = np.nonzero((page == 40).all(-1))
  assert other[1].max() < x.min()


def test_boxes_are_drawn_on_the_picture():
  cell = pictures.Cell(
    image=np.full((60, 60, 3), 9, np.uint8), boxes=(((10, 20, 50, 40), pictures.RIGHT),)
  )
  page = opened(pictures.page("x", [[cell]])["x.png"])
  y, x = np.nonzero(np.abs(page.astype(int) - COLOURS["RIGHT"]).max(-1) < 5)
  inside_y, inside_x = np.nonzero((page == 9).all(-1))
  width, height = np.ptp(inside_x) + 1, np.ptp(inside_y) + 1
  np.testing.assert_allclose([np.ptp(x) / width, np.ptp(y) / height], [2 / 3, 1 / 3], atol=0.05)
  assert (
    has(pictures.with_boxes(cell.image, cell.boxes), COLOURS["RIGHT"]) and (cell.image == 9).all()
  )


def test_an_answer_that_is_wrong_has_the_right_one_below():
  right = pictures.answer(None, "what is it?", "a dog", "a dog", right=True)
  wrong = pictures.answer(None, "", "a cat", "a dog", right=False)
  assert right.lines == (("what is it?", "black"), ("a dog", pictures.RIGHT))
  assert wrong.lines == (("a cat", pictures.WRONG), ("a dog", pictures.PLAIN))


def test_a_page_of_nothing_is_refused():
  with pytest.raises(ValueError, match="found none"):
    captions([], [], [])


def font_file(path, characters):
  """A font in which each of these characters is a square."""
  pen = TTGlyphPen(None)
  pen.moveTo((50, 0))
  for corner in ((50, 700), (900, 700), (900, 0)):
    pen.lineTo(corner)
  pen.closePath()
  names = {ord(c): f"u{ord(c)}" for c in characters}
  order = [".notdef", *names.values()]
  builder = FontBuilder(1000, isTTF=True)
  builder.setupGlyphOrder(order)
  builder.setupCharacterMap(names)
  glyph = pen.glyph()
  builder.setupGlyf(dict.fromkeys(order, glyph))
  builder.setupHorizontalMetrics(dict.fromkeys(order, (1000, 50)))
  builder.setupHorizontalHeader(ascent=800, descent=-200)
  builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
  builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
  builder.setupPost()
  builder.save(path)


@pytest.fixture
def no_fonts(monkeypatch):
  """A machine without any but matplotlib's."""
  monkeypatch.delenv(fonts.VARIABLE, raising=False)
  monkeypatch.setattr(fonts, "_installed", tuple)
  pictures._tell_missing.cache_clear()


def test_texts_that_no_font_has_are_on_a_page_for_a_browser(no_fonts, caplog):
  draw = lambda: pictures.captions("page", [picture(9)], ["一只<猫>"], [["一只猫", "a cat"]])  # noqa: E731
  files, again = draw(), draw()
  assert files.keys() == again.keys() == {"page.png", "page.html"}
  text = files["page.html"].decode()
  assert '<p style="color:#cf222e">一只&lt;猫&gt;</p>' in text and '<meta charset="utf-8">' in text
  image = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", text)[1])
  assert (opened(image) == 9).all() and opened(image).shape == (20, 30, 3)
  assert len(caplog.records) == 1
  assert "the page page are in no font" in caplog.text and fonts.VARIABLE in caplog.text


def test_a_font_that_is_named_draws_them(no_fonts, tmp_path, monkeypatch):
  font_file(tmp_path / "f.ttf", "一只猫")
  rows = [[pictures.Cell(lines=(("一只猫一只猫", "black"),))]]
  before = opened(pictures.page("x", rows)["x.png"])
  monkeypatch.setenv(fonts.VARIABLE, str(tmp_path / "f.ttf"))
  files = pictures.page("x", rows)
  assert files.keys() == {"x.png"}
  black = lambda pixels: int((pixels < 50).all(-1).sum())  # noqa: E731
  assert black(opened(files["x.png"])) > 1.5 * black(before) > 0
  assert pictures.page("x", [[pictures.Cell(lines=(("一只猪", "black"),))]]).keys() == {
    "x.png",
    "x.html",
  }


def test_a_file_that_is_no_font_is_told_and_left_alone(no_fonts, tmp_path, monkeypatch, caplog):
  (tmp_path / "f.ttf").write_bytes(b"no font")
  monkeypatch.setenv(fonts.VARIABLE, str(tmp_path / "f.ttf"))
  assert "x.html" in pictures.page("x", [[pictures.Cell(lines=(("猫", "black"),))]])
  assert f"Expected a font in {tmp_path / 'f.ttf'}" in caplog.text
