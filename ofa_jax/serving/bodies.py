"""What clients send: JSON, or forms with uploaded files, which have the same fields."""

from typing import Annotated, Any, Literal, TypeVar, get_origin

import orjson
import pydantic
from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ofa_jax.serving.limits import Limits, Refused
from ofa_jax.serving.service import Service
from ofa_jax.text_files import shown

FORM, JSON = "multipart/form-data", "application/json"
_LARGE = 1 << 20  # bytes of JSON that are not parsed between other requests

Upload = Annotated[
  bytes | str,
  pydantic.WithJsonSchema({"type": "string", "format": "binary", "description": "or its base64"}),
]
Field = pydantic.Field


class Body(pydantic.BaseModel):
  """Of any request."""

  model_config = pydantic.ConfigDict(extra="forbid")
  model: str | None = Field(None, description="name of a model; default: the first that can")


class Images(Body):
  images: list[Upload] = Field(description="image files, uploaded or in base64")


class FeaturesOfImages(Images):
  normalize: bool = Field(False, description="whether to divide features by their length")


class Texts(Body):
  texts: list[str] = Field(description="texts")


class FeaturesOfTexts(Texts):
  normalize: bool = Field(False, description="whether to divide features by their length")


class Similarity(Images):
  texts: list[str] = Field(description="texts, each compared with each image")


class TopK(Body):
  images: list[Upload] | None = Field(None, description="what to search for; or texts")
  texts: list[str] | None = Field(None, description="what to search for; or images")
  among: Literal["image", "text"] | None = Field(
    None, description="features of what to search in; default: images where there are any"
  )
  k: int = Field(10, ge=1, description="how many")


class Questions(Images):
  texts: list[str] = Field(description="questions: one for each image, or all about one")
  candidates: list[str] | None = Field(None, description="answers to choose from; default: any")
  prompt_decoder: bool = Field(
    True, description="the decoder reads the question, too; not in pretrained models"
  )


class Phrases(Images):
  texts: list[str] = Field(description="what to find: one for each image, or all in one")


class Hypotheses(Images):
  texts: list[str] = Field(description="hypotheses: one for each image, or all about one")
  premises: list[str] | None = Field(None, description="texts that are known; one for each")


class Classes(Images):
  classes: list[str] = Field(description="names of all classes")


class Prompts(Body):
  texts: list[str] = Field(description="prompts: one for each image, or all about one")
  images: list[Upload] | None = Field(None, description="image files; default: none")


class Drawings(Texts):
  samples: int = Field(1, ge=1, description="pictures that are drawn for a text: 1, 2, 4, 8, 16")
  top: int = Field(1, ge=1, description="how many of them are told, the best first")


Kind = TypeVar("Kind", bound=Body)


async def read(request: Request, kind: type[Kind], *, service: Service) -> Kind:
  """The body of a request, its counts and texts within the limits.

  Raises:
    Refused: another content type, no JSON or no form, unknown or missing fields, too much of
      something.
  """
  content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if content == JSON:
    fields = await _json(await request.body(), service)
  elif content == FORM:
    fields = await _form(request, kind, service.limits)
  else:
    found = shown(content or "none", 60)
    raise Refused(415, f"Expected the content type {JSON} or {FORM}, found {found}.", reason="type")
  try:
    body = kind.model_validate(fields)
  except pydantic.ValidationError as error:
    faults = [
      f"{'.'.join(map(str, fault['loc'])) or 'the body'}: {fault['msg']}"
      for fault in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    text = f"Expected the fields {', '.join(kind.model_fields)}; {'; '.join(faults[:5])}{more}"
    raise Refused(422, shown(text, 1000), reason="fields") from None
  _check(body, service.limits)
  return body


async def _json(data: bytes, service: Service) -> Any:
  try:
    return await service.aside(orjson.loads, data) if len(data) > _LARGE else orjson.loads(data)
  except orjson.JSONDecodeError as error:
    text = f"Expected JSON in the body, found: {shown(str(error), 200)}"
    raise Refused(422, text, reason="json") from None


async def _form(request: Request, kind: type[Body], limits: Limits) -> dict[str, Any]:
  """The fields of a form; those that are lists may stand in it several times."""
  most = limits.images + 3 * limits.texts + len(kind.model_fields)
  part = max(4 * limits.letters, limits.body * 4 // 3)  # base64 is taken here, too
  fields: dict[str, Any] = {}
  try:
    form = await request.form(max_files=limits.images + 1, max_fields=most, max_part_size=part)
    for name, value in form.multi_items():
      value = await value.read() if isinstance(value, UploadFile) else value
      if _is_list(kind, name):
        fields.setdefault(name, []).append(value)
      elif name in fields:
        raise Refused(422, f"Expected one {shown(name, 40)}, found several.", reason="fields")
      else:
        fields[name] = value
  except (HTTPException, FormParserError) as error:
    found = shown(str(getattr(error, "detail", error)), 200)
    raise Refused(400, f"Expected a form in the body, found: {found}", reason="form") from None
  finally:
    await request.close()
  return fields


def _is_list(kind: type[Body], name: str) -> bool:
  field = kind.model_fields.get(name)
  if field is None:
    return False
  kinds = getattr(field.annotation, "__args__", ())
  return list in (get_origin(field.annotation), *map(get_origin, kinds))


def _check(body: Body, limits: Limits) -> None:
  for name in ("images", "texts", "candidates", "classes", "premises"):
    values = getattr(body, name, None)
    if values is None:
      continue
    if not values and name != "premises":
      raise Refused(422, f"Expected {name}, found none.", reason="count")
    limits.count(name, len(values), limits.images if name == "images" else limits.texts)
    for text in values if name != "images" else ():
      limits.text(name, text)
