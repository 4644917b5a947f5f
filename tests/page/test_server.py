"""The page brings nothing from elsewhere and gives no file of the machine away."""

import json
import os
import re
import types

import pytest
from PIL import Image

from ofa_jax.page import layout, server
from ofa_jax.page.words import ENGLISH, LANGUAGES

pytest.importorskip("gradio", reason="no gradio, which is of the extra [demo]")
from starlette.testclient import TestClient

SECRET = "what nobody should read"


class Model:
  """Stands for an OFA that captions only."""

  def __init__(self):
    self.calibrations, self.searches = {}, {}
    self.config = types.SimpleNamespace(num_bins=0)

  def caption(self, images, *, search, return_scores):
    return [f"{images[0].width} wide"], [0.0]


@pytest.fixture(scope="module")
def closed():
  before = dict(os.environ)
  with server.closed_gradio():
    folder = os.environ["GRADIO_TEMP_DIR"]
    yield
  names = os.environ.keys() | before.keys()
  assert {x for x in names if os.environ.get(x) != before.get(x)} <= {"PYTEST_CURRENT_TEST"}
  assert not os.path.exists(folder)


@pytest.fixture(scope="module", params=LANGUAGES.values(), ids=list(LANGUAGES))
def words(request):
  return request.param


@pytest.fixture(scope="module")
def client(closed, words):
  models = layout.Models(ofa=Model(), names=["some/where/mi`cro"], draws=True)
  page = layout.build(models, words=words)
  with TestClient(server.application(page, words=words), base_url="http://127.0.0.1") as client:
    yield client


def test_the_page_refers_to_no_other_place(client, words):
  answer = client.get("/")
  assert answer.status_code == 200 and words.title in answer.text
  assert words.drawing in answer.text and "`micro`" in answer.text
  assert "some/where" not in answer.text  # folders of the machine
  assert not re.findall(r"""<[^>]*\b(?:src|href|content)\s*=\s*["']?(?:https?:)?//""", answer.text)
  assert not re.findall(r"@import|url\(\s*['\"]?https?:", answer.text)
  code = {"en": "en", "zh": "zh-CN"}[words.code]
  assert f'lang="{code}"' in answer.text
  policy = answer.headers["content-security-policy"]
  assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
  for name in re.findall(r'(?:src|href)="(?:\./|/)([^"]+)"', answer.text):
    assert client.get(f"/{name}").status_code == 200, name
  style = client.get("/theme.css")
  assert style.status_code == 200 and "https:" not in style.text and "@font-face" not in style.text
  config = client.get("/config").json()
  assert config["analytics_enabled"] is False and not config["stylesheets"]
  assert all(x["api_visibility"] == "private" for x in config["dependencies"])


@pytest.fixture
def secret(tmp_path):
  (tmp_path / "secret.png").write_text(SECRET)
  return tmp_path / "secret.png"


def test_no_file_of_the_machine_is_served(client, secret, monkeypatch):
  monkeypatch.chdir(secret.parent)
  here = os.path.relpath(secret, os.environ["GRADIO_TEMP_DIR"])
  names = ["/etc/passwd", "//etc/passwd", "../../../../../../etc/passwd", str(secret), "secret.png",
           os.path.join(os.environ["GRADIO_TEMP_DIR"], here), "~/.bashrc", "/proc/self/environ",
           f"file://{secret}", "http://127.0.0.1:1/x", "https://example.org/x", "/etc/passwd%00.png"
           ]  # fmt: skip
  for name in names:
    for way in ("gradio_api/file=", "gradio_api/file/", "file=", "gradio_api/proxy=", "static/",
                "assets/", "svelte/"):  # fmt: skip
      escaped = name.replace("/", "%2f").replace(".", "%2e")
      for path in (f"/{way}{name}", f"/{way}{escaped}"):
        answer = client.get(path)
        assert answer.status_code in (403, 404, 422), (path, answer.status_code)
        assert SECRET not in answer.text and "root:" not in answer.text, path


def run(client, path, session):
  """What the caption's tab says of a picture that a request names; or the answer that refuses."""
  picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
  config = client.get("/config").json()
  body = {"data": [picture], "fn_index": config["dependencies"][0]["id"], "session_hash": session}
  answer = client.post("/gradio_api/queue/join", json=body)
  if answer.status_code != 200:
    return answer
  with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as events:
    for line in events.iter_lines():
      if line.startswith("data:") and '"process_completed"' in line:
        return json.loads(line.removeprefix("data:"))
  raise AssertionError("no end")


def test_pictures_are_uploads_only(client, secret):
  Image.new("RGB", (37, 20)).save(secret.parent / "x.png")
  content = (secret.parent / "x.png").read_bytes()
  (path,) = client.post("/gradio_api/upload", files={"files": ("x.png", content)}).json()
  assert path.startswith(os.environ["GRADIO_TEMP_DIR"])
  assert client.get(f"/gradio_api/file={path}").content == content
  told = run(client, path, "a")
  assert told["success"] and "37 wide" in told["output"]["data"][0]
  others = (str(secret), str(secret.parent / "x.png"), "/etc/passwd", f"{path}/../../../etc/passwd",
            "x.png", "http://127.0.0.1:1/x.png", " HTTPS://example.org/x.png", "ftp://x/y",
            "file:///etc/passwd", f"{path}\0.png", 3)  # fmt: skip
  for name in others:
    assert run(client, name, "b").status_code == 400, name
  link = os.path.join(os.path.dirname(path), "link.png")
  os.symlink(secret.parent / "x.png", link)
  assert run(client, link, "b").status_code == 400
  os.unlink(link)
  body = json.dumps({"data": [{"path": "/etc/passwd"}]})
  for content in (body.encode("utf-16"), body.replace("path", "p\\u0061th").encode(), b"{", b"["):
    answer = client.post("/gradio_api/queue/join", content=content)
    assert answer.status_code == 400, content
  kept = [x for _, _, names in os.walk(os.environ["GRADIO_TEMP_DIR"]) for x in names]
  assert {*kept} == {"x.png"}


def test_gradio_itself_takes_uploads_only(closed, secret):
  """Where the page is mounted without the guard."""
  Image.new("RGB", (37, 20)).save(secret.parent / "x.png")
  page = layout.build(layout.Models(ofa=Model()), words=ENGLISH)
  guard = server.application(page, words=ENGLISH).app
  with TestClient(guard._app, base_url="http://127.0.0.1") as client:
    told = run(client, str(secret.parent / "x.png"), "d")
  assert not told["success"] and "wide" not in json.dumps(told)


def test_what_is_too_large_or_not_of_the_page_is_refused(client, monkeypatch):
  monkeypatch.setattr(server, "MAX_BODY", 1000)
  assert client.post("/gradio_api/queue/join", content=b" " * 1001).status_code == 413
  large = b"\x89PNG" + bytes(server.MAX_UPLOAD)
  assert client.post("/gradio_api/upload", files={"files": ("x.png", large)}).status_code == 413
  for path in ("run/predict", "api/predict", "call/predict", "call/v2/predict", "vibe-edit",
               "component_server", "process_recording", "run-history/connect"):  # fmt: skip
    assert client.post(f"/gradio_api/{path}", json={}).status_code == 403, path
  for path in ("/monitoring", "/monitoring/summary", "/gradio_api/vibe-code", "/docs"):
    assert client.get(path).status_code == 403, path
  answer = client.get("/", headers={"host": "evil.example"})
  assert answer.status_code == 400 and ENGLISH.title not in answer.text
