"""What clients may ask for: for each path its fields, what answers it, and how that is told."""

import asyncio
import base64
import dataclasses
import io
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ofa_jax.inference.predict import TASKS
from ofa_jax.serving import bodies, uploads
from ofa_jax.serving.bodies import Body
from ofa_jax.serving.limits import Refused
from ofa_jax.serving.models import CLIP, IMAGES, TEXTS, Answers, Kind, Picture, Served
from ofa_jax.serving.service import Service


class Asked(NamedTuple):
  """A request that can be answered.

  Attributes:
    service: of all requests.
    model: that answers it.
    deadline: of `time.monotonic`.
  """

  service: Service
  model: Served
  deadline: float

  async def pictures(self, files: Sequence[bytes | str], *, what: str = IMAGES) -> list[Picture]:
    """The pictures of a request, ready for the model."""

    def ready(number: int, file: bytes | str) -> Picture:
      data = uploads.encoded(file, number)
      return self.model.picture(data, number, limits=self.service.limits, what=what)

    # The first that is refused ends the request; the others are not waited for.
    made = (self.service.aside(ready, number, file) for number, file in enumerate(files))
    return list(await asyncio.gather(*made))

  async def compute(self, what: str, rows: Sequence[Any], **kind: Any) -> list:
    """The results of rows of a kind of the model's."""
    kind = Kind(self.model.name, what, **kind)
    return await self.service.compute(kind, rows, deadline=self.deadline)

  async def features(self, body: Body) -> np.ndarray:
    """float32[N, E] of the images of a request, or of its texts."""
    if getattr(body, "images", None) is not None:
      return np.stack(await self.compute(IMAGES, await self.pictures(body.images)))
    return np.stack(await self.compute(TEXTS, body.texts))


class Answer(NamedTuple):
  """What a client is told.

  Attributes:
    told: as JSON, in which arrays are lists.
    array: the same as an array for who asks for `.npy`; None: there is none.
  """

  told: dict[str, Any]
  array: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
  """A path.

  Attributes:
    path: of the URL.
    summary: what it does.
    body: its fields.
    answers: how.
    can: whether a model can.
    told: an example of the answer.
  """

  path: str
  summary: str
  body: type[Body]
  answers: Callable[[Asked, Any], Awaitable[Answer]]
  can: Callable[[Served], bool]
  told: str


def operations(models: Sequence[Served]) -> list[Operation]:
  """What at least one of the models can."""
  return [x for x in OPERATIONS if any(map(x.can, models))]


async def _features(asked: Asked, body: Any) -> Answer:
  features = await asked.features(body)
  features = _normalized(features) if body.normalize else features
  return Answer({"features": features}, features)


async def _similarity(asked: Asked, body: bodies.Similarity) -> Answer:
  pictures = await asked.pictures(body.images)
  images, texts = await asyncio.gather(
    asked.compute(IMAGES, pictures), asked.compute(TEXTS, body.texts)
  )
  logits, _ = asked.model.model.logits(np.stack(images), np.stack(texts))
  return Answer({"logits_per_image": logits}, logits)


async def _top_k(asked: Asked, body: bodies.TopK) -> Answer:
  if (body.images is None) == (body.texts is None):
    raise Refused(422, "Expected images or texts to search for.", reason="fields")
  indices = asked.model.indices
  among = body.among or next(kind for kind in ("image", "text") if kind in indices)
  if among not in indices:
    raise Refused(422, f"Expected among: {', '.join(indices)}; found {among}.", reason="fields")
  most = indices[among].top_k
  if body.k > most:
    raise Refused(422, f"Expected k from 1 to {most}, found {body.k}.", reason="count")
  queries = _normalized(await asked.features(body))
  found = await asked.compute(among, list(queries))
  results = [{"ids": ids[: body.k], "scores": scores[: body.k]} for ids, scores in found]
  return Answer({"among": among, "results": results}, np.array([x["ids"] for x in results]))


def _asking(
  what: str, name: str, *, tell: Callable[[Any], Any]
) -> Callable[[Asked, Any], Awaitable[Answer]]:
  """How a task is answered: `name` is what the answer is called."""

  async def answers(asked: Asked, body: Any) -> Answer:
    columns = {
      column: values
      for column, values in (
        ("text", getattr(body, "texts", None)),
        ("premise", getattr(body, "premises", None)),
      )
      if values is not None
    }
    number = len(columns.get("text", body.images or ()))
    columns = {column: _for_each(number, values, column) for column, values in columns.items()}
    pictures = [None] * number
    if body.images is not None:
      pictures = await asked.pictures(body.images, what=what)
      pictures = _for_each(number, pictures, "images")
    candidates = getattr(body, "candidates", None) or getattr(body, "classes", None)
    texts = zip(*columns.values(), strict=True) if columns else [()] * number
    told = await asked.compute(
      what,
      list(zip(pictures, texts, strict=True)),
      candidates=None if candidates is None else tuple(candidates),
      texts=tuple(columns),
      pictured=body.images is not None,
      prompt_decoder=getattr(body, "prompt_decoder", True),
    )
    results = []
    for answer, score, probability in told:
      line = {name: tell(answer), "score": float(score) if np.isfinite(score) else None}
      results.append(line if probability is None else line | {"probability": float(probability)})
    return Answer({"results": results})

  return answers


async def _draw(asked: Asked, body: bodies.Drawings) -> Answer:
  limits = asked.service.limits
  limits.count("samples", body.samples, limits.samples)
  if body.samples & (body.samples - 1):  # each number is a program of its own
    text = f"Expected samples 1, 2, 4, 8 and so on, found {body.samples}."
    raise Refused(422, text, reason="count")
  if body.top > body.samples:
    text = f"Expected top of at most the {body.samples} samples, found {body.top}."
    raise Refused(422, text, reason="count")
  options = (("samples", body.samples), ("top", body.top))
  drawn = await asked.compute("draw", body.texts, options=options)
  results = [{"images": [_png(picture) for picture in pictures]} for pictures in drawn]
  return Answer({"results": results})


def _png(picture: Any) -> str:
  """A PNG file in base64."""
  image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture))
  file = io.BytesIO()
  image.save(file, format="png")
  return base64.b64encode(file.getvalue()).decode()


def _box(box: np.ndarray) -> list[float] | None:
  return None if np.isnan(box).any() else box.tolist()


def _normalized(features: np.ndarray) -> np.ndarray:
  return features / np.linalg.norm(features, axis=1, keepdims=True)


def _for_each(number: int, values: list, name: str) -> list:
  """One value for each of so many rows; one alone is for all."""
  if len(values) == number:
    return values
  if len(values) == 1:
    return values * number
  text = f"Expected {name} for {number} rows, or one for all, found {len(values)}."
  raise Refused(422, text, reason="count")


def _is_clip(model: Served) -> bool:
  return isinstance(model, CLIP)


def _is_ofa(model: Served) -> bool:
  return isinstance(model, Answers)


def _task(
  path: str,
  *,
  summary: str,
  body: type[Body],
  what: str,
  example: str,
  name: str | None = None,
  tell: Callable[[Any], Any] = lambda answer: answer,
) -> Operation:
  """A task of an OFA: `what` of `TASKS`; `name` is its answer's, by default that of its files."""
  name = name or TASKS[what].result
  return Operation(
    path=path,
    summary=summary,
    body=body,
    answers=_asking(what, name, tell=tell),
    can=_is_ofa,
    told=f'{{"results": [{{"{name}": {example}, "score": -0.12}}, ...]}}',
  )


OPERATIONS = (
  Operation(
    path="/v1/features/images",
    summary="Features of images, float32[N, E].",
    body=bodies.FeaturesOfImages,
    answers=_features,
    can=_is_clip,
    told='{"features": [[0.0123, ...], ...]}',
  ),
  Operation(
    path="/v1/features/texts",
    summary="Features of texts, float32[N, E].",
    body=bodies.FeaturesOfTexts,
    answers=_features,
    can=_is_clip,
    told='{"features": [[0.0123, ...], ...]}',
  ),
  Operation(
    path="/v1/similarity",
    summary="How well each image and each text belong together: logits float32[N, M].",
    body=bodies.Similarity,
    answers=_similarity,
    can=_is_clip,
    told='{"logits_per_image": [[21.3, 18.9], ...]}',
  ),
  Operation(
    path="/v1/topk",
    summary="The rows of a feature file that are nearest to images or texts, the best first.",
    body=bodies.TopK,
    answers=_top_k,
    can=lambda model: _is_clip(model) and bool(model.indices),
    told='{"among": "image", "results": [{"ids": [7, 3], "scores": [0.41, 0.38]}, ...]}',
  ),
  _task(
    "/v1/caption",
    summary="What is in images.",
    body=bodies.Images,
    what="caption",
    example='"a red square"',
  ),
  _task(
    "/v1/answer",
    summary="Answers to questions about images.",
    body=bodies.Questions,
    what="vqa",
    example='"two"',
  ),
  _task(
    "/v1/ground",
    summary="Where in images what is described is: x0, y0, x1, y1 in pixels, null if nowhere.",
    body=bodies.Phrases,
    what="refcoco",
    example="[12.0, 30.5, 80.0, 96.0]",
    tell=_box,
  ),
  _task(
    "/v1/entail",
    summary="Whether images imply texts: entailment, neutral or contradiction.",
    body=bodies.Hypotheses,
    what="snli_ve",
    example='"entailment"',
  ),
  _task(
    "/v1/classify",
    summary="Which of your classes images belong to.",
    body=bodies.Classes,
    what="classify",
    example='"cat"',
  ),
  _task(
    "/v1/read",
    summary="The texts in images.",
    body=bodies.Images,
    what="ocr",
    name="text",  # "ocr" in the original's files
    example='"..."',
  ),
  _task(
    "/v1/generate",
    summary="What follows prompts in your own words, with or without an image.",
    body=bodies.Prompts,
    what="text",
    example='"..."',
  ),
  Operation(
    path="/v1/draw",
    summary="Pictures of what texts describe, PNG files in base64.",
    body=bodies.Drawings,
    answers=_draw,
    can=lambda model: _is_ofa(model) and model.draws,
    told='{"results": [{"images": ["iVBORw0...", ...]}, ...]}',
  ),
)
