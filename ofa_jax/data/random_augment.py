"""OFA's own augmentation, its RandomAugment: of ten operations two, each in half of the cases.

The operations are those of OpenCV on 8-bit pixels, done here in NumPy to the same bytes, faults
included: the released models learnt with them. `AutoContrast` takes the smallest value out as an
unsigned byte, so that a channel without black becomes white throughout; `auto_contrast` with
`repaired` does what the name says. `Sharpness` runs over: what is beyond white begins at black.
"""

from collections.abc import Callable

import numpy as np

from ofa_jax.data.draws import Uniform

NAMES = (
  "Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness",
  "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
)  # fmt: skip
FILL = 128
GREATEST = 10  # level

_SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_LUMA = np.array([0.114, 0.587, 0.299])  # of blue, green and red; it is given red, green and blue


def random_augment(
  image: np.ndarray,
  rng: Uniform,
  *,
  num: int = 2,
  level: int = 7,
  repaired: bool = False,
  sparing: bool = False,
) -> np.ndarray:
  """Draws `num` operations of `NAMES`, one perhaps twice, and does each in half of the cases.

  Args:
    image: uint8[H, W, 3].
    rng: the example's own generator.
    num: operations.
    level: how strong they are, up to `GREATEST`.
    repaired: whether `AutoContrast` does what its name says.
    sparing: whether a sign is drawn for those operations alone that have one, as in the original;
      it matters where draws are to be the same.

  Returns:
    uint8[H, W, 3].
  """
  for place in rng.integers(len(NAMES), size=num):
    if rng.random() <= 0.5:
      name = NAMES[place]
      draw = 0.0 if sparing and name not in _SIGNED else rng.random()
      image = apply(name, image, *arguments(name, level, draw), repaired=repaired)
  return image


def arguments(name: str, level: int, draw: float) -> tuple[float, ...]:
  """What an operation is called with at a level; `draw`, from 0 to 1, decides its sign."""
  part = level / GREATEST
  if name in ("Brightness", "Sharpness", "Color", "Contrast"):
    return (part * 1.8 + 0.1,)
  if name in ("ShearX", "ShearY"):
    return (part * 0.3 * (-1 if draw > 0.5 else 1),)
  if name in ("TranslateX", "TranslateY"):
    return (part * 10 * (-1 if draw > 0.5 else 1),)
  if name == "Rotate":
    return (part * 30 * (-1 if draw < 0.5 else 1),)
  return {"Solarize": (int(part * 256),), "Posterize": (int(part * 4),)}.get(name, ())


def apply(name: str, image: np.ndarray, *args: float, repaired: bool = False) -> np.ndarray:
  """One operation by its name, uint8[H, W, 3] to the same; `repaired` as for `random_augment`."""
  if name == "AutoContrast":
    return auto_contrast(image, repaired=repaired)
  return OPERATIONS[name](image, *args)


def auto_contrast(image: np.ndarray, *, repaired: bool = False) -> np.ndarray:
  """Stretches each channel from black to white; see above for what happens unless `repaired`."""
  tables = []
  for channel in np.moveaxis(image, 2, 0):
    low, high = int(channel.min()), int(channel.max())
    table = np.arange(256, dtype=np.float64)
    if high > low:
      scale = 255 / (high - low)
      table = table * scale + (-low if repaired else -low % 256) * scale
    tables.append(table.clip(0, 255).astype(np.uint8))
  return _mapped(image, tables)


def equalize(image: np.ndarray) -> np.ndarray:
  """Spreads the values of each channel evenly."""
  tables = []
  for channel in np.moveaxis(image, 2, 0):
    counts = np.bincount(channel.ravel(), minlength=256)
    step = int(counts[counts > 0][:-1].sum()) // 255
    table = np.arange(256)
    if step:
      table = (np.cumsum([step // 2, *counts[:-1]]) // step).clip(0, 255)
    tables.append(table.astype(np.uint8))
  return _mapped(image, tables)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
  """Every value by a factor, cut at white."""
  return (np.arange(256, dtype=np.float32) * factor).clip(0, 255).astype(np.uint8)[image]


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
  """Every value's distance to the picture's mean grey by a factor."""
  mean = np.sum(np.mean(image, axis=(0, 1)) * _LUMA)
  table = (np.arange(256) - mean) * factor + mean
  return table.clip(0, 255).astype(np.uint8)[image]


def color(image: np.ndarray, factor: float) -> np.ndarray:
  """Every pixel's distance to its grey by a factor."""
  grey = np.repeat(np.float32(_LUMA)[:, None], 3, axis=1)
  mix = np.float32([[0.886, -0.114, -0.114], [-0.587, 0.413, -0.587], [-0.299, -0.299, 0.701]])
  mixed = np.matmul(image, mix * factor + grey)
  return mixed.clip(0, 255).astype(np.uint8)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
  """Inverts the values from a threshold on."""
  table = np.arange(256)
  return np.where(table < threshold, table, 255 - table).astype(np.uint8)[image]


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
  """Keeps the first bits of every value."""
  return image & np.uint8((255 << (8 - bits)) & 255)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
  """Away from a blurred picture; the outermost pixels stay, and what is beyond white runs over."""
  if factor == 1:
    return image
  height, width = image.shape[:2]
  whole, inside = image.astype(np.int32), np.s_[1:-1, 1:-1]
  total = 4 * whole[inside]
  for top in range(3):
    for left in range(3):
      total = total + whole[top : top + height - 2, left : left + width - 2]
  blurred = ((2 * total + 13) // 26).astype(np.float32)
  sharp = image.astype(np.float32)
  sharp[inside] = blurred + np.float32(factor) * (sharp[inside] - blurred)
  return (sharp.astype(np.int32) & 255).astype(np.uint8)


def shear_x(image: np.ndarray, factor: float) -> np.ndarray:
  """Moves lines sideways, the further down, the further."""
  return _warp(image, np.float32([[1, factor, 0], [0, 1, 0]]))


def shear_y(image: np.ndarray, factor: float) -> np.ndarray:
  """Moves columns down, the further right, the further."""
  return _warp(image, np.float32([[1, 0, 0], [factor, 1, 0]]))


def translate_x(image: np.ndarray, offset: float) -> np.ndarray:
  """Moves the picture to the left by pixels."""
  return _warp(image, np.float32([[1, 0, -offset], [0, 1, 0]]))


def translate_y(image: np.ndarray, offset: float) -> np.ndarray:
  """Moves the picture up by pixels."""
  return _warp(image, np.float32([[1, 0, 0], [0, 1, -offset]]))


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
  """Turns the picture about its middle, against the clock."""
  x, y = image.shape[1] / 2, image.shape[0] / 2
  cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  top = [cos, sin, (1 - cos) * x - sin * y]
  return _warp(image, np.array([top, [-sin, cos, sin * x + (1 - cos) * y]]))


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
  "Identity": lambda image: image,
  "AutoContrast": auto_contrast,
  "Equalize": equalize,
  "Brightness": brightness,
  "Contrast": contrast,
  "Color": color,
  "Solarize": solarize,
  "Posterize": posterize,
  "Sharpness": sharpness,
  "ShearX": shear_x,
  "ShearY": shear_y,
  "TranslateX": translate_x,
  "TranslateY": translate_y,
  "Rotate": rotate,
}

_BITS = 10  # of a place's fraction, of which the first five are used


def _warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Where each pixel goes by a matrix [2, 3]; what comes from outside is `FILL`.

  In whole numbers: a place has five bits behind the point, and the four pixels around it weights
  that sum to 2^10.
  """
  height, width = image.shape[:2]
  (a, b, c), (d, e, f) = np.asarray(matrix, np.float64)
  scale = 1 / (a * e - b * d)
  a, b, d, e = e * scale, -b * scale, -d * scale, a * scale
  c, f = -a * c - b * f, -d * c - e * f
  one, half = 1 << _BITS, 1 << (_BITS - 6)
  columns, lines = np.arange(width), np.arange(height)[:, None]
  xs = np.rint(a * columns * one) + np.rint((b * lines + c) * one) + half
  ys = np.rint(d * columns * one) + np.rint((e * lines + f) * one) + half
  xs, ys = (places.astype(np.int64) >> (_BITS - 5) for places in (xs, ys))
  right, low = (xs & 31).astype(np.int32)[..., None], (ys & 31).astype(np.int32)[..., None]
  # Two pixels of frame, so that places beyond it have four neighbours in it; a pixel is one number.
  framed = np.full((height + 4, width + 4, 4), FILL, np.uint8)
  framed[2:-2, 2:-2, :3] = image
  pixels, line = framed.view(np.uint32).ravel(), width + 4
  corner = ((ys >> 5).clip(-2, height) + 2) * line + (xs >> 5).clip(-2, width) + 2

  def at(places):
    return pixels[places].view(np.uint8).reshape(height, width, 4)[..., :3].astype(np.int32)

  upper = at(corner) * (32 - right) + at(corner + 1) * right
  lower = at(corner + line) * (32 - right) + at(corner + line + 1) * right
  return ((upper * (32 - low) + lower * low + 512) >> 10).astype(np.uint8)


def _mapped(image: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
  """Each channel by its own table uint8[256]."""
  return np.stack([table[image[..., i]] for i, table in enumerate(tables)], axis=2)
