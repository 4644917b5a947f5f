"""Uvicorn, with what it lacks: a limit for slow beginnings, and an end that finishes what is there.

On SIGTERM or Ctrl-C new requests are refused with 503 while those that are there are finished; then
the process ends with status 0. A second signal ends it at once.
"""

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ofa_jax.serving.gate import Gate
from ofa_jax.serving.service import Service

CONNECTIONS = 1024
_BEGINNING = 10.0  # seconds for the headers of a request
_HEADERS = 1 << 18  # bytes of them, with what of the body comes along
_LAST = 5  # seconds in which the last answers are to be taken


class _Protocol(HttpToolsProtocol):
  """Hangs up on who begins a request and does not go on, or not to an end."""

  _timer: asyncio.TimerHandle | None = None
  _begun = 0  # bytes of a request whose headers are not complete

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self._timer = self.loop.call_later(_BEGINNING, transport.close)

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    if self.cycle is not None and not self.cycle.response_complete:
      self._stop_timer()
      self._begun = 0
      return
    self._begun += len(data)
    if self._begun > _HEADERS:
      self.transport.close()
    elif self._timer is None:
      self._timer = self.loop.call_later(_BEGINNING, self.transport.close)

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_timer()
    super().connection_lost(exc)

  def _stop_timer(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None


class Server(uvicorn.Server):
  """Serves until a signal, and then until nothing is left to answer."""

  def __init__(self, app: Gate, *, service: Service, host: str, port: int):
    """Makes it ready to `run`.

    Args:
      app: from `app.application`.
      service: behind it.
      host: name or address that is listened at.
      port: 0: any that is free.
    """
    config: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    config |= {"lifespan": "off", "ws": "none", "http": _Protocol}
    super().__init__(
      uvicorn.Config(
        app,
        host=host,
        port=port,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=_LAST,
        **config,
      )
    )
    self._service = service

  def handle_exit(self, sig: int, frame: Any) -> None:
    """Begins the end; the second time it is one."""
    if self._service.stopping:
      self.should_exit = self.force_exit = True
    self._service.stop()

  async def on_tick(self, counter: int) -> bool:
    """Uvicorn's look, ten times a second, whether to go on."""
    if self._service.stopping and not self._service.active:
      self.should_exit = True
    return await super().on_tick(counter)
