"""Faults of a person are told in a sentence of their language, whatever they gave."""

import dataclasses
import io
import string

import numpy as np
import pytest
from PIL import Image

from ofa_jax.data import images
from ofa_jax.page import given
from ofa_jax.page.words import CHINESE, ENGLISH, LANGUAGES

EACH = pytest.mark.parametrize("words", LANGUAGES.values(), ids=list(LANGUAGES))


def fields(text):
  return [(name, kind) for _, name, kind, _ in string.Formatter().parse(text) if name is not None]


def test_both_languages_say_the_same_things():
  for field in dataclasses.fields(ENGLISH):
    english, chinese = getattr(ENGLISH, field.name), getattr(CHINESE, field.name)
    assert english.strip() and chinese.strip() and fields(english) == fields(chinese), field.name
    translated = any("\u4e00" <= letter <= "\u9fff" for letter in chinese)
    assert translated or field.name == "code" or field.name.endswith("_example"), field.name
  assert ENGLISH.entailments.keys() == CHINESE.entailments.keys()


@EACH
def test_pictures_that_will_not_do(words, tmp_path, monkeypatch):
  with pytest.raises(given.Fault) as raised:
    given.picture(None, words=words)
  assert str(raised.value) == words.no_picture
  for name, content in (("text.png", b"no picture"), ("empty.png", b"")):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(given.Fault) as raised:
      given.picture(tmp_path / name, words=words)
    assert str(raised.value) == words.bad_picture
  file = io.BytesIO()
  Image.new("RGB", (40, 30)).save(file, "PNG")
  (tmp_path / "cut.png").write_bytes(file.getvalue()[:50])
  (tmp_path / "whole.png").write_bytes(file.getvalue())
  for name in ("cut.png", "gone.png"):
    with pytest.raises(given.Fault, match=words.bad_picture):
      given.picture(tmp_path / name, words=words)
  assert given.picture(tmp_path / "whole.png", words=words).size == (40, 30)
  monkeypatch.setattr(images, "MAX_PIXELS", 1000)
  with pytest.raises(given.Fault) as raised:
    given.picture(tmp_path / "whole.png", words=words)
  assert str(raised.value) == words.too_large.format(1200, 1000)


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
  pixels = np.zeros((8, 16, 3), np.uint8)
  pixels[:, :8] = 255
  turned = Image.Exif()
  turned[274] = 6  # the camera was held upright
  Image.fromarray(pixels).save(tmp_path / "x.png", exif=turned)
  found = np.asarray(given.picture(tmp_path / "x.png", words=ENGLISH))
  assert found.shape == (16, 8, 3) and (found[:8] == 255).all() and (found[8:] == 0).all()


@EACH
def test_texts(words):
  assert given.text("  a dog ", called="Phrase", words=words) == "a dog"
  assert given.perhaps(" ", called="Phrase", words=words) is None
  assert given.perhaps(" x ", called="Phrase", words=words) == "x"
  assert given.lines("b\n\n a \nb\n", called="Classes", words=words) == ["b", "a"]
  long = "x" * (given.MAX_LETTERS + 1)
  for call, said in (
    (lambda: given.text("", called="Phrase", words=words), words.no_text.format("Phrase")),
    (lambda: given.text(None, called="Phrase", words=words), words.no_text.format("Phrase")),
    (lambda: given.lines(" \n", called="Classes", words=words), words.no_lines.format("Classes")),
    (
      lambda: given.text(long, called="Phrase", words=words),
      words.too_long.format("Phrase", given.MAX_LETTERS, len(long)),
    ),
  ):
    with pytest.raises(given.Fault) as raised:
      call()
    assert str(raised.value) == said
