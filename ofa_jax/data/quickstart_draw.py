"""The small world the other way round: its captions, and the codes of the pictures to draw.

  train.tsv                 id, caption, codes: the pictures of `data/quickstart_world.py`
  {valid,novel}.tsv         id, picture, caption, codes
  {train,valid}_imgs.tsv, {train,valid}_texts.jsonl   the same pictures for a Chinese-CLIP
  patches.npy               float32[K, 8, 8, 3] from -1 to 1: what each code looks like
  tokenizer/                a small byte-level BPE of its own, with the codes

A code is one of K patches of 8 x 8 pixels, the middles of clusters (k-means) of the patches of
training pictures: nothing is learnt that a look at the table would not show, and pictures of codes
are as right as such a mosaic can be (`tests/data/test_quickstart_draw.py`). A VQGAN trained on the
same pictures for as many minutes would see less.

Whether a drawn picture shows what its caption says is not a model's opinion: things have six
colours, three shapes and four corners, and `seen` reads them off the pixels.
"""

import base64
import collections
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from ofa_jax.data import codes, prompts
from ofa_jax.data.quickstart import write_lines
from ofa_jax.data.quickstart_ofa import COLOURS, CORNERS, SHAPES
from ofa_jax.data.quickstart_world import SIZE, Thing
from ofa_jax.tokenizers.ofa import OFATokenizer

VERSION = 2  # a part of the folder's name: raise it with every change of what is written
PATCH = 8  # pixels a side
NUM_CODES = 512
WIDTH = SIZE // PATCH  # codes a side
SPLITS = ("train", "valid", "novel")

_LEARNT = 3000  # training pictures whose patches make the clusters
_ROUNDS = 15
_PLAIN = 40  # of 255: patches whose pixels differ by less show no edge
_PLAIN_CODES = 32  # of the codes are for these
_VOCABULARY = 400  # pieces of text
_LEAST = 40  # pixels of a thing
_ROUND = 0.9  # share of its box that a square fills, and a dot does not
_FLAT = 0.62  # height by width of a bar, at most
_STRAY = 0.25  # of the longest row or column of a thing: shorter ones are its edge


def write(path: pathlib.Path, world: pathlib.Path) -> None:
  """Writes the data set.

  Args:
    path: the folder, which is made.
    world: what `quickstart_world.world` made.
  """
  path.mkdir()
  rows = {split: _read(world / f"caption_{split}.tsv") for split in SPLITS}
  patches = learn(np.stack([cut(row.image) for row in rows["train"][:_LEARNT]]))
  np.save(path / "patches.npy", patches)
  for split in SPLITS:
    lines = []
    for row in rows[split]:
      shown = () if split == "train" else (row.png,)  # nothing compares with those of training
      own = codes.written(encode(row.image, patches).ravel())
      lines.append("\t".join((row.name, *shown, row.caption, own)))
    write_lines(path / f"{split}.tsv", lines)
  for split in ("train", "valid"):
    _write_pairs(path, split, rows[split])
  texts = [prompts.picture(""), *(prompts.picture(row.caption) for row in rows["train"])]
  made = OFATokenizer.train(texts, vocab_size=_VOCABULARY + NUM_CODES, num_codes=NUM_CODES)
  made.save(path / "tokenizer")


def cut(image: np.ndarray) -> np.ndarray:
  """The patches float32[h, w, 8, 8, 3], from -1 to 1, of a picture uint8[H, W, 3]."""
  height, width = (side // PATCH for side in image.shape[:2])
  x = image.reshape(height, PATCH, width, PATCH, 3).transpose(0, 2, 1, 3, 4)
  return x.astype(np.float32) / 127.5 - 1


def learn(patches: np.ndarray, *, number: int = NUM_CODES) -> np.ndarray:
  """The middles float32[number, 8, 8, 3] of clusters of patches [..., 8, 8, 3].

  Most patches show nothing: they have few of the codes, for the greys of the ground and the inside
  of things, and the others are for edges.
  """
  flat = np.unique(patches.reshape(-1, PATCH * PATCH * 3), axis=0)
  plain = np.ptp(flat.reshape(len(flat), -1, 3), axis=1).max(axis=1) < _PLAIN / 127.5
  few = min(_PLAIN_CODES, number // 4)
  return np.concatenate(
    [_clusters(flat[plain], few), _clusters(flat[~plain], number - few)]
  ).reshape(number, PATCH, PATCH, 3)


def encode(image: np.ndarray, patches: np.ndarray) -> np.ndarray:
  """The nearest code of each patch, int32[h, w], of a picture uint8[H, W, 3]."""
  own = cut(image)
  flat = patches.reshape(len(patches), -1)
  return _nearest(own.reshape(-1, flat.shape[1]), flat).reshape(own.shape[:2])


def decode(numbers: np.ndarray, patches: np.ndarray) -> np.ndarray:
  """The picture uint8[H, W, 3] of codes int32[h, w]."""
  x = patches[numbers].transpose(0, 2, 1, 3, 4)
  x = x.reshape(len(numbers) * PATCH, -1, 3)
  return ((np.clip(x, -1, 1) + 1) / 2 * 255).astype(np.uint8)


def seen(image: np.ndarray) -> list[Thing]:
  """The things that a picture uint8[64, 64, 3] shows, by place, at most one in each corner."""
  return [thing for place in range(len(CORNERS)) if (thing := _in_corner(image, place))]


def told(caption: str) -> list[Thing]:
  """The things that a caption of the world names, by place."""
  pattern = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(CORNERS)})"
  found = re.findall(pattern, caption)
  return sorted((Thing(c, s, CORNERS.index(p)) for c, s, p in found), key=lambda t: t.place)


@dataclasses.dataclass(frozen=True)
class Truth:
  """What drawn pictures are worth, by the world's own rules: shares of the things in captions.

  "place": there is a thing in the corner. "colour", "shape": it is of the right one. "right":
  both. "whole": of the pictures, those that show what their caption says and nothing else.
  """

  metrics: ClassVar[tuple[str, ...]] = ("place", "colour", "shape", "right", "whole")

  def __call__(self, captions: Sequence[str], images: np.ndarray) -> Mapping[str, float]:
    """Scores pictures uint8[N, 64, 64, 3] by what their captions name."""
    things, whole = [], []
    for caption, image in zip(captions, images, strict=True):
      named, shown = told(caption), seen(image)
      whole.append(named == shown)
      there = {thing.place: thing for thing in shown}
      for thing in named:
        own = there.get(thing.place)
        same = (own is not None and own.colour == thing.colour, own and own.shape == thing.shape)
        things.append((own is not None, *map(bool, same), all(same)))
    shares = np.mean(things, axis=0) if things else np.zeros(4)
    names = ("place", "colour", "shape", "right")
    return dict(zip(names, map(float, shares), strict=True)) | {"whole": float(np.mean(whole))}


class _Row(NamedTuple):
  """A row of a caption file of the world: "png" is in base64, "image" uint8[64, 64, 3]."""

  name: str
  caption: str
  png: str
  image: np.ndarray


def _read(path: pathlib.Path) -> list[_Row]:
  rows = []
  for line in path.read_text(encoding="utf-8").splitlines():
    name, _, said, _, picture = line.split("\t")
    image = Image.open(io.BytesIO(base64.urlsafe_b64decode(picture)))
    rows.append(_Row(name, said, picture, np.asarray(image.convert("RGB"))))
  return rows


def _write_pairs(path: pathlib.Path, split: str, rows: Sequence[_Row]) -> None:
  """Pictures and the captions that are told of one or more of them, as Chinese-CLIP has them."""
  write_lines(path / f"{split}_imgs.tsv", (f"{i}\t{row.png}" for i, row in enumerate(rows)))
  shown = collections.defaultdict(list)
  for i, row in enumerate(rows):
    shown[row.caption].append(i)
  texts = (
    {"text_id": i, "text": caption, "image_ids": images}
    for i, (caption, images) in enumerate(shown.items())
  )
  write_lines(path / f"{split}_texts.jsonl", map(json.dumps, texts))


def _clusters(points: np.ndarray, number: int) -> np.ndarray:
  """k-means: float32[number, D]; where there are fewer points, some middles are there twice."""
  rng = np.random.default_rng(0)
  if not len(points):
    return np.ones((number, points.shape[1]), np.float32)
  if len(points) <= number:
    return np.resize(points, (number, points.shape[1]))
  points = points[rng.permutation(len(points))[:40_000]]
  middles = points[:number].copy()
  for _ in range(_ROUNDS):
    own = _nearest(points, middles)
    counts = np.bincount(own, minlength=number)
    order = np.argsort(own, kind="stable")
    begins = np.concatenate([[0], np.cumsum(counts)[:-1]])
    there = counts > 0
    sums = np.add.reduceat(points[order], begins[there], axis=0)
    middles[there] = sums / counts[there, None]
    middles[~there] = points[rng.integers(0, len(points), int((~there).sum()))]
  return middles


def _nearest(points: np.ndarray, middles: np.ndarray) -> np.ndarray:
  """The nearest middle of each point, int32[N]."""
  length = np.sum(middles**2, axis=1) / 2
  parts = [
    np.argmax(points[i : i + 8192] @ middles.T - length, axis=1)
    for i in range(0, len(points), 8192)
  ]
  return np.concatenate(parts).astype(np.int32)


def _in_corner(image: np.ndarray, place: int) -> Thing | None:
  """The thing in a corner of a picture; None: there is none."""
  row, column = divmod(place, 2)
  half = SIZE // 2
  part = image[row * half : (row + 1) * half, column * half : (column + 1) * half].astype(int)
  ground = np.full(3, 240)
  known = np.array([*COLOURS.values(), ground])
  nearest = np.argmin(((part[:, :, None] - known) ** 2).sum(-1), axis=-1)
  inside = nearest < len(COLOURS)
  if inside.sum() < _LEAST:
    return None
  # At its edges a thing is mixed with the ground, which may look like another colour.
  colour = int(np.bincount(nearest[inside], minlength=len(COLOURS)).argmax())
  own = nearest == colour
  own = own[np.ix_(*(x > _STRAY * x.max() for x in (own.sum(axis=1), own.sum(axis=0))))]
  shape = "square" if own.mean() > _ROUND else "dot"
  if own.shape[0] < _FLAT * own.shape[1]:
    shape = "bar"
  return Thing(list(COLOURS)[colour], shape, place)
