"""Any task of OFA by its name: what a model predicts, and how predictions are written."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ofa_jax.calibrations import Calibration
from ofa_jax.data.text import REFERENCES
from ofa_jax.decode.beam import Search
from ofa_jax.inference.grounding import Boxes
from ofa_jax.inference.ofa import OFAModel
from ofa_jax.tasks import (
  caption,
  confidence,
  free_text,
  gigaword,
  glue,
  image_classify,
  infilling,
  ocr,
  refcoco,
  snli_ve,
  vqa,
)
from ofa_jax.tasks.answering import Answering

TASKS: dict[str, Answering] = {
  answering.name: answering
  for answering in (
    caption.ANSWERING,
    vqa.ANSWERING,
    refcoco.ANSWERING,
    snli_ve.ANSWERING,
    image_classify.ANSWERING,
    ocr.ANSWERING,
    ocr.DOCUMENTS,
    free_text.ANSWERING,
    gigaword.ANSWERING,
    infilling.ANSWERING,
    *(glue.answering(part) for part in glue.PARTS),
  )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How predictions are made.

  Attributes:
    search: how texts and boxes are searched for.
    candidates: the answers or classes to choose from.
    prompt_decoder: see `OFAModel.answer`.
    probabilities: whether answers come with them; of a calibrated model.
    min_probability: of a box, see `OFAModel.ground`.
    most_boxes: of a phrase, see `OFAModel.ground_all`; None: the best one, in the original's form.
    seed: of samples of boxes.
  """

  search: Search
  candidates: tuple[str, ...] | None = None
  prompt_decoder: bool = True
  probabilities: bool = False
  min_probability: float | None = None
  most_boxes: int | None = None
  seed: int = 0


def options_of(
  model: OFAModel,
  task: str,
  *,
  candidates: Sequence[str] | None = None,
  prompt_decoder: bool = True,
) -> Options:
  """With the model's own search for a task, and probabilities where it is calibrated for it."""
  answering = TASKS[task]
  options = Options(
    search=model.searches.get(answering.searched_as, answering.search),
    candidates=None if candidates is None else tuple(candidates),
    prompt_decoder=prompt_decoder,
  )
  calibrated = calibration_of(model, task, options) is not None
  return dataclasses.replace(options, probabilities=calibrated)


def predict(
  model: OFAModel,
  task: str,
  images: Sequence[Any] | None,
  texts: Mapping[str, Sequence[str]],
  *,
  options: Options,
) -> tuple[list, np.ndarray] | tuple[list, np.ndarray, np.ndarray]:
  """Returns the predictions of some rows, as the model gives them, their scores, and probabilities.

  Args:
    model: from `load_from_name`.
    task: one of `TASKS`.
    images: of each row, as the task's `Answering.square` made them; None: without images.
    texts: "text" and perhaps "text2", "premise" or "objects" of each row.
    options: how to.

  Raises:
    ValueError: what the task needs is missing.
  """
  search = options.search
  told = {"return_scores": True}
  if options.probabilities:
    told["return_probabilities"] = True
  if task == "caption":
    return model.caption(images, search=search, **told)
  if task == "vqa":
    return model.answer(
      images,
      texts["text"],
      options.candidates,
      objects=[x.split(REFERENCES) for x in texts["objects"]] if "objects" in texts else None,
      search=search,
      prompt_decoder=options.prompt_decoder,
      **told,
    )
  if task == "refcoco" and options.most_boxes is not None:
    boxes = model.ground_all(
      images,
      texts["text"],
      most=options.most_boxes,
      min_probability=options.min_probability,
      search=search,
      seed=options.seed,
    )
    return boxes, np.array([x.scores.max(initial=-np.inf) for x in boxes], np.float32)
  if task == "refcoco":
    if options.min_probability is not None:
      told["min_probability"] = options.min_probability
    return model.ground(images, texts["text"], search=search, **told)
  if task == "snli_ve":
    return model.entail(images, texts["text"], texts.get("premise"), **told)
  if task == "classify":
    if options.candidates is None:
      raise ValueError("Expected --candidates, a file with the names of all classes, found none")
    return model.classify(images, options.candidates, **told)
  if task in ("ocr", "ocr_document"):
    document = task == "ocr_document"
    return model.read(images, document=document, placed=True, search=search, **told)
  if task != "text":  # texts alone
    return model.ask(TASKS[task], texts, search=search, **told)
  return model.generate(
    images,
    texts["text"],
    num_beams=search.num_beams,
    max_length=search.max_length,
    no_repeat_ngram_size=search.no_repeat_ngram_size,
    search=search,
    return_scores=True,
  )


def told(answering, answer, score, probability=None, *, scale) -> dict[str, Any]:
  """An answer, its score and perhaps its probability as they are written."""
  if isinstance(answer, Boxes):
    return {"boxes": [*_boxes(answering, answer, scale)]}
  none = not np.isfinite(score)  # no hypothesis, or none that is a box; JSON has no NaN
  absent = none or (isinstance(answer, np.ndarray) and np.isnan(answer).any())
  line = {
    answering.result: None if absent else answering.tell(answer, scale),
    "score": None if none else float(score),
  }
  return line if probability is None else line | {"probability": float(probability)}


def _boxes(answering, boxes, scale) -> Iterator[dict[str, Any]]:
  """Each of several boxes of a phrase."""
  for place, box in enumerate(boxes.boxes):
    told = {answering.result: answering.tell(box, scale), "score": float(boxes.scores[place])}
    if boxes.probabilities is not None:
      told["probability"] = float(boxes.probabilities[place])
    yield told


def calibration_of(model: OFAModel, task: str, options: Options) -> Calibration | None:
  """The calibration that the probabilities of a task's answers are by; None: there is none."""
  answering = TASKS[task]
  choosing = options.candidates is not None or answering.choices is not None
  return model.calibrations.get(confidence.name_of(answering, chosen=choosing))
