"""Wrong captions and wrong answers for OFA's pretraining, out of its `negative_sample` folder.

type2ans.json      {"how many": ["1", "2", ...], ..., "other": [...]}, answers by kind
object.txt         names of things, one a line
all_captions.txt   captions, one a line
"""

import dataclasses
import json
import mmap
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from ofa_jax import storage, text_files
from ofa_jax.data.draws import Draws
from ofa_jax.data.text import REFERENCES

ANSWERS, OBJECTS, CAPTIONS = FILES = ("type2ans.json", "object.txt", "all_captions.txt")
OTHER = "other"  # the kind of answers that fit any question
COUNTS = "how many"  # the kind whose numbers have neighbours
OWN_OBJECTS = 0.6  # below: a caption of elsewhere, above: one with another thing in it
NEIGHBOURS = 0.5  # above: a number's neighbour, below: any answer of its kind
SURE = 0.1  # by how much a confidence must be above the draw for an answer of the same kind


@dataclasses.dataclass(frozen=True)
class Negatives:
  """What wrong captions and answers are made of.

  Attributes:
    objects: names of things, two at least.
    captions: of any pictures.
    answers: by kind; two at least of each, and "other" is one.
    kinds: the kind of each answer that has one; None: all but "other" have.
  """

  objects: Sequence[str]
  captions: Sequence[str]
  answers: Mapping[str, Sequence[str]]
  kinds: Mapping[str, str] | None = None

  def __post_init__(self):
    if self.kinds is None:
      kinds = {
        text: kind for kind, texts in self.answers.items() if kind != OTHER for text in texts
      }
      object.__setattr__(self, "kinds", kinds)

  def caption(self, caption: str, objects: str, draws: Draws) -> str:
    """A caption that is wrong for a picture.

    Args:
      caption: the right one.
      objects: things in the picture, "&&" between them; "": unknown.
      draws: where it is drawn from.
    """
    if draws.random() > OWN_OBJECTS and objects:
      there = draws.choice(objects.strip().split(REFERENCES))
      return caption.replace(there, _other(self.objects, there, draws))
    return draws.choice(self.captions)

  def answer(self, answer: str, confidence: float, draws: Draws) -> str:
    """An answer that is wrong for a question; of the right one's kind where that one is sure."""
    drawn = draws.random()
    if not confidence > drawn + SURE or answer not in self.kinds:
      return _other(self.answers[OTHER], answer, draws)
    kind = self.kinds[answer]
    if kind == COUNTS and answer.isdigit() and drawn > NEIGHBOURS:
      return str(int(answer) + draws.choice((-1, 1)))
    return _other(self.answers[kind], answer, draws)


def load(folder: str) -> Negatives:
  """Reads a folder.

  Raises:
    ValueError: files are missing, or have not what they should have; all faults.
  """
  place = storage.of(folder)
  faults = [f"{name} is missing" for name in FILES if not storage.is_file(place / name)]
  answers, objects, captions = {}, (), ()
  if not faults:
    answers = _answers(place / ANSWERS, faults)
    objects = tuple(_Lines(place / OBJECTS))
    captions = _Lines(place / CAPTIONS)
    if len(objects) < 2:
      faults.append(f"{OBJECTS} has {len(objects)} names of things, two are the least")
    if not len(captions):
      faults.append(f"{CAPTIONS} has no caption")
  if faults:
    raise ValueError(
      f"Expected {', '.join(FILES)} in {folder}, which wrong captions and answers are made of, "
      f"found: {'; '.join(faults)}. It is the folder negative_sample of the original's pretraining "
      "data; name yours by --config.task.negatives."
    )
  return Negatives(objects, captions, answers)


class _Lines(Sequence):
  """The lines of a file that are not empty, which the memory of a host need not hold."""

  def __init__(self, path: pathlib.Path):
    text_files.check(path)
    if storage.in_bucket(path) or not storage.stat(path).size:
      self._data = storage.read_bytes(path)
    else:
      with open(path, "rb") as file:
        self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    ends, begin = [], len(text_files.MARK) * (self._data[:3] == text_files.MARK)
    places = []
    while begin < len(self._data):
      end = self._data.find(b"\n", begin)
      end = len(self._data) if end < 0 else end
      if self._data[begin:end].strip():
        places.append(begin)
        ends.append(end)
      begin = end + 1
    self._begins, self._ends = np.array(places, np.int64), np.array(ends, np.int64)

  def __len__(self) -> int:
    return len(self._begins)

  def __getitem__(self, i: int) -> str:
    return self._data[int(self._begins[i]) : int(self._ends[i])].decode("utf-8", "replace").strip()


def _answers(path: pathlib.Path, faults: list[str]) -> dict[str, list[str]]:
  """The answers by kind; what is wrong with them is added to the faults."""
  try:
    answers = json.loads(text_files.read(path))
  except (OSError, ValueError, RecursionError) as error:
    faults.append(f"{ANSWERS} cannot be read: {text_files.shown(error, 200)}")
    return {}
  if not isinstance(answers, dict) or not all(
    isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    for texts in answers.values()
  ):
    faults.append(f"{ANSWERS} is no object of lists of texts")
    return {}
  few = [kind for kind, texts in answers.items() if len(texts) < 2]
  if OTHER not in answers or few:
    found = f"fewer for {', '.join(few[:5])}" if few else f"none for {OTHER!r}"
    faults.append(
      f"{ANSWERS} needs two answers at least of each kind, {OTHER!r} among them: {found}"
    )
  return answers


def _other(options: Sequence[str], right: str, draws: Draws) -> str:
  """One of all but the last option; where that is the right one, the last."""
  drawn = draws.choice(options[:-1])
  return options[-1] if drawn == right else drawn
