"""What every request passes first: whole bodies of a limited size and time, and nobody at the end.

A body is read before anything of it is parsed. Past this gate no client can be slow, and one that
has gone costs nothing more: its rows are taken out of the queue.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

import orjson

from ofa_jax.serving.limits import Refused
from ofa_jax.serving.service import Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_DISCARDED = 4  # times the largest body: so much more is read of one that is too large


class _Gone(Exception):  # noqa: N818
  """The client has hung up."""


class Gate:
  """An ASGI application around another one."""

  def __init__(self, app: App, *, service: Service, paths: Collection[str]):
    """Lets requests with bodies through to `app` as the service's limits allow.

    Args:
      app: what answers them.
      service: with its limits and measures.
      paths: that are counted by name.
    """
    self._app, self._service, self._limits = app, service, service.limits
    self._paths = frozenset(paths)

  async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
    """Answers a request, or says why not."""
    if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
      await self._app(scope, receive, send)
      return
    service, begin = self._service, time.monotonic()
    status, body = 0, bytearray()

    async def counted(message: Message) -> None:
      nonlocal status
      status = message.get("status", status)
      async with asyncio.timeout(self._limits.reading):  # of one who does not read
        await send(message)

    service.active += 1
    service.measures.active.set(service.active)
    try:
      if service.stopping:
        raise Refused(503, "Try elsewhere: the service is stopping.", reason="stopping")
      if not service.ready:
        raise Refused(503, "Try again later: programs are being compiled.", reason="starting")
      await self._read(scope, receive, body)
      await self._pass_on(scope, bytes(body), receive, counted)
    except Refused as refused:
      service.measures.refused.labels(refused.reason).inc()
      with contextlib.suppress(TimeoutError):
        await _say(counted, refused)
    except _Gone:
      service.measures.refused.labels("gone").inc()
    except TimeoutError:
      service.measures.refused.labels("unread").inc()
    except Exception:  # the application raises again what it has answered and logged as a fault
      if not status:
        raise
    finally:
      service.held -= len(body)
      service.active -= 1
      service.measures.active.set(service.active)
      path = scope["path"] if scope["path"] in self._paths else "other"
      service.measures.requests.labels(path, status).inc()
      service.measures.seconds.labels(path).observe(time.monotonic() - begin)

  async def _read(self, scope: Message, receive: Receive, body: bytearray) -> None:
    """Reads the whole body; its bytes are counted in `service.held`.

    Raises:
      Refused: it is too large or too slow, or others hold too much.
      _Gone: it ends before its end.
    """
    most, headers = self._limits.body, dict(scope["headers"])
    declared = int(headers.get(b"content-length", 0))  # the server has seen that it is a number
    too_large = Refused(
      413,
      f"Expected a body of at most {most:,} bytes, found {declared or 'more'}. Send fewer or "
      "smaller pictures.",
      reason="body",
    )
    if declared > _DISCARDED * most or (declared > most and b"expect" in headers):
      raise too_large
    size, more = 0, True
    try:
      async with asyncio.timeout(self._limits.reading):
        while more:
          message = await receive()
          if message["type"] == "http.disconnect":
            raise _Gone
          part, more = message.get("body", b""), message.get("more_body", False)
          size += len(part)
          if size > _DISCARDED * most:
            break
          if max(size, declared) <= most:
            if self._service.held + len(part) > self._limits.held:
              text = "Try again later: other requests hold the memory that there is for pictures."
              raise Refused(429, text, reason="memory")
            self._service.held += len(part)
            body += part
          # A client that sends too much reads no answer before it has sent it.
    except TimeoutError:
      text = f"Expected the body within {self._limits.reading:g} s, found {size:,} bytes of it."
      raise Refused(408, text, reason="slow") from None
    if size > most:
      raise too_large

  async def _pass_on(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
    """Has the request answered, unless its client hangs up before."""
    given = False
    gone = asyncio.ensure_future(_hung_up(receive))

    async def replay() -> Message:
      nonlocal given
      if given:
        return await asyncio.shield(gone)
      given = True
      return {"type": "http.request", "body": body, "more_body": False}

    answer = asyncio.ensure_future(self._app(scope, replay, send))
    try:
      await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
      if not answer.done():
        answer.cancel()
        await asyncio.wait({answer})
        raise _Gone
      answer.result()
    finally:
      for task in (answer, gone):
        task.cancel()


async def _hung_up(receive: Receive) -> Message:
  """Returns when the client has."""
  while (message := await receive())["type"] != "http.disconnect":
    pass
  return message


async def _say(send: Send, refused: Refused) -> None:
  """Answers with the reason, and ends the connection: what follows may be the rest of a body."""
  content = orjson.dumps({"detail": str(refused)})
  headers = [
    (b"content-type", b"application/json"),
    (b"content-length", b"%d" % len(content)),
    (b"connection", b"close"),
    *([(b"retry-after", b"1")] if refused.status in (429, 503) else []),
  ]
  await send({"type": "http.response.start", "status": refused.status, "headers": headers})
  await send({"type": "http.response.body", "body": content})
