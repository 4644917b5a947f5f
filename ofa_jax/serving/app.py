"""The service over HTTP: an ASGI application."""

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import fastapi
import numpy as np
import orjson
from fastapi import Request, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

import ofa_jax
from ofa_jax.ports import LOCAL
from ofa_jax.serving import bodies, measures, page
from ofa_jax.serving.gate import Gate
from ofa_jax.serving.limits import Refused
from ofa_jax.serving.operations import Asked, Operation, operations
from ofa_jax.serving.service import Service, late
from ofa_jax.text_files import shown

NPY = "application/x-npy"
_log = logging.getLogger(__name__)


def application(service: Service, *, hosts: Sequence[str] | None = LOCAL) -> Gate:
  """What answers the requests to a service.

  Args:
    service: with its models.
    hosts: that requests may name in their Host header, so that no page of another site speaks to a
      service of this machine under a name of its own; None: any.
  """
  app = fastapi.FastAPI(
    title="ofa_jax", version=ofa_jax.__version__, docs_url=None, redoc_url=None, openapi_url=None
  )
  app.add_exception_handler(Refused, _refused(service))
  app.add_exception_handler(Exception, _failed)
  offered = operations([*service.models.values()])
  for operation in offered:
    _add(app, operation, service)
  _add_pages(app, service, offered)
  hosts = ["*"] if hosts is None else list(hosts)
  inner = TrustedHostMiddleware(app, allowed_hosts=hosts, www_redirect=False)
  return Gate(inner, service=service, paths=[operation.path for operation in offered])


def _add(app: fastapi.FastAPI, operation: Operation, service: Service) -> None:
  async def endpoint(request: Request) -> Response:
    begin = time.monotonic()
    seconds = _seconds(request, service.limits.deadline)
    try:
      async with asyncio.timeout(seconds):
        body = await bodies.read(request, operation.body, service=service)
        model = _model(operation, body.model, service)
        asked = Asked(service, model, begin + seconds)
        answer = await operation.answers(asked, body)
    except TimeoutError:
      raise late(service.limits) from None
    return _told(request, {"model": model.name, **answer.told}, answer.array)

  app.add_api_route(
    operation.path,
    endpoint,
    methods=["POST"],
    summary=operation.summary,
    response_class=Response,
    responses=_responses(operation),
    openapi_extra={
      "requestBody": {"required": True, "content": _contents(operation.body)},
      "parameters": [
        {
          "name": "deadline",
          "in": "query",
          "description": "seconds after which the answer is not wanted any more",
          "schema": {"type": "number", "exclusiveMinimum": 0},
        }
      ],
    },
    name=operation.path.removeprefix("/v1/"),
  )


def _add_pages(app: fastapi.FastAPI, service: Service, offered: Sequence[Operation]) -> None:
  @app.get("/health", summary="Whether the process works.", response_class=Response)
  async def health() -> Response:
    return _json({"alive": service.alive}, status=200 if service.alive else 500)

  @app.get("/ready", summary="Whether requests are taken: 200, or 503.", response_class=Response)
  async def ready() -> Response:
    good = service.alive and service.ready and not service.stopping
    return _json({"ready": good}, status=200 if good else 503)

  @app.get("/metrics", summary="Counters for Prometheus.", response_class=Response)
  async def metrics() -> Response:
    return Response(service.measures.text(), media_type=measures.CONTENT_TYPE)

  @app.get("/v1/models", summary="The models and what they can.", response_class=Response)
  async def models() -> Response:
    listed = [
      {"name": name, "can": [x.path for x in offered if x.can(model)], "is": repr(model.model)}
      for name, model in service.models.items()
    ]
    return _json({"models": listed})

  @app.get("/openapi.json", include_in_schema=False)
  async def schema() -> Response:
    return _json(app.openapi())

  @app.get("/", include_in_schema=False)
  @app.get("/docs", include_in_schema=False)
  async def docs() -> Response:
    content = page.page(app.openapi(), limits=service.limits)
    return Response(content, media_type="text/html", headers=page.HEADERS)


def _model(operation: Operation, name: str | None, service: Service) -> Any:
  """The model that a request names, or the first that can."""
  able = {n: model for n, model in service.models.items() if operation.can(model)}
  if name is None:
    return next(iter(able.values()))
  if name not in able:
    text = f"Expected model: {' or '.join(able)}; found {shown(name, 60)!r}"
    raise Refused(422, text, reason="fields")
  return able[name]


def _seconds(request: Request, most: float) -> float:
  """The deadline that a request asks for, in seconds from now."""
  asked = request.query_params.get("deadline")
  if asked is None:
    return most
  try:
    seconds = float(asked)
  except ValueError:
    seconds = math.nan
  if not 0 < seconds < math.inf:
    text = f"Expected deadline in seconds above 0, found {shown(asked, 40)!r}"
    raise Refused(422, text, reason="fields")
  return min(seconds, most)


def _told(request: Request, told: Mapping[str, Any], array: np.ndarray | None) -> Response:
  """JSON, or the array as NumPy stores it for who asks for that."""
  if NPY not in request.headers.get("accept", ""):
    return _json(told)
  if array is None:
    text = f"Expected Accept: {bodies.JSON} for texts, found {NPY}"
    raise Refused(406, text, reason="type")
  return Response(page.npy(array), media_type=NPY)


def _json(value: Any, *, status: int = 200) -> Response:
  # Floats are written so that they read back as the same float32.
  content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
  return Response(content, status_code=status, media_type=bodies.JSON)


def _refused(service: Service):
  async def handler(request: Request, error: Refused) -> Response:
    service.measures.refused.labels(error.reason).inc()
    response = _json({"detail": str(error)}, status=error.status)
    if error.status in (429, 503):
      response.headers["retry-after"] = "1"
    return response

  return handler


async def _failed(request: Request, error: Exception) -> Response:
  _log.error("%s failed", request.url.path, exc_info=error)
  return _json({"detail": "The service failed at this request; its log says why."}, status=500)


def _contents(kind: type[bodies.Body]) -> dict[str, Any]:
  """The two forms of a body, for OpenAPI."""
  schema = kind.model_json_schema()
  return {form: {"schema": schema} for form in (bodies.JSON, bodies.FORM)}


def _responses(operation: Operation) -> dict[int | str, dict[str, Any]]:
  text = {"content": {bodies.JSON: {"example": {"detail": "Expected ..., found ..."}}}}
  told = {bodies.JSON: {"example": operation.told}}
  return {
    200: {"description": "The answer.", "content": told},
    413: {"description": "The body is too large.", **text},
    415: {"description": "Neither JSON nor a form.", **text},
    422: {"description": "Something in the body is not as it should be.", **text},
    429: {"description": "Too many wait; try again later.", **text},
    503: {"description": "Not ready yet, or stopping.", **text},
    504: {"description": "Not ready within the deadline.", **text},
  }
