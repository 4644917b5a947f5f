"""The page on a port of this machine: nothing comes from elsewhere, and no file of it gets out."""

import contextlib
import json
import logging
import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from ofa_jax.page import shown
from ofa_jax.page.words import Words
from ofa_jax.ports import LOCAL

if TYPE_CHECKING:
  import gradio

MAX_UPLOAD = 32 << 20  # bytes of a picture's file
MAX_BODY = 1 << 20  # bytes of any other request
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "PingFang SC", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")

# How Gradio is set up, whatever the environment says.
_GRADIO = {
  "GRADIO_ANALYTICS_ENABLED": "False",
  "GRADIO_RUN_HISTORY": "False",
  "GRADIO_SSR_MODE": "False",
  "GRADIO_MCP_SERVER": "False",
  "HF_HUB_DISABLE_TELEMETRY": "1",
}

# What a browser may load: the page's own. Gradio puts scripts and styles into the page itself.
_POLICY = (
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
  "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
  "worker-src 'self' blob:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
  "form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = {
  "content-security-policy": _POLICY,
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
}

# Parts of Gradio's server that this page does not use: some fetch addresses, some run code, some
# tell what others did.
_CLOSED = re.compile(
  r"^/(gradio_api/)?(file=[a-z+]*:|file=//|proxy=|run-history|runs|deep_link|vibe|undo-vibe|"
  r"process_recording|component_server|custom_component|profiling|call|run/|api/|openapi|"
  r"token|login|logout|dev|docs|redoc)|^/monitoring",
  re.IGNORECASE,
)
_UPLOADS = "/gradio_api/upload"
# Of Gradio's page: what refers to other places, for those who link to it.
_REMOTE = re.compile(r'<(meta|link|script)\b[^>]*\b(content|href|src)="https?://[^>]*>', re.DOTALL)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@contextlib.contextmanager
def closed_gradio() -> Iterator[None]:
  """Gradio for this process: it tells nobody of it, and keeps files in a folder that goes away.

  To be entered before the page is built.

  Raises:
    ValueError: there is no Gradio.
  """
  with tempfile.TemporaryDirectory(prefix="ofa_jax-page-") as folder:
    given = {**_GRADIO, "GRADIO_TEMP_DIR": folder}
    given["GRADIO_EXAMPLES_CACHE"] = os.path.join(folder, "examples")
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
      _check_gradio()
      yield
    finally:
      for name, value in before.items():
        if value is None:
          del os.environ[name]
        else:
          os.environ[name] = value


def _check_gradio() -> None:
  try:
    import gradio  # noqa: F401
  except ModuleNotFoundError as error:
    if error.name != "gradio":
      raise
    raise ValueError(
      'Expected Gradio for the page, found none. Install the extra: pip install -e ".[demo]"'
    ) from error


def application(page: "gradio.Blocks", *, words: Words, hosts: Sequence[str] = LOCAL) -> Any:
  """The page as an ASGI application.

  Args:
    page: from `layout.build`.
    words: of the page.
    hosts: by which names it may be asked for; "*" is any. A page of another site that gives
      itself this machine's address is refused so.
  """
  import fastapi
  import gradio
  from starlette.middleware.trustedhost import TrustedHostMiddleware

  theme = gradio.themes.Default(
    font=[_font(gradio, name) for name in FONTS], font_mono=[_font(gradio, name) for name in MONO]
  )
  app = fastapi.FastAPI(openapi_url=None)
  gradio.mount_gradio_app(
    app,
    page,
    path="",
    theme=theme,
    css=shown.STYLE,
    allowed_paths=[],
    show_error=False,
    max_file_size=MAX_UPLOAD,
    ssr_mode=False,
    footer_links=[],
    enable_monitoring=False,
    pwa=False,
    mcp_server=False,
  )
  guarded = Guard(app, words=words)
  return TrustedHostMiddleware(guarded, allowed_hosts=list(hosts), www_redirect=False)


def _font(gradio, name: str) -> Any:
  """A font of the reader's machine: nothing is loaded for it."""
  return gradio.themes.Font(name)


def end_in_order() -> None:
  """From here on SIGTERM ends the process with what it left behind tidied, status 0."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def serve(app: Any, opened: socket.socket) -> None:
  """Serves an application until the process is told to end, after `end_in_order`."""
  import uvicorn

  logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
  config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
  # It passes a signal that ended it on to the handlers that were there before.
  uvicorn.Server(config).run(sockets=[opened])


class Guard:
  """Refuses what the page does not use, and keeps what it sends free of other places."""

  def __init__(self, app: Any, *, words: Words):
    """Stands before an ASGI application, within `closed_gradio`.

    Args:
      app: the application.
      words: of the page.
    """
    self._app = app
    self._uploads = os.path.realpath(os.environ["GRADIO_TEMP_DIR"])
    code = "zh-CN" if words.code == "zh" else words.code
    self._lang = f'lang="{code}"'
    # Gradio's own texts follow the browser's language; these are to follow the page's.
    given = {"language": json.dumps(code), "languages": json.dumps([code])}
    told = "".join(
      f"Object.defineProperty(navigator,{json.dumps(name)},{{get:()=>{value}}});"
      for name, value in given.items()
    )
    self._script = f"<script>{told}</script>"

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    path = scope["path"]
    if _CLOSED.match(path):
      await _refuse(send, 403, "This page does not have that.")
      return
    if scope["method"] == "POST" and path.rstrip("/") != _UPLOADS:
      body = await _body(receive)
      if body is None:
        await _refuse(send, 413, f"Expected at most {MAX_BODY} bytes.")
        return
      if _names_others(body, self._uploads):
        await _refuse(send, 400, "Expected an uploaded picture, found another place.")
        return
      receive = _again(body, receive)
    page = path == "/"
    if page:  # to be read here
      headers = [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]
      scope = {**scope, "headers": headers}
    await self._app(scope, receive, self._sender(send, page=page))

  def _sender(self, send: Send, *, page: bool) -> Send:
    start, parts = {}, []

    async def pass_on(message):
      if message["type"] == "http.response.start":
        kept = [(k, v) for k, v in message["headers"] if k.decode().lower() not in _HEADERS]
        added = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
        message = {**message, "headers": [*kept, *added]}
        if not page:
          await send(message)
        start.update(message)
        return
      if not page or message["type"] != "http.response.body":
        await send(message)
        return
      parts.append(message.get("body", b""))
      if not message.get("more_body"):
        body = self._own(b"".join(parts).decode()).encode()
        lengths = {b"content-length": str(len(body)).encode()}
        headers = [(k, lengths.get(k.lower(), v)) for k, v in start["headers"]]
        await send({**start, "headers": headers})
        await send({**message, "body": body})

    return pass_on

  def _own(self, text: str) -> str:
    """The page without references to other places, in its own language."""
    text = _REMOTE.sub("", text).replace('lang="en"', self._lang, 1)
    return text.replace("<head>", f"<head>{self._script}", 1)


async def _refuse(send: Send, status: int, text: str) -> None:
  headers = [(b"content-type", b"text/plain; charset=utf-8")]
  headers += [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
  await send({"type": "http.response.start", "status": status, "headers": headers})
  await send({"type": "http.response.body", "body": text.encode()})


async def _body(receive: Receive) -> bytes | None:
  """All of a request; None where it is too much."""
  body = b""
  while True:
    message = await receive()
    body += message.get("body", b"")
    if len(body) > MAX_BODY:
      return None
    if not message.get("more_body"):
      return body


def _again(body: bytes, receive: Receive) -> Receive:
  """Receives what was read already, and then what comes."""
  left = [{"type": "http.request", "body": body, "more_body": False}]

  async def once_more():
    return left.pop() if left else await receive()

  return once_more


def _names_others(body: bytes, uploads: str) -> bool:
  """Whether a request names a file that is not one of the uploads.

  Gradio would copy a file of this machine among them, or fetch an address, and serve the copy: it
  looks after that only in applications that are not mounted.
  """
  try:
    waiting = [json.loads(body)]
  except (ValueError, RecursionError):
    return bool(body)
  while waiting:
    value = waiting.pop()
    if isinstance(value, dict):
      path = value.get("path")
      if path is not None and not _is_upload(path, uploads):
        return True
      waiting += value.values()
    elif isinstance(value, list):
      waiting += value
  return False


def _is_upload(path: object, uploads: str) -> bool:
  if not isinstance(path, str) or "\0" in path:
    return False
  return os.path.isabs(path) and pathlib.Path(os.path.realpath(path)).is_relative_to(uploads)
