"""What the original does to the pictures and texts of optical character recognition.

Lines are long: a picture keeps its aspect, the short side being at least 64 pixels, and is filled
up to a square with its own edge. Where it stands in the square is drawn, by the original in
evaluations too; here it stands in the middle of them. Documents are strips of four lines.
"""

import functools
import unicodedata

import numpy as np
from PIL import Image

LEAST_SIDE = 64
STRIPS, STRIP_HEIGHT, STRIP_WIDTH = 4, 64, 480

# Where MediaWiki's tables, which the original simplifies with, differ from those of OpenCC in what
# is often written: Chinese quotation marks, and forms in use in Taiwan and Japan.
_PAIRS = (
  "「“", "」”", "『‘", "』’", "妳你", "牠它", "姪侄", "砲炮", "粧妆", "籐藤", "鎗枪", "鑛矿",
  "暱昵", "痺痹", "効效", "勅敕", "氷冰", "麺面", "汚污", "讬托", "锺钟", "钜巨", "秊年", "搾榨",
)  # fmt: skip
_MORE = str.maketrans({a: b for a, b in _PAIRS})


def placed(image: Image.Image, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
  """Puts a picture into a square.

  Args:
    image: in RGB.
    size: side of the square in pixels, at least `LEAST_SIDE`.
    rng: draws the place; None: the middle.

  Returns:
    uint8[size, size, 3].
  """
  width, height = image.size
  if width >= height:
    shape = size, max(LEAST_SIDE, int(size * height / width))
  else:
    shape = max(LEAST_SIDE, int(size * width / height)), size
  return _filled(np.asarray(image.resize(shape, Image.Resampling.BICUBIC)), size, rng)


def placed_document(
  image: Image.Image, size: int, rng: np.random.Generator | None = None
) -> np.ndarray:
  """Puts a long line into a square of `STRIP_WIDTH` pixels, cut into four; as `placed`."""
  whole = (STRIPS * STRIP_WIDTH, STRIP_HEIGHT)
  line = np.asarray(image.resize(whole, Image.Resampling.BICUBIC))
  return _filled(np.concatenate(np.split(line, STRIPS, axis=1)), size, rng)


def learnt(text: str, *, chinese: bool, most: int) -> str:
  """Returns a text as it is learnt: simplified, compatible forms replaced, in lower case.

  Args:
    text: as it stands in the picture.
    chinese: whether characters count, and not words.
    most: characters or words that are kept.
  """
  text = unicodedata.normalize("NFKC", simplified(text))
  return text[:most].lower() if chinese else " ".join(text.lower().split()[:most])


def simplified(text: str) -> str:
  """Returns a text with simplified Chinese characters.

  Raises:
    ImportError: OpenCC is not installed.
  """
  return _converter().convert(text).translate(_MORE)


def check() -> None:
  """Raises ValueError where OpenCC is not installed."""
  try:
    _converter()
  except ImportError as error:
    raise ValueError(str(error)) from error


@functools.cache
def _converter():
  try:
    from opencc import OpenCC
  except ImportError as error:
    raise ImportError(
      "Expected OpenCC, which simplifies Chinese characters for OCR, found no package opencc; "
      "install it: pip install opencc-python-reimplemented"
    ) from error
  return OpenCC("t2s")


def _filled(pixels: np.ndarray, size: int, rng: np.random.Generator | None) -> np.ndarray:
  """Pixels uint8[h, w, 3], of which one side is `size`, with their edges drawn out to a square."""
  frame = []
  for side in pixels.shape[:2]:
    room = size - side
    before = room // 2 if rng is None or not room else int(rng.integers(room + 1))
    frame.append((before, room - before))
  return np.pad(pixels, (*frame, (0, 0)), mode="edge")
