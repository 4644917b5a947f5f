"""What the tabs of an OFA do: a picture and texts in, answers and boxes out.

All of them ask by `inference.predict`, as `ofa_jax.generate` does.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from ofa_jax import pictures
from ofa_jax.inference import predict
from ofa_jax.inference.ofa import OFAModel
from ofa_jax.page import given
from ofa_jax.page.words import Words
from ofa_jax.tasks import refcoco

# Colours that are told apart also by those who see few, dark enough on white (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#b8a500")
MOST_BOXES = len(COLOURS)
MOST_SAMPLES, SAMPLES, DRAWN = 32, 8, 4  # pictures: drawn at most, drawn, and shown of these
LEAST = 0.5  # probability of a box that is shown, unless a person says another

_SMALLEST, _LARGEST = 448, 1024  # pixels of the longer side of what is drawn


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a model says.

  Attributes:
    text: the answer.
    probability: of it; None: nothing is known of it.
    calibrated: whether that was made right by a validation split.
  """

  text: str
  probability: float | None = None
  calibrated: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
  """Boxes of a phrase, the best first.

  Attributes:
    drawn: uint8[H, W, 3], the picture with the boxes.
    boxes: float32[K, 4] = x0, y0, x1, y1 in pixels of the picture.
    probabilities: float32[K], calibrated; None where the model is not.
  """

  drawn: np.ndarray
  boxes: np.ndarray
  probabilities: np.ndarray | None


def tabs(model: OFAModel, *, draws: bool = False) -> tuple[str, ...]:
  """What there is a tab for, by the names of `inference.predict.TASKS`, and "image" to draw."""
  boxes = ("refcoco",) if model.config.num_bins else ()
  return ("caption", "vqa", *boxes, "snli_ve", "classify", *(("image",) if draws else ()))


def is_calibrated(model: OFAModel, task: str) -> bool:
  """Whether free answers of a task come with calibrated probabilities."""
  return predict.options_of(model, task).probabilities


def caption(model: OFAModel, upload: str | None, *, words: Words) -> Answer:
  """Describes a picture."""
  return _ask(model, "caption", given.picture(upload, words=words), {})


def answer(
  model: OFAModel, upload: str | None, question: str, choices: str, *, words: Words
) -> Answer:
  """Answers a question; out of `choices`, one a line, where there are any."""
  picture = given.picture(upload, words=words)
  question = given.text(question, called=words.question_text, words=words)
  several = None
  if (choices or "").strip():
    several = given.lines(choices, called=words.answers, words=words)
  return _ask(model, "vqa", picture, {"text": question}, choices=several)


def entail(
  model: OFAModel, upload: str | None, hypothesis: str, premise: str, *, words: Words
) -> Answer:
  """Says whether a picture, and perhaps a premise, imply a hypothesis."""
  picture = given.picture(upload, words=words)
  texts = {"text": given.text(hypothesis, called=words.hypothesis, words=words)}
  premise = given.perhaps(premise, called=words.premise, words=words)
  if premise is not None:
    texts["premise"] = premise
  said = _ask(model, "snli_ve", picture, texts)
  return dataclasses.replace(said, text=words.entailments.get(said.text, said.text))


def classify(model: OFAModel, upload: str | None, classes: str, *, words: Words) -> Answer:
  """Chooses one of the classes, one a line, for a picture."""
  picture = given.picture(upload, words=words)
  classes = given.lines(classes, called=words.class_names, words=words)
  return _ask(model, "classify", picture, {}, choices=classes)


def ground(
  model: OFAModel, upload: str | None, phrase: str, most: float, least: float, *, words: Words
) -> Found:
  """Finds the boxes of a phrase.

  Args:
    model: from `load_from_name`.
    upload: the picture's file.
    phrase: what to find.
    most: boxes at most.
    least: probability of a box from which on it counts; of a calibrated model.
    words: of the page.
  """
  picture = given.picture(upload, words=words)
  phrase = given.text(phrase, called=words.phrase, words=words)
  options = predict.options_of(model, "refcoco")
  options = dataclasses.replace(
    options,
    most_boxes=int(most),
    min_probability=float(least) if options.probabilities else None,
  )
  texts = {"text": [phrase]}
  (told,), _ = predict.predict(model, "refcoco", [picture], texts, options=options)
  return Found(_drawn(picture, told.boxes), told.boxes, told.probabilities)


def draw(
  model: OFAModel,
  text: str,
  samples: float,
  top: float,
  seed: float,
  *,
  codec: str | None,
  judge: str | None,
  words: Words,
) -> list[np.ndarray]:
  """Draws pictures of a text, the best first, uint8[S, S, 3] each.

  Args:
    model: from `load_from_name`.
    text: what they show.
    samples: pictures that are drawn.
    top: how many of these are shown.
    seed: another one gives others.
    codec, judge: as for `OFAModel.draw`.
    words: of the page.
  """
  text = given.text(text, called=words.drawing_text, words=words)
  asked = {"samples": int(samples), "top": min(int(top), int(samples)), "seed": int(seed or 0)}
  (drawn,) = model.draw([text], codec=codec, judge=judge, **asked)
  return [to_look_at(image) for image in drawn]


def _ask(
  model: OFAModel,
  task: str,
  picture: Image.Image,
  texts: Mapping[str, str],
  *,
  choices: Sequence[str] | None = None,
) -> Answer:
  """The answer to one row of a task."""
  options = predict.options_of(model, task, candidates=choices)
  rows = {name: [text] for name, text in texts.items()}
  (told,), (score,), *more = predict.predict(model, task, [picture], rows, options=options)
  if options.probabilities:
    return Answer(told, float(more[0][0]), calibrated=True)
  chosen = choices is not None or predict.TASKS[task].choices is not None
  return Answer(told, float(np.exp(score)) if chosen else None)


def _drawn(picture: Image.Image, boxes: np.ndarray) -> np.ndarray:
  """The picture in a size to look at, with numbered boxes."""
  shown = to_look_at(picture)
  scale = np.tile(np.divide(shown.shape[1::-1], picture.size), refcoco.CORNERS // 2)
  coloured = [((box * scale).tolist(), COLOURS[i % len(COLOURS)]) for i, box in enumerate(boxes)]
  return pictures.with_boxes(shown, coloured, numbered=True)


def to_look_at(picture: Image.Image) -> np.ndarray:
  """A picture uint8[H, W, 3], large enough to see something on it, and no larger than a screen."""
  longer = max(picture.size)
  factor = min(max(longer, _SMALLEST), _LARGEST) / longer
  size = tuple(max(1, round(side * factor)) for side in picture.size)
  return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC))
