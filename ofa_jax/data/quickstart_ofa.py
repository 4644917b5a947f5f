"""A small captioning data set, drawn on the spot: coloured shapes, how many, and where.

Nobody took these pictures: they are generated, all of one seed. The files are in OFA's formats, so
that what reads them reads any other data set:

  {train,valid}.tsv  unique id, image id, captions, objects, url-safe base64 of a PNG
  tokenizer/         a small byte-level BPE of its own, learnt from the captions

A picture shows one to four equal shapes ("three red circles") or two different ones ("a red circle
left of a blue square"). Each can be said in two ways: a training row has one of them, a held-out
row both, "&&" between. Held out are combinations: no training picture shows that many of that shape
in that colour, or those two shapes in those places.
"""

import base64
import dataclasses
import io
import itertools
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ofa_jax.data import prompts
from ofa_jax.data.quickstart import make_once, write_lines
from ofa_jax.data.text import REFERENCES
from ofa_jax.tokenizers.ofa import OFATokenizer

VERSION = 2  # a part of the folder's name: raise it with every change of what is written
SIZE = 48  # pixels
COLOURS = {
  "red": (220, 30, 30),
  "green": (30, 160, 60),
  "blue": (40, 70, 220),
  "yellow": (240, 200, 20),
  "purple": (150, 40, 180),
  "black": (20, 20, 20),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBERS = ("a", "two", "three", "four")

_GRID = 2  # shapes stand in the cells of a grid, so that none hides another
_FINER = 4  # drawn so many times larger, for smooth edges
_PICTURES = {"train": 6000, "valid": 400}
_HELD_OUT = 6  # one of so many combinations
_VOCABULARY = 400


@dataclasses.dataclass(frozen=True)
class Scene:
  """What a picture shows: some of one thing, or one each of two.

  Attributes:
    things: (colour, shape) of one thing, or of two, the left or upper one first.
    count: how many of one thing.
    beside: of two things, whether they stand side by side; else one stands above the other.
  """

  things: tuple[tuple[str, str], ...]
  count: int = 1
  beside: bool = False

  @property
  def captions(self) -> tuple[str, str]:
    """The two ways to say it."""
    if len(self.things) == 2:
      first, second = (f"a {colour} {shape}" for colour, shape in self.things)
      if self.beside:
        return f"{first} left of {second}", f"{second} right of {first}"
      return f"{first} above {second}", f"{second} below {first}"
    ((colour, shape),) = self.things
    if self.count > 1:
      shape = SHAPES[shape]
    thing = f"{NUMBERS[self.count - 1]} {colour} {shape}"
    return thing, f"there {'is' if self.count == 1 else 'are'} {thing}"


def shapes(directory: str | os.PathLike) -> pathlib.Path:
  """Returns the folder of the data set under `directory`, making it if it is not there."""
  return make_once(directory, f"shapes-v{VERSION}", _write)


def scenes() -> tuple[list[Scene], list[Scene]]:
  """All scenes of one thing, and all of two."""
  things = list(itertools.product(COLOURS, SHAPES))
  single = [Scene((thing,), count + 1) for thing in things for count in range(len(NUMBERS))]
  double = [
    Scene(pair, beside=beside)
    for pair in itertools.permutations(things, 2)
    for beside in (True, False)
  ]
  return single, double


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
  """A picture of a scene; sizes and places vary."""
  image = Image.new("RGB", (SIZE * _FINER, SIZE * _FINER), (int(rng.integers(225, 256)),) * 3)
  pen = ImageDraw.Draw(image)
  for (row, column), (colour, shape) in zip(
    _cells(scene, rng), scene.things * scene.count, strict=True
  ):
    radius = rng.uniform(7.5, 10.5)
    room = SIZE / _GRID / 2 - radius - 0.5
    x = (column + 0.5) * SIZE / _GRID + rng.uniform(-room, room)
    y = (row + 0.5) * SIZE / _GRID + rng.uniform(-room, room)
    _draw_shape(pen, shape, x * _FINER, y * _FINER, radius * _FINER, COLOURS[colour])
  return image.reduce(_FINER)


def _cells(scene: Scene, rng: np.random.Generator) -> list[tuple[int, int]]:
  """Row and column of each shape; of two things, in one row or in one column."""
  if len(scene.things) == 1:
    chosen = rng.choice(_GRID * _GRID, scene.count, replace=False)
    return [divmod(int(cell), _GRID) for cell in chosen]
  line = int(rng.integers(_GRID))
  first, second = sorted(rng.choice(_GRID, 2, replace=False).tolist())
  return [(line, first), (line, second)] if scene.beside else [(first, line), (second, line)]


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour) -> None:
  match shape:
    case "circle":
      pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    case "square":
      side = 0.85 * r
      pen.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    case "triangle":
      pen.polygon(((x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)), fill=colour)
    case "cross":
      pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=colour)
      pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=colour)


def _write(path: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  kinds = [_split(kind, rng) for kind in scenes()]
  path.mkdir()
  captions = [prompts.caption()]
  for part, (split, count) in enumerate(_PICTURES.items()):
    rows = []
    for i in range(count):
      # Half of the pictures show one thing. All scenes of a kind come equally often.
      chosen = kinds[i % 2][part]
      scene = chosen[i // 2 % len(chosen)]
      said = scene.captions if split == "valid" else (scene.captions[rng.integers(2)],)
      captions += [f" {caption}" for caption in said]
      rows.append(_row(f"{split}{i}", scene, said, draw(scene, rng)))
    write_lines(path / f"{split}.tsv", rows)
  OFATokenizer.train(captions, vocab_size=_VOCABULARY).save(path / "tokenizer")


def _split(kind: Sequence[Scene], rng: np.random.Generator) -> tuple[list[Scene], list[Scene]]:
  """Scenes for training and held-out ones, in random order."""
  order = [kind[i] for i in rng.permutation(len(kind))]
  held_out = len(order) // _HELD_OUT
  return order[held_out:], order[:held_out]


def _row(name: str, scene: Scene, captions: Sequence[str], image: Image.Image) -> str:
  file = io.BytesIO()
  image.save(file, "PNG")
  objects = REFERENCES.join(f"{colour} {shape}" for colour, shape in scene.things)
  encoded = base64.urlsafe_b64encode(file.getvalue()).decode()
  return "\t".join((name, f"{name}.png", REFERENCES.join(captions), objects, encoded))
