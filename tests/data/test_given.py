"""Pictures as people hand them over."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from ofa_jax import api
from ofa_jax.data.given import picture
from ofa_jax.inference import inputs

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


class Tensor:
  """An array of another library."""

  def __init__(self, array):
    self._array = array

  def __array__(self, dtype=None, copy=None):
    if self._array is None:
      raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return self._array


def png(image):
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return file.getvalue()


@pytest.mark.parametrize(
  "given",
  [
    PIXELS,
    Image.fromarray(PIXELS),
    png(PIXELS),
    PIXELS.astype(np.int64),
    PIXELS.astype(np.float64),
    PIXELS / 255,
    (PIXELS / 255).astype(np.float32),
    (PIXELS / 255).astype(np.float16).astype(np.float32).clip(0, 1).astype(np.float64),
    PIXELS.transpose(2, 0, 1),
    Tensor(PIXELS),
    Tensor((PIXELS / 255).astype(np.float32).transpose(2, 0, 1)),
    PIXELS[:, ::-1][:, ::-1],
  ],
)
def test_one_picture_in_many_forms(given):
  # Half precision has 11 bits: a picture out of it may be off by one.
  difference = np.abs(np.asarray(picture(given).convert("RGB"), int) - PIXELS).max()
  assert difference <= 1
  assert api.preprocess(given, size=16).shape == (16, 16, 3)


def test_files_by_path(tmp_path):
  for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
    (tmp_path / "a.png").write_bytes(png(PIXELS))
    assert (np.asarray(picture(path)) == PIXELS).all()
  for kind, mode in (("tiff", "RGB"), ("avif", "RGB"), ("gif", "P"), ("png", "RGBA")):
    Image.fromarray(PIXELS).convert(mode).save(tmp_path / f"b.{kind}")
    assert api.preprocess(tmp_path / f"b.{kind}", size=8).shape == (8, 8, 3)


@pytest.mark.parametrize("shape", [(40, 30), (40, 30, 1), (1, 40, 30), (40, 30, 4), (4, 40, 30)])
def test_grey_and_alpha(shape):
  grey = picture(np.full(shape, 7, np.uint8)).convert("RGB")
  assert grey.size == (30, 40)
  assert (np.asarray(grey) == 7).all()


@pytest.mark.parametrize(
  ("given", "told"),
  [
    (None, "NoneType"),
    (7, "int"),
    ([[1, 2], [3, 4]], "list"),
    ({"image": 1}, "dict"),
    (np.zeros((2, 4, 4, 3), np.uint8), "one at a time"),
    (np.zeros((5, 6, 7), np.uint8), r"uint8\[5, 6, 7\]"),
    (np.zeros((0, 4, 3), np.uint8), r"uint8\[0, 4, 3\]"),
    (np.zeros(9, np.uint8), r"uint8\[9\]"),
    (np.zeros((4, 4, 3), bool), "bool"),
    (np.zeros((4, 4, 3), complex), "complex"),
    (np.array([["a"] * 4] * 4), "<U1"),
    (np.full((4, 4, 3), 256, np.int32), "from 256 to 256"),
    (np.full((4, 4, 3), 65535, np.uint16), "from 65535"),
    (np.full((4, 4, 3), -0.5, np.float32), "from -0.5"),
    (np.full((4, 4, 3), np.nan), "from nan"),
    (np.full((4, 4, 3), 1.5), "from 1.5"),
    (Tensor(None), r"x\.detach\(\)\.float\(\)\.cpu\(\)"),
    ("absent.png", "absent.png"),
    ("https://x.org/a.png", "Download"),
    ("a\0b.png", r"a\\x00b"),
    (b"no picture", "these bytes"),
  ],
)
def test_what_is_no_picture_is_one_line(given, told):
  with pytest.raises(ValueError, match=told) as error:
    picture(given)
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", ["avif", "png", "jpeg", "webp", "tiff"])
def test_damaged_files_name_their_path(tmp_path, kind):
  file = io.BytesIO()
  Image.fromarray(PIXELS).save(file, kind)
  data = bytearray(file.getvalue())
  for damaged in (data[: len(data) // 2], data[:20], bytes(len(data)), b""):
    (tmp_path / f"x.{kind}").write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"Expected an image in .*x\.{kind}"):
      picture(tmp_path / f"x.{kind}")


def stack(*values, size=16):
  return inputs.image_stack(values, size)


def test_floats_from_0_to_1_are_pixels_unless_they_are_as_preprocessed():
  floats = (PIXELS / 255).astype(np.float32)
  assert stack(PIXELS).dtype == np.uint8
  assert (stack(floats) == stack(PIXELS)).all()
  assert (stack(floats, None)[1] == 0).all()
  ready = inputs.preprocess(Image.fromarray(PIXELS), size=16, colours=inputs.Colours())
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert (stack(ready) == ready).all()
  white = inputs.preprocess(np.full((4, 4, 3), 255, np.uint8), size=16, colours=inputs.Colours())
  with pytest.warns(UserWarning, match="give uint8 if these are pixels"):
    assert (stack(white) == 1).all()


def test_normalised_arrays_are_square_and_of_one_size():
  with pytest.raises(ValueError, match="images: number 1: Expected normalised arrays to be square"):
    stack(PIXELS, np.full((40, 30, 3), -1, np.float32))
  with pytest.raises(ValueError, match=r"number 0 \(2 of 3 are none\).*from nan"):
    stack(np.full((16, 16, 3), np.nan, np.float32), 7, PIXELS)
  with pytest.raises(ValueError, match="all of one size"):
    stack(np.full((16, 16, 3), -1, np.float32), np.full((8, 8, 3), -1, np.float32))
  with pytest.raises(ValueError, match="all of one size"):
    stack(np.full((16, 16, 3), -1, np.float32), PIXELS)


@pytest.mark.parametrize(
  ("texts", "told"),
  [
    (None, "found none"),
    ("what?", "one str"),
    ([None], "number 0 is NoneType"),
    (["a", float("nan")], "number 1 is float, nan"),
    ([["a"]], r"number 0 is list"),
    ({"a", "b"}, "found set"),
    ({"a": 1}, "found dict"),
    (7, "found int"),
    ([b"a"], "number 0 is bytes"),
    (["a", " "], "1 empty: numbers 1"),
  ],
)
def test_texts_that_are_none(texts, told):
  with pytest.raises(ValueError, match=told):
    inputs.check_texts("questions", texts)


def test_texts_of_any_sequence():
  for texts in (["a", "b"], ("a", "b"), np.array(["a", "b"]), iter(["a", "b"])):
    assert inputs.check_texts("questions", texts) == ["a", "b"]


@pytest.mark.parametrize(
  "objects", [["cat", "dog"], [["cat"]], [["cat"], [None]], [{"cat"}, ["a"]]]
)
def test_objects_are_a_list_of_names_for_each_image(objects):
  with pytest.raises(ValueError, match="objects"):
    inputs.joined("objects", objects, rows=2, by="&&")
  assert inputs.joined("objects", [["a", "b"], ["c"]], rows=2, by="&&") == ["a&&b", "c"]


@pytest.mark.parametrize(
  "ids",
  [[[0.5, 2.0]], [[1.0]], [[True]], [["1"]], [[None]], [[[1]]], [[2**40]], 7, {1}, [[-1]], [[9]]],
)
def test_ids_are_whole_numbers_of_the_vocabulary(ids):
  with pytest.raises(ValueError, match="ids"):
    inputs.token_array("ids", ids, rows=None, longest=8, vocab_size=9)


def test_ids_of_lists_and_arrays():
  for ids in ([[1, 2], [3]], [np.array([1, 2]), (3,)], np.array([[1, 2], [3, 1]], np.uint8)):
    tokens = inputs.token_array("ids", ids, rows=2, longest=8, vocab_size=9)
    assert tokens.tolist() == [[1, 2], [3, 1]]
    assert tokens.dtype == np.int32


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, None, "1"])
def test_seeds_that_would_be_another_are_told(seed):
  with pytest.raises(ValueError, match="Expected a seed from 0"):
    inputs.check_seed(seed)
  assert inputs.check_seed(np.int64(7)) == 7
