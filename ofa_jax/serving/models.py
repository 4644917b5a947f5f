"""What the served models can do, in batches: the objects of `ofa_jax.api` and nothing beside them.

`CLIP` and `Answers` have the same two halves: `prepare` makes rows of what a client sent, in any
thread; `run` computes rows of one kind, in the thread that owns the models.
"""

import collections
import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ofa_jax import retrieve
from ofa_jax.api import CNCLIPModel, OFAModel, image_transform
from ofa_jax.data.features import Features, read_features
from ofa_jax.inference.inputs import resized
from ofa_jax.inference.predict import TASKS, options_of, predict
from ofa_jax.serving import uploads
from ofa_jax.serving.limits import Limits

IMAGES, TEXTS = "images", "texts"  # the kinds of a Chinese-CLIP
LENGTHS = (1, 20, 40)  # words of texts for which programs are compiled at the start


class Kind(NamedTuple):
  """What rows have in common that are computed together.

  Attributes:
    model: its name.
    what: of a Chinese-CLIP `IMAGES`, `TEXTS` or the kind of an `Index`; of an OFA one of `TASKS`,
      or "draw".
    candidates: the answers or classes to choose from.
    texts: names of the texts of each row.
    pictured: whether each row has a picture.
    prompt_decoder: see `OFAModel.answer`.
    options: of drawing, by name.
  """

  model: str
  what: str
  candidates: tuple[str, ...] | None = None
  texts: tuple[str, ...] = ()
  pictured: bool = True
  prompt_decoder: bool = True
  options: tuple[tuple[str, int], ...] = ()


class Picture(NamedTuple):
  """A picture that is ready.

  Attributes:
    digest: of the file that was sent.
    pixels: as the model takes them; None where its features are known.
    size: width and height in the file.
    features: float32[E], where they are known from before.
  """

  digest: bytes
  pixels: np.ndarray | None
  size: tuple[int, int]
  features: np.ndarray | None = None


class Told(NamedTuple):
  """An OFA's answer to a row.

  Attributes:
    answer: as the model's method gives it.
    score: of it.
    probability: of it, where the model is calibrated.
  """

  answer: Any
  score: float
  probability: float | None = None


class Served(Protocol):
  """A model with its name."""

  name: str

  def run(self, kind: Kind, rows: list) -> Sequence: ...

  def picture(self, data: bytes, number: int, *, limits: Limits, what: str) -> Picture: ...

  def first_rows(self, most: int) -> Iterator[tuple[Kind, list]]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
  """A file of features to search in.

  Attributes:
    kind: "image" or "text", what its rows are.
    rows: of the file.
    top_k: rows that are found, at most.
  """

  kind: str
  rows: Features
  top_k: int

  @classmethod
  def open(cls, path: str, *, kind: str, width: int, top_k: int) -> "Index":
    """Reads a feature file as `extract_features` writes it.

    Raises:
      ValueError: a faulty file, or features of another width than the model's.
    """
    rows = read_features(path, kind=kind)
    if rows.vectors.shape[1] != width:
      raise ValueError(
        f"Expected features of the model's {width} numbers, found {rows.vectors.shape[1]} in "
        f"{path}. Extract them with the model that is served."
      )
    return cls(kind, rows, min(top_k, len(rows)))

  def search(self, queries: np.ndarray) -> list[tuple[list[int], np.ndarray]]:
    """For each query float32[N, E] the ids of the best rows and their scores, the best first."""
    (found,) = retrieve.best_rows(queries, self.rows.vectors, k=self.top_k)
    scores = np.einsum("ne,nke->nk", queries, self.rows.vectors[found].astype(np.float32))
    return list(zip(self.rows.ids[found].tolist(), scores, strict=True))


class CLIP:
  """A Chinese-CLIP: features of pictures and texts, and what is nearest in files of them."""

  def __init__(
    self, name: str, model: CNCLIPModel, *, indices: Sequence[Index] = (), remember: int = 4096
  ):
    """Serves a model.

    Args:
      name: what clients call it.
      model: from `load_from_name`.
      indices: to search in, one of a kind.
      remember: pictures whose features are kept, so that those sent again are not encoded again.
    """
    self.name, self.model = name, model
    self.indices = {index.kind: index for index in indices}
    self._transform = image_transform(model.image_size)
    self._remembered = _Remembered(remember)

  def picture(self, data: bytes, number: int, *, limits: Limits, what: str) -> Picture:
    """Makes a picture ready; Refused as `uploads.ready`."""
    digest = hashlib.sha256(data).digest()
    features = self._remembered.get(digest)
    if features is not None:
      return Picture(digest, None, (0, 0), features)
    pixels, size = uploads.ready(data, number, make=self._transform, limits=limits)
    return Picture(digest, pixels, size)

  def run(self, kind: Kind, rows: list) -> Sequence:
    """Features float32[N, E] as the API gives them, or what `Index.search` finds."""
    if kind.what == IMAGES:
      return self._image_features(rows)
    if kind.what == TEXTS:
      tokens = self.model.tokenizer(rows, context_length=self.model.context_length)
      return self.model.encode_text(tokens)
    return self.indices[kind.what].search(np.stack(rows))

  def _image_features(self, pictures: list[Picture]) -> list[np.ndarray]:
    """Each picture is encoded once, however often it is among them."""
    known = {p.digest: p.features for p in pictures if p.features is not None}
    new = {p.digest: p.pixels for p in pictures if p.digest not in known}
    if new:
      features = self.model.encode_image(np.stack(list(new.values())))
      known |= dict(zip(new, features, strict=True))
      for digest in new:
        self._remembered.put(digest, known[digest])
    return [known[p.digest] for p in pictures]

  def first_rows(self, most: int) -> Iterator[tuple[Kind, list]]:
    """Rows of every kind for every program that batches of up to `most` rows need."""
    blank = np.zeros((self.model.image_size, self.model.image_size, 3), np.float32)
    blank[0] = -1.0  # not what could be meant as pixels from 0 to 1
    for number in _sizes(most):
      pictures = [Picture(b"%d of %d" % (i, number), blank, (1, 1)) for i in range(number)]
      yield Kind(self.name, IMAGES), pictures
      yield Kind(self.name, TEXTS), ["a"] * number
    for kind in self.indices:
      query = np.zeros(self.model.config.embed_dim, np.float32)
      yield Kind(self.name, kind), [query] * most
    self._remembered.clear()


class Answers:
  """An OFA: captions, answers, boxes, labels, texts in pictures, and what else it has."""

  def __init__(
    self, name: str, model: OFAModel, *, codec: str | None = None, judge: str | None = None
  ):
    """Serves a model from `load_from_name` under a name.

    Of several questions about one picture, those of several clients among them, the picture's part
    of the encoder is computed once.

    Args:
      name: what clients call it.
      model: from `load_from_name`.
      codec, judge: what it draws with; None: what its own run names.

    Raises:
      ValueError: a codec or judge is given, and the model cannot draw with it.
    """
    self.name, self.model = name, model
    model.looks_once = True
    self._helpers = {k: v for k, v in (("codec", codec), ("judge", judge)) if v is not None}
    self.draws = model.can_draw(**self._helpers)

  def picture(self, data: bytes, number: int, *, limits: Limits, what: str) -> Picture:
    """Makes a picture ready for a task; Refused as `uploads.ready`."""
    square = TASKS[what].square

    def make(image: Image.Image) -> np.ndarray:
      # What the model's methods do with a picture; done to their result again, it changes nothing.
      if square is not None:
        return square(image.convert("RGB"), self.model.image_size)
      return resized(image, self.model.image_size)

    pixels, size = uploads.ready(data, number, make=make, limits=limits)
    return Picture(b"", pixels, size)

  def run(self, kind: Kind, rows: list) -> Sequence:
    """Answers to rows (picture, texts in the order of the kind's names); or pictures of texts."""
    if kind.what == "draw":
      return self.model.draw(rows, **dict(kind.options), **self._helpers)
    options = options_of(
      self.model, kind.what, candidates=kind.candidates, prompt_decoder=kind.prompt_decoder
    )
    pictures = [p.pixels for p, _ in rows] if kind.pictured else None
    columns = zip(*(texts for _, texts in rows), strict=True) if kind.texts else ()
    texts = dict(zip(kind.texts, map(list, columns), strict=True))
    answers, *numbers = predict(self.model, kind.what, pictures, texts, options=options)
    if kind.what == "refcoco":  # boxes are of the picture that was sent
      answers = [self._in_file(box, p.size) for box, (p, _) in zip(answers, rows, strict=True)]
    return [Told(*told) for told in zip(answers, *numbers, strict=True)]

  def first_rows(self, most: int) -> Iterator[tuple[Kind, list]]:
    """As of `CLIP`: all tasks of pictures, texts of `LENGTHS`; other programs come when needed."""
    side = self.model.image_size
    picture = Picture(b"", np.zeros((side, side, 3), np.uint8), (side, side))
    for number in _sizes(most):
      yield Kind(self.name, "caption"), [(picture, ())] * number
      for what in ("vqa", "refcoco", "snli_ve"):
        for words in LENGTHS:
          yield Kind(self.name, what, texts=("text",)), [(picture, ("a " * words,))] * number

  def _in_file(self, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    scale = np.divide(size, self.model.image_size).astype(np.float32)
    return box * np.tile(scale, 2)


class _Remembered:
  """The features of the pictures that were asked for last."""

  def __init__(self, most: int):
    self._most, self._lock = most, threading.Lock()
    self._features: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()

  def get(self, digest: bytes) -> np.ndarray | None:
    with self._lock:
      features = self._features.get(digest)
      if features is not None:
        self._features.move_to_end(digest)
      return features

  def put(self, digest: bytes, features: np.ndarray) -> None:
    with self._lock:
      self._features[digest] = features
      while len(self._features) > self._most:
        self._features.popitem(last=False)

  def clear(self) -> None:
    with self._lock:
      self._features.clear()


def served(
  name: str,
  model: CNCLIPModel | OFAModel,
  *,
  files: Mapping[str, str],
  top_k: int,
  remember: int = 4096,
  codec: str | None = None,
  judge: str | None = None,
) -> Served:
  """A loaded model under a name.

  Args:
    name: what clients call it.
    model: from `load_from_name`.
    files: of features for a Chinese-CLIP to search in, by their kind, "image" or "text".
    top_k: rows that a search tells, at most.
    remember: pictures whose features are kept; see `CLIP`.
    codec, judge: what an OFA draws with; see `Answers`.

  Raises:
    ValueError: a faulty file of features; an OFA that cannot draw with the codec.
  """
  if isinstance(model, OFAModel):
    return Answers(name, model, codec=codec, judge=judge)
  width = model.config.embed_dim
  indices = [Index.open(path, kind=kind, width=width, top_k=top_k) for kind, path in files.items()]
  return CLIP(name, model, indices=indices, remember=remember)


def _sizes(most: int) -> list[int]:
  """Rows of batches that are padded differently: 1, 2, 4, ... and the most."""
  return sorted({min(1 << i, most) for i in range(most.bit_length() + 1)})


def name_of(place: str) -> str:
  """What clients call a model: the last part of its place."""
  return os.path.basename(os.path.normpath(place)) or place
