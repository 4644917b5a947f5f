"""What users hand to an OFA: checked, and made the arrays that it runs on."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from ofa_jax.data import images
from ofa_jax.tokenizers.special import EOS, PAD

Picture: TypeAlias = Image.Image | np.ndarray


class Colours(NamedTuple):
  """What is taken out of the pixels' colours, from 0 to 1: (red, green, blue) each."""

  mean: tuple[float, ...] = images.HALF_MEAN
  std: tuple[float, ...] = images.HALF_STD


def preprocess(image: Image.Image, *, size: int, colours: Colours) -> np.ndarray:
  """Resizes and normalises an image as the original does, float32[size, size, 3].

  It is converted to RGB, and the whole of it is squashed to a square.
  """
  return images.normalize(resized(image, size), **colours._asdict())


def resized(image: Picture, size: int) -> np.ndarray:
  """The pixels uint8[size, size, 3] of a Pillow image or of uint8[h, w, 3].

  Raises:
    ValueError: something else.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
      raise ValueError(f"Expected an image uint8[h, w, 3], found {image.dtype} {image.shape}")
    image = Image.fromarray(image)
  elif not isinstance(image, Image.Image):
    raise ValueError(f"Expected a Pillow image or an array, found {type(image).__name__}")
  return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def image_stack(pictures: Sequence[Picture | None], size: int) -> np.ndarray:
  """Images resized to uint8[N, size, size, 3], or float32[N, S, S, 3] as they are; None is black.

  Raises:
    ValueError: float32 images of several sizes, or mixed with others.
  """
  given = [x for x in pictures if x is not None]
  ready = [isinstance(x, np.ndarray) and x.dtype == np.float32 for x in given]
  if any(ready):
    shapes = sorted({np.shape(x) for x in given})
    if not all(ready) or len(shapes) > 1 or len(shapes[0]) != 3 or shapes[0][2] != 3:
      raise ValueError(
        "Expected Pillow images, arrays uint8[h, w, 3], or arrays float32[S, S, 3] all of one "
        f"size, found float32 among shapes {shapes}"
      )
    blank = np.zeros(shapes[0], np.float32)
    return np.stack([blank if x is None else x for x in pictures])
  blank = np.zeros((size, size, 3), np.uint8)
  return np.stack([blank if x is None else resized(x, size) for x in pictures])


def image_array(array: Any, *, rows: int) -> np.ndarray:
  """Checks images float32 or uint8 [rows, h, w, 3].

  Raises:
    ValueError: another shape or type.
  """
  array = np.asarray(array)
  right = array.ndim == 4 and array.shape[0] == rows and array.shape[3] == 3
  if not right or array.dtype not in (np.uint8, np.float32):
    raise ValueError(
      f"Expected images uint8 or float32 {(rows, 'h', 'w', 3)}, found {array.dtype} {array.shape}"
    )
  return array


def token_array(
  name: str, tokens: Any, *, rows: int | None, longest: int, vocab_size: int
) -> np.ndarray:
  """Makes ids int32[N, T] of such an array or of N lists, which are filled up with 1.

  Raises:
    ValueError: another shape or type, another N than `rows`, ids that are not in the vocabulary.
  """
  if not hasattr(tokens, "__array__"):
    lists = list(tokens)
    tokens = np.full((len(lists), max(map(len, lists), default=1)), PAD, np.int32)
    for row, ids in zip(tokens, lists, strict=True):
      row[: len(ids)] = ids
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or not 0 < tokens.shape[1] <= longest or tokens.dtype.kind not in "iu":
    raise ValueError(
      f"Expected {name} of a whole-number type ('N', 0 < T <= {longest}), "
      f"found {tokens.dtype} {tokens.shape}"
    )
  if rows is not None and len(tokens) != rows:
    raise ValueError(f"Expected {name} of {rows} inputs, found {len(tokens)}")
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
    raise ValueError(
      f"Expected ids 0 to {vocab_size - 1} in {name}, found {tokens.min()}, {tokens.max()}"
    )
  return tokens.astype(np.int32)


def mask(name: str, values: Any, *, rows: int) -> np.ndarray:
  """Checks a mask bool[rows].

  Raises:
    ValueError: another shape or type.
  """
  values = np.asarray(values)
  if values.shape != (rows,) or values.dtype != bool:
    raise ValueError(f"Expected {name} bool[{rows}], found {values.dtype} {values.shape}")
  return values


def as_list(name: str, values: Any) -> list:
  """Makes a list; ValueError for a single text or image, or none."""
  if values is None or isinstance(values, str | Image.Image):
    found = "none" if values is None else f"one {type(values).__name__}"
    raise ValueError(f"Expected a list of {name}, found {found}")
  return list(values)


def check_number(name: str, values: Sequence[Any], *, rows: int) -> None:
  """Raises ValueError for another number of values than of rows."""
  if len(values) != rows:
    raise ValueError(f"Expected {rows} {name}, found {len(values)}")


def check_pictures(pictures: Sequence[Picture | None], *, rows: int, needed: bool) -> None:
  """Raises ValueError for another number of images than of rows, or for missing ones if needed."""
  if len(pictures) != rows:
    raise ValueError(f"Expected {rows} images, one for each text, found {len(pictures)}")
  missing = [str(i) for i, picture in enumerate(pictures) if picture is None]
  if missing and needed:
    raise ValueError(
      f"Expected an image with each prompt, found {len(missing)} without: numbers "
      f"{', '.join(missing[:5])}"
    )


def check_texts(name: str, texts: Any, *, rows: int | None = None) -> None:
  """Checks that texts are a list of some length with words in each.

  Raises:
    ValueError: a single text, another number than `rows`, empty texts.
  """
  texts = as_list(name, texts)
  if rows is not None:
    check_number(name, texts, rows=rows)
  empty = [str(i) for i, text in enumerate(texts) if not text.strip()]
  if empty:
    raise ValueError(
      f"Expected {name} with words in them, found {len(empty)} empty: "
      f"numbers {', '.join(empty[:5])}"
    )


def decoder_prompt(source: np.ndarray) -> np.ndarray:
  """Source tokens int32[N, S] without the end, bos first, as what the decoder reads before it."""
  return np.where(source == EOS, PAD, source)[:, :-1]
