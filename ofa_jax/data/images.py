"""Encoded image file -> uint8 RGB pixels, as the originals prepare them.

Both resize the whole image to a square with Pillow's antialiased bicubic filter, without keeping
the aspect ratio or applying EXIF rotation. OFA converts to RGB first (`rgb_first`). Chinese-CLIP
resizes *in the image's own mode* and converts afterwards: a palette image is therefore resized by
nearest neighbour, and alpha is premultiplied and then dropped. `decode(exact=True)` gives these
very bytes.

`decode(exact=False)` is for training: JPEG is decoded by libjpeg-turbo at the smallest n/8 of its
size that is not below the target, which skips most of the inverse transform. At 224 pixels from
500 x 375 that is 1.3 times as fast, and differs from the exact bytes by 0.4 % of the range in the
mean on photographs, 1.1 % on 1/f noise: about as much as another resampling filter does
(`benchmarks/input_pipeline.py` measures both).
"""

import contextlib
import io
from collections.abc import Iterator, Sequence

import numpy as np
import simplejpeg
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF_MEAN = HALF_STD = (0.5, 0.5, 0.5)  # OFA's
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 89_000_000  # where Pillow begins to warn of a decompression bomb


class BadImage(ValueError):  # noqa: N818 (a fault of the data, not of the program)
  """The bytes are not an image that may be decoded; the message says why."""


class TooLarge(BadImage):
  """The image has more than `MAX_PIXELS` pixels; `pixels` says how many."""

  def __init__(self, width: int, height: int):
    super().__init__(f"{width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
    self.pixels = width * height


def decode(encoded: bytes, *, size: int, exact: bool = True, rgb_first: bool = False) -> np.ndarray:
  """Decodes an image file and resizes it to a square.

  Args:
    encoded: the bytes of a JPEG, PNG, WebP, GIF or BMP file.
    size: side of the result in pixels.
    exact: True gives the original's bytes; False is faster for JPEG and differs a little.
    rgb_first: whether to convert to RGB before resizing, as OFA does; else after, as Chinese-CLIP.

  Returns:
    uint8[size, size, 3], RGB.

  Raises:
    BadImage: another format, truncated or damaged, or more than `MAX_PIXELS` pixels (found in the
      header, before anything is decoded).
  """
  if not exact and encoded[:2] == b"\xff\xd8":
    image = _decode_jpeg(encoded, size)
    if image is not None:
      return image
  with opened(encoded) as image:
    picture = image.convert("RGB") if rgb_first else image
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))


def decode_cropped(encoded: bytes, *, size: int) -> np.ndarray:
  """Decodes an image file as OpenAI's CLIP wants it: uint8[size, size, 3], see `cropped`.

  Raises BadImage as `decode`.
  """
  with opened(encoded) as image:
    return cropped(image, size=size)


def cropped(image: Image.Image, *, size: int) -> np.ndarray:
  """A picture's shorter side made `size`, the middle cut out, and only then made RGB.

  As OpenAI's CLIP does it: the longer side is cut to whole pixels, half a pixel of the crop goes to
  the even side, and the picture is resized in its own mode, which is by nearest neighbour for a
  palette.

  Args:
    image: in any mode.
    size: side of the result in pixels.

  Returns:
    uint8[size, size, 3].

  Raises:
    BadImage: so long and narrow a picture that it would become far too large.
  """
  short, long = sorted(image.size)
  longer = int(size * long / short)
  _check_size(size, longer)
  resized = (size, longer) if image.width <= image.height else (longer, size)
  image = image.resize(resized, Image.Resampling.BICUBIC)
  left, top = (round((side - size) / 2) for side in resized)
  return np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))


def open_rgb(encoded: bytes) -> Image.Image:
  """The whole picture in RGB. Raises BadImage as `decode`."""
  with opened(encoded) as image:
    return image.convert("RGB")


def size(encoded: bytes) -> tuple[int, int]:
  """Width and height in pixels, out of the header alone. Raises BadImage as `decode`."""
  with opened(encoded) as image:
    return image.size


@contextlib.contextmanager
def opened(encoded: bytes, *, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
  """An image of which only the header is read yet; what goes wrong inside is BadImage."""
  try:
    with Image.open(io.BytesIO(encoded), formats=formats) as image:
      _check_size(*image.size)
      yield image
  except BadImage:
    raise
  except Image.UnidentifiedImageError:
    raise BadImage(f"not a {', '.join(formats)} file, or its header is damaged") from None
  except Exception as error:  # on hostile bytes decoders raise anything from OSError to IndexError
    raise BadImage(f"cannot be decoded: {error}") from error


def random_crop_flip(
  image: np.ndarray, rng: np.random.Generator, *, size: int, flip: bool = True
) -> np.ndarray:
  """Takes a random square out of a larger image, mirrored in half of the cases.

  Args:
    image: uint8[S, S, 3] with S >= size.
    rng: the example's own generator.
    size: side of the crop in pixels.
    flip: whether to mirror at random.

  Returns:
    uint8[size, size, 3].
  """
  top, left = rng.integers(0, image.shape[0] - size + 1, 2)
  crop = image[top : top + size, left : left + size]
  if not flip or rng.random() < 0.5:
    return crop
  # Reversing whole pixels is three times faster than reversing an axis of bytes.
  mirrored = crop.view("V3")[:, ::-1].copy()
  return mirrored.view(np.uint8)


def normalize(
  image: np.ndarray, *, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> np.ndarray:
  """uint8[..., 3] RGB -> float32[..., 3] with mean and standard deviation of each colour out."""
  pixels = image.astype(np.float32) / np.float32(255)
  return (pixels - np.float32(mean)) / np.float32(std)


def _decode_jpeg(encoded: bytes, size: int) -> np.ndarray | None:
  """Scaled decoding of grey and YCbCr JPEG; None leaves the verdict to Pillow."""
  try:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
    if colorspace not in ("YCbCr", "Gray"):
      return None
    _check_size(width, height)
    pixels = simplejpeg.decode_jpeg(
      encoded, min_height=min(size, height), min_width=min(size, width)
    )
  except BadImage:
    raise
  except ValueError:
    return None
  # The scaled picture is n/8 of the original, rounded up to whole pixels. The box leaves out the
  # fraction that rounding added: without it everything shifts by up to half a pixel, which costs
  # three times the deviation.
  for n in range(1, 9):
    if pixels.shape[:2] == (-(-height * n // 8), -(-width * n // 8)):
      box = (0, 0, width * n / 8, height * n / 8)
      small = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box)
      return np.asarray(small)
  return None


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise TooLarge(width, height)
