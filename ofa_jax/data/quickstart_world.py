"""A small world for every task of OFA at once: drawn pictures of two things, and real digits.

The pictures are generated, all of one seed, and drawn once for all tasks; scikit-learn's scanned
digits are beside them. The files are in OFA's formats:

  {caption,vqa,refcoco,snli_ve}_{train,valid,novel}.tsv   a row has a picture as base64 PNG; those
                                 of "train" have several questions, regions and texts
  digits_{train,valid}.tsv       image, number, word: the digits of `data/quickstart.py`
  infilling_{train,valid}.tsv    id, text: sentences that say a thing twice, the other way round
  answers.txt, digits.txt        the answers to choose from, the names of the digits
  tokenizer/                     a small byte-level BPE of its own, with coordinates

A picture shows one or two things, of a colour and a shape, in the corners of a square ("a red dot
top left and a blue bar bottom right"). The held-out pictures "valid" are new ones of scenes like
those of "train". In "novel" each has, and is asked about, a thing of a colour, a shape and a place
that no other split has together (`is_novel`), each of which they have in every pair.
"""

import base64
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ofa_jax.data import prompts, quickstart
from ofa_jax.data.quickstart import make_once, write_lines
from ofa_jax.data.quickstart_ofa import COLOURS, CORNERS, SHAPES
from ofa_jax.data.text import REFERENCES
from ofa_jax.scoring.vqa import CONFIDENCE
from ofa_jax.tokenizers.ofa import OFATokenizer

VERSION = 3  # a part of the folder's name: raise it with every change of what is written
SIZE = 64  # pixels
PICTURES = {"train": 16_000, "valid": 500, "novel": 500}
ROWS = {"vqa": 4, "refcoco": 2, "snli_ve": 2}  # of a picture to train on; else it has one a task
SENTENCES = {"train": 8000, "valid": 250}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_BINS = 512
TASKS = ("caption", "vqa", "refcoco", "snli_ve")

_FINER = 4  # drawn so many times larger, for smooth edges
_VOCABULARY = 1024
_UNSEEN = ("new", "old", "cheap", "heavy", "soft", "cold")  # what no picture tells
# Ways to tell of a thing, from easy to hard.
_FORMS = (
  ("colour", "thing"),
  ("shape",),
  ("colour", "shape"),
  ("colour", "thing", "place"),
  ("shape", "place"),
  ("colour", "shape", "place"),
)
_SIDES = (("left of", "right of"), ("above", "below"))


@dataclasses.dataclass(frozen=True)
class Thing:
  """A shape of a colour in a corner, `CORNERS[place]`."""

  colour: str
  shape: str
  place: int

  @property
  def name(self) -> str:
    return f"{self.colour} {self.shape}"

  @property
  def where(self) -> str:
    return CORNERS[self.place]


def is_novel(thing: Thing) -> bool:
  """Whether only "novel" has things like this: one in six, of each colour, shape and place some."""
  colour, shape = list(COLOURS).index(thing.colour), list(SHAPES).index(thing.shape)
  return (colour + shape) % 3 != 0 and thing.place == (colour + 3 * shape) % len(CORNERS)


def things() -> list[Thing]:
  """All there are."""
  return [Thing(*each) for each in itertools.product(COLOURS, SHAPES, range(len(CORNERS)))]


def scene(rng: np.random.Generator, *, novel: bool) -> tuple[Thing, ...]:
  """One or two things at different places, differing in colour or shape, by place.

  Args:
    rng: draws them.
    novel: whether the first drawn is of those that no other split has; else none is.
  """
  known, unknown = ([t for t in things() if is_novel(t) == kind] for kind in (False, True))
  first = _one(unknown if novel else known, rng)
  if rng.random() < 0.25:
    return (first,)
  others = [t for t in known if t.place != first.place and t.name != first.name]
  return tuple(sorted((first, _one(others, rng)), key=lambda thing: thing.place))


def caption(scene: Sequence[Thing]) -> str:
  """What a picture shows, by place."""
  return " and ".join(f"a {thing.name} {thing.where}" for thing in scene)


def question(scene: Sequence[Thing], about: Thing, rng: np.random.Generator) -> tuple[str, str]:
  """A question about a picture, about one thing above all, and its answer."""
  same_shape = [t for t in scene if t.shape == about.shape]
  same_colour = [t for t in scene if t.colour == about.colour]
  kinds = ["what", "where", "there", "many"]
  kinds += ["colour"] if len(same_shape) == 1 else []
  kinds += ["shape"] if len(same_colour) == 1 else []
  match _one(kinds, rng):
    case "colour":
      return f"what colour is the {about.shape}?", about.colour
    case "shape":
      return f"what shape is the {about.colour} thing?", about.shape
    case "what":
      place = about.place if rng.random() < 0.8 else int(rng.integers(len(CORNERS)))
      there = [t.name for t in scene if t.place == place]
      return f"what is {CORNERS[place]}?", there[0] if there else "nothing"
    case "where":
      return f"where is the {about.name}?", about.where
    case "there":
      told, false = _claims(scene, about, rng)
      yes = rng.random() < 0.5
      return f"is there {told if yes else false}?", "yes" if yes else "no"
    case _:
      kind = _one(("", about.colour, about.shape), rng)
      number = sum(kind in ("", t.colour, t.shape) for t in scene)
      asked = f"{SHAPES.get(kind, kind + ' things')}".strip()
      return f"how many {asked} are there?", DIGITS[number]


def region(scene: Sequence[Thing], about: Thing, rng: np.random.Generator) -> str:
  """A text that describes one thing of a picture alone."""
  told = [f"the {about.name}", f"the thing {about.where}", f"the {about.name} {about.where}"]
  if sum(t.shape == about.shape for t in scene) == 1:
    told.append(f"the {about.shape}")
  if sum(t.colour == about.colour for t in scene) == 1:
    told.append(f"the {about.colour} thing")
  return _one(told, rng)


def hypothesis(scene: Sequence[Thing], about: Thing, rng: np.random.Generator) -> tuple[str, str]:
  """A text about a picture and whether this implies it, contradicts it, or neither."""
  label = _one(("entailment", "neutral", "contradiction"), rng)
  if label == "neutral":
    return f"the {about.name} is {_one(_UNSEEN, rng)}", label
  told, false = _claims(scene, about, rng)
  return f"there is {told if label == 'entailment' else false}", label


def _claims(scene: Sequence[Thing], about: Thing, rng: np.random.Generator) -> tuple[str, str]:
  """What is there of a thing, and what is not there, by one, two or all that things have."""
  form = _one(_FORMS, rng)
  there = {_told(thing, form) for thing in scene}
  # What is new may not be told before either, or that it is false would be learnt.
  others = [_told(t, form) for t in things() if is_novel(about) or not is_novel(t)]
  return _told(about, form), _one([text for text in others if text not in there], rng)


def _told(thing: Thing, form: Sequence[str]) -> str:
  """Such as "a red thing", "a dot top left"."""
  words = {"colour": thing.colour, "shape": thing.shape, "place": thing.where}
  return " ".join(("a", *(words.get(x, x) for x in form)))


def sentence(rng: np.random.Generator) -> str:
  """Two things beside each other, told from the one and from the other."""
  one, other = (f"{_one(list(COLOURS), rng)} {_one(list(SHAPES), rng)}" for _ in range(2))
  side, opposite = _one(_SIDES, rng)[:: _one((1, -1), rng)]
  return f"{one} {side} {other} and {other} {opposite} {one}"


def draw(
  scene: Sequence[Thing], rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[float, float, float, float]]]:
  """A picture of a scene, its sizes and places drawn, and the box of each thing in its pixels."""
  image = Image.new("RGB", (SIZE * _FINER, SIZE * _FINER), (int(rng.integers(225, 256)),) * 3)
  pen, boxes = ImageDraw.Draw(image), []
  for thing in scene:
    row, column = divmod(thing.place, 2)
    radius = rng.uniform(10, 15)
    wide, high = {"square": (0.9, 0.9), "dot": (0.75, 0.75), "bar": (1.0, 0.4)}[thing.shape]
    wide, high = wide * radius, high * radius
    x = (column + 0.5) * SIZE / 2 + rng.uniform(-1, 1) * (SIZE / 4 - wide - 0.5)
    y = (row + 0.5) * SIZE / 2 + rng.uniform(-1, 1) * (SIZE / 4 - high - 0.5)
    box = (x - wide, y - high, x + wide, y + high)
    shape = pen.ellipse if thing.shape == "dot" else pen.rectangle
    shape([_FINER * side for side in box], fill=COLOURS[thing.colour])
    boxes.append(box)
  return image.reduce(_FINER), boxes


def world(directory: str | os.PathLike) -> pathlib.Path:
  """Returns the folder of the data set under `directory`, making it if it is not there."""
  return make_once(directory, f"world-v{VERSION}", _write)


def _write(path: pathlib.Path) -> None:
  path.mkdir()
  for number, (split, count) in enumerate(PICTURES.items()):
    rows = {task: [] for task in TASKS}
    for i in range(count):
      rng = np.random.default_rng((number, i))
      several = ROWS if split == "train" else {}
      for task, row in _rows(f"{split}{i}", rng, several, novel=split == "novel"):
        rows[task].append(row)
    for task in TASKS:
      write_lines(path / f"{task}_{split}.tsv", rows[task])
  for number, (split, count) in enumerate(SENTENCES.items(), start=len(PICTURES)):
    rng = np.random.default_rng((number, 0))
    lines = [f"{split}{i}\t{sentence(rng)}" for i in range(count)]
    write_lines(path / f"infilling_{split}.tsv", lines)
  _write_digits(path)
  write_lines(path / "answers.txt", answers())
  write_lines(path / "digits.txt", DIGITS)
  texts = list(_texts(np.random.default_rng(len(PICTURES) + len(SENTENCES))))
  OFATokenizer.train(texts, vocab_size=_VOCABULARY, num_bins=NUM_BINS).save(path / "tokenizer")


def answers() -> list[str]:
  """All that questions may be answered with."""
  names = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
  return ["yes", "no", "nothing", *DIGITS[:3], *COLOURS, *SHAPES, *CORNERS, *names]


def _rows(
  name: str, rng: np.random.Generator, several: Mapping[str, int], *, novel: bool
) -> Iterator[tuple[str, str]]:
  """(task, row) of all rows about one picture; `several` of a task, or one."""
  shown = scene(rng, novel=novel)
  image, boxes = draw(shown, rng)
  picture = base64.urlsafe_b64encode(quickstart.png(image)).decode()
  said, objects = caption(shown), REFERENCES.join(thing.name for thing in shown)
  file = f"{name}.png"
  for task in TASKS:
    for k in range(several.get(task, 1)):
      about = next((t for t in shown if is_novel(t)), None) or _one(shown, rng)
      row = f"{name}_{k}" if k else name
      match task:
        case "caption":
          fields = (row, file, said, objects, picture)
        case "vqa":
          asked, answer = question(shown, about, rng)
          fields = (row, file, asked, f"1.0{CONFIDENCE}{answer}", objects, picture)
        case "refcoco":
          box = ",".join(f"{side:.2f}" for side in boxes[shown.index(about)])
          fields = (row, file, region(shown, about, rng), box, picture)
        case "snli_ve":
          text, label = hypothesis(shown, about, rng)
          fields = (row, file, picture, text, said, label)
      yield task, "\t".join(fields)


def _texts(rng: np.random.Generator) -> Iterator[str]:
  """What the tokenizer is learnt from: as much of each kind, whatever the number of pictures."""
  yield from (f" {answer}" for answer in (*answers(), *DIGITS, "maybe"))
  for _ in range(1000):
    shown = scene(rng, novel=False)
    yield from (prompts.caption(), f" {caption(shown)}")
    yield prompts.question(question(shown, shown[0], rng)[0])
    yield prompts.region(region(shown, shown[0], rng))
    yield prompts.entailment(hypothesis(shown, shown[0], rng)[0])
    yield prompts.whole_text(sentence(rng))


def _write_digits(path: pathlib.Path) -> None:
  images, labels = quickstart.scans()
  valid = quickstart.held_out(labels)
  for split, chosen in (("train", ~valid), ("valid", valid)):
    rows = (
      f"{base64.urlsafe_b64encode(images[i]).decode()}\t{i}\t{DIGITS[labels[i]]}"
      for i in np.flatnonzero(chosen)
    )
    write_lines(path / f"digits_{split}.tsv", rows)


def _one(options: Sequence, rng: np.random.Generator):
  return options[int(rng.integers(len(options)))]
