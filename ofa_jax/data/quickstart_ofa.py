"""A small captioning data set, drawn on the spot: coloured shapes, how many, and where.

Nobody took these pictures: they are generated, all of one seed. The files are in OFA's formats, so
that what reads them reads any other data set:

  {train,train_all,valid}.tsv  unique id, image id, captions, objects, url-safe base64 of a PNG
  tokenizer/                   a small byte-level BPE of its own, learnt from the captions

A picture shows two to four equal shapes ("three red dots"), one in a corner ("a red dot at the top
left"), or two different ones ("a red dot and a blue bar"). Each can be said in two ways: a row of
`train` has one of them, of `train_all` (the same pictures, to learn from rewards) and of `valid`
both, "&&" between. The held-out pictures show the same scenes;
their sizes and places are drawn anew.
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

VERSION = 4  # a part of the folder's name: raise it with every change of what is written
SIZE = 64  # pixels
COLOURS = {
  "red": (220, 30, 30),
  "green": (30, 160, 60),
  "blue": (40, 70, 220),
  "yellow": (240, 200, 20),
  "purple": (150, 40, 180),
  "black": (20, 20, 20),
}
SHAPES = {"square": "squares", "dot": "dots", "bar": "bars"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
CORNERS = ("top left", "top right", "bottom left", "bottom right")

_GRID = 2  # shapes stand in the cells of a grid, so that none hides another
_FINER = 4  # drawn so many times larger, for smooth edges
_PICTURES = {"train": 6000, "valid": 400}
_VOCABULARY = 400


@dataclasses.dataclass(frozen=True)
class Scene:
  """What a picture shows: some of one thing, one in a corner, or one each of two.

  Attributes:
    things: (colour, shape) of one thing, or of two.
    count: how many of one thing.
    corner: of one thing that is alone, its place in `CORNERS`.
  """

  things: tuple[tuple[str, str], ...]
  count: int = 1
  corner: int | None = None

  @property
  def captions(self) -> tuple[str, str]:
    """The two ways to say it."""
    if len(self.things) == 2:
      first, second = (f"a {colour} {shape}" for colour, shape in self.things)
      return f"{first} and {second}", f"{second} and {first}"
    ((colour, shape),) = self.things
    if self.corner is not None:
      thing = f"a {colour} {shape} at the {CORNERS[self.corner]}"
      return thing, f"there is {thing}"
    thing = f"{NUMBERS[self.count]} {colour} {SHAPES[shape]}"
    return thing, f"there are {thing}"


def shapes(directory: str | os.PathLike) -> pathlib.Path:
  """Returns the folder of the data set under `directory`, making it if it is not there."""
  return make_once(directory, f"shapes-v{VERSION}", _write)


def scenes() -> tuple[list[Scene], list[Scene], list[Scene]]:
  """All scenes of several equal things, of one in a corner, and of two."""
  things = list(itertools.product(COLOURS, SHAPES))
  several = [Scene((thing,), count) for thing in things for count in NUMBERS]
  alone = [Scene((thing,), corner=corner) for thing in things for corner in range(len(CORNERS))]
  return several, alone, [Scene(pair) for pair in itertools.combinations(things, 2)]


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
  """A picture of a scene; sizes and places vary."""
  image = Image.new("RGB", (SIZE * _FINER, SIZE * _FINER), (int(rng.integers(225, 256)),) * 3)
  pen = ImageDraw.Draw(image)
  for (row, column), (colour, shape) in zip(
    _cells(scene, rng), scene.things * scene.count, strict=True
  ):
    radius = rng.uniform(11, 14.5)
    room = SIZE / _GRID / 2 - radius - 0.5
    x = (column + 0.5) * SIZE / _GRID + rng.uniform(-room, room)
    y = (row + 0.5) * SIZE / _GRID + rng.uniform(-room, room)
    _draw_shape(pen, shape, x * _FINER, y * _FINER, radius * _FINER, COLOURS[colour])
  return image.reduce(_FINER)


def _cells(scene: Scene, rng: np.random.Generator) -> list[tuple[int, int]]:
  """Row and column of each shape."""
  if scene.corner is not None:
    return [divmod(scene.corner, _GRID)]
  chosen = rng.choice(_GRID * _GRID, max(scene.count, len(scene.things)), replace=False)
  return [divmod(int(cell), _GRID) for cell in chosen]


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour) -> None:
  match shape:
    case "square":
      side = 0.9 * r
      pen.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    case "dot":
      pen.ellipse((x - 0.5 * r, y - 0.5 * r, x + 0.5 * r, y + 0.5 * r), fill=colour)
    case "bar":
      pen.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill=colour)


def _write(path: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  path.mkdir()
  captions = [prompts.caption()]
  for split, count in _PICTURES.items():
    # All kinds come equally often, and all scenes of a kind.
    kinds = [[kind[i] for i in rng.permutation(len(kind))] for kind in scenes()]
    rows, whole = [], []
    for i in range(count):
      number, kind = divmod(i, len(kinds))
      scene = kinds[kind][number % len(kinds[kind])]
      said = scene.captions if split == "valid" else (scene.captions[rng.integers(2)],)
      captions += [f" {caption}" for caption in said]
      rows.append(_row(f"{split}{i}", scene, said, draw(scene, rng)))
      name, picture, _, *rest = rows[-1].split("\t")
      whole.append("\t".join((name, picture, REFERENCES.join(scene.captions), *rest)))
    write_lines(path / f"{split}.tsv", rows)
    if split == "train":
      write_lines(path / "train_all.tsv", whole)
  OFATokenizer.train(captions, vocab_size=_VOCABULARY).save(path / "tokenizer")


def _row(name: str, scene: Scene, captions: Sequence[str], image: Image.Image) -> str:
  file = io.BytesIO()
  image.save(file, "PNG")
  objects = REFERENCES.join(f"{colour} {shape}" for colour, shape in scene.things)
  encoded = base64.urlsafe_b64encode(file.getvalue()).decode()
  return "\t".join((name, f"{name}.png", REFERENCES.join(captions), objects, encoded))
