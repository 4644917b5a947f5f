"""GCS and S3 on this machine: emulators behind a proxy that fails as a test asks.

The emulators lack what a test needs of the services: GCS' condition that there is no such object
(`ifGenerationMatch=0`), faults, refusals. The proxy adds these and counts what is asked for.
"""

import contextlib
import http.client
import http.server
import json
import logging
import os
import re
import socketserver
import threading
import urllib.parse
from collections.abc import Callable, Iterator

BUCKET = "bucket"
SCHEMES = ("gs", "s3")
Rule = Callable[[str, str, int], int | None]  # method, path, number of the request -> status


def every(nth: int) -> Rule:
  """503 for every n-th request."""
  return lambda method, path, number: 503 if number % nth == nth - 1 else None


def read_only(method: str, path: str, number: int) -> int | None:
  """403 for what would change something."""
  del path, number
  return 403 if method in ("POST", "PUT", "DELETE") else None


class Service:
  """One emulator behind its proxy.

  Attributes:
    rule: what fails; None: nothing does.
    asked: (method, path) of every request so far.
  """

  def __init__(self, port: int):
    self.rule: Rule | None = None
    self.asked: list[tuple[str, str]] = []
    self.emulator = port
    service = self

    class Proxy(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def _forward(self):
        body = self._body()
        service.asked.append((self.command, self.path))
        status = service.rule and service.rule(self.command, self.path, len(service.asked))
        if status:
          self._answer(status, {"Content-Type": "text/plain"}, b"the test says so")
        else:
          headers = {k: v for k, v in self.headers.items() if k.lower() not in _OF_THE_CONNECTION}
          self._answer(*service.ask(self.command, self.path, headers, body))

      do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _forward  # noqa: N815

      def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
          return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
          parts.append(self.rfile.read(size))
          self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

      def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        own = {k.lower(): v for k, v in headers.items()}
        length = own.get("content-length") if self.command == "HEAD" else None
        for name in own.keys() - _OF_THE_CONNECTION:
          self.send_header(name, own[name].replace(f":{port}/", f":{service.port}/"))
        if status not in (204, 304):
          self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
          self.wfile.write(content)

      def log_message(self, *_):
        pass

    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
      daemon_threads = True
      request_queue_size = 128

      def handle_error(self, *_):
        pass  # who asked has gone

    self._server = Server(("127.0.0.1", 0), Proxy)
    self.port = self._server.server_address[1]
    self.url = f"http://127.0.0.1:{self.port}"
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def ask(
    self, method: str, path: str, headers: dict[str, str], body: bytes
  ) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of the emulator's answer."""
    connection = http.client.HTTPConnection("127.0.0.1", self.emulator, timeout=60)
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content

  def close(self) -> None:
    """Ends the proxy."""
    self._server.shutdown()
    self._server.server_close()


class Gcs(Service):
  """GCS' emulator with the generations of objects, as header and as condition, which it lacks."""

  def __init__(self, port: int):
    super().__init__(port)
    self._lock = threading.Lock()

  def ask(self, method, path, headers, body):
    if body.endswith(_END_OF_UPLOAD):  # gcsfs' end; of b"\r\n" the emulator takes both bytes away
      body = body.removesuffix(_END_OF_UPLOAD) + b"\r" + _END_OF_UPLOAD
    url = urllib.parse.urlparse(path)
    query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
    name = query.get("name") or url.path.partition("/o/")[2]
    if not name and body and (named := re.search(rb'"name": *"([^"]+)"', body[:4096])):
      name = named[1].decode()
    if not name:
      return super().ask(method, path, headers, body)
    with self._lock:
      reads = method == "GET" and (query.get("alt") == "media" or "/download/" in url.path)
      conditions = [query.get(k) for k in ("ifGenerationMatch", "ifGenerationNotMatch")]
      now = self._generation(urllib.parse.unquote(name)) if reads or any(conditions) else "0"
      wanted, unwanted = conditions
      if wanted is not None and wanted != now and not (reads and now == "0"):
        return 412, {}, b"{}"
      if unwanted is not None and unwanted == now and now != "0":
        return 304, {}, b""
      status, given, content = super().ask(method, path, headers, body)
      if reads and status in (200, 206):
        given["x-goog-generation"] = now
      return status, given, content

  def _generation(self, name: str) -> str:
    path = f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}"
    status, _, content = super().ask("GET", path, {}, b"")
    return json.loads(content)["generation"] if status == 200 else "0"


_END_OF_UPLOAD = b"\n--==0==--"
_OF_THE_CONNECTION = {
  *("transfer-encoding", "content-length", "connection", "expect", "date", "server"),
}


def environment(services: dict[str, Service]) -> dict[str, str]:
  """What points every library at the emulators."""
  return {
    "STORAGE_EMULATOR_HOST": services["gs"].url,
    "TENSORSTORE_GCS_HTTP_URL": services["gs"].url,
    "GOOGLE_CLOUD_PROJECT": "test",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks a service that is not emulated
    "GCE_METADATA_HOST": "127.0.0.1:1",  # nobody is asked for credentials
    "NO_GCE_CHECK": "true",
    "AWS_ENDPOINT_URL": services["s3"].url,
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
  }


@contextlib.contextmanager
def running() -> Iterator[dict[str, Service]]:
  """Both services, by scheme, with an empty bucket each; the environment points at them."""
  from gcp_storage_emulator.server import create_server
  from moto.server import ThreadedMotoServer

  for name in ("werkzeug", "gcp_storage_emulator"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  gcs = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
  gcs.start()
  s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
  s3.start()
  services = {"gs": Gcs(_port_of(gcs)), "s3": Service(s3.get_host_and_port()[1])}
  changed = environment(services)
  before = {name: os.environ.get(name) for name in changed}
  os.environ.update(changed)
  try:
    _call(services["s3"], "PUT", f"/{BUCKET}")
    yield services
  finally:
    for name, value in before.items():
      os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    for service in services.values():
      service.close()
    gcs.stop()
    s3.stop()


def _port_of(server) -> int:
  return server._api._httpd.server_address[1]


def _call(service: Service, method: str, path: str) -> None:
  connection = http.client.HTTPConnection("127.0.0.1", service.port)
  connection.request(method, path)
  assert connection.getresponse().status < 300
  connection.close()
