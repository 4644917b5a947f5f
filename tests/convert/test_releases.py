"""Downloads, from a server on this machine that answers as the hubs do."""

import hashlib
import http.server
import io
import json
import os
import resource
import subprocess
import sys
import threading
import zipfile

import pytest

from ofa_jax import files, hub
from ofa_jax.convert import releases
from ofa_jax.convert.releases import Address, Release

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
RELEASE = Release("OFA-Sys/chinese-clip-rn50", ("clip_cn_rn50.pt",), "AI-ModelScope/x")
FILE = "/chinese-clip-rn50/clip_cn_rn50.pt"


class Handler(http.server.BaseHTTPRequestHandler):
  """Serves `server.answers`: path -> bytes; `server.cut` bytes of them at most."""

  protocol_version = "HTTP/1.1"

  def do_GET(self):
    content = self.server.answers.get(self.path)
    start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
    self.server.asked.append((self.path, start))
    if content is None or start > len(content):
      self.send_response(404 if content is None else 416)
      self.send_header("Content-Length", "0")
      self.end_headers()
      return
    whole = len(content)
    content = content[start:]
    self.send_response(206 if start else 200)
    self.send_header("Content-Length", str(len(content)))
    self.send_header("ETag", f'"{SHA256}"')
    self.send_header("X-Linked-Size", str(whole))
    self.send_header("X-Repo-Commit", "0" * 40)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content[: self.server.cut])
    self.close_connection = True

  do_HEAD = do_GET  # noqa: N815

  def do_POST(self):
    self.rfile.read(int(self.headers["Content-Length"]))
    self.do_GET()

  def log_message(self, *_):
    pass


@pytest.fixture
def server(monkeypatch):
  for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    server.answers, server.asked, server.cut = {FILE: CONTENT}, [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_mirrors_serve_files(server, tmp_path, monkeypatch):
  path = releases.download(RELEASE, tmp_path / "a", source=f"{server.url}/")
  assert path.read_bytes() == CONTENT
  monkeypatch.setenv("OFA_JAX_SOURCE", server.url)
  assert hub.download("RN50", tmp_path / "b").read_bytes() == CONTENT
  assert [p.name for p in (tmp_path / "b").iterdir()] == ["clip_cn_rn50.pt"]


def test_downloads_go_on_where_they_were_cut(server, tmp_path):
  server.cut = 300_000
  with pytest.raises(ValueError, match=r"found: 300,000 of 1,024,000 bytes came\. Start again"):
    releases.download(RELEASE, tmp_path, source=server.url)
  assert [p.name for p in tmp_path.iterdir()] == ["clip_cn_rn50.pt.part"]
  server.cut = None
  path = releases.download(RELEASE, tmp_path, source=server.url)
  assert path.read_bytes() == CONTENT
  assert server.asked[-1] == (FILE, 300_000)


def test_a_full_disk_is_told_and_the_download_goes_on(server, tmp_path):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))  # writing beyond is an OSError
  try:
    with pytest.raises(files.FullDiskError, match=f"room for {tmp_path}, found: File too large"):
      hub.open_model("RN50", download_root=tmp_path, source=server.url)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert hub.download("RN50", tmp_path, source=server.url).read_bytes() == CONTENT
  assert server.asked[-1] == (FILE, 300_000)
  assert [p.name for p in tmp_path.iterdir()] == ["clip_cn_rn50.pt"]


def test_a_longer_rest_of_another_file_is_replaced(server, tmp_path):
  (tmp_path / "clip_cn_rn50.pt.part").write_bytes(CONTENT * 2)
  assert releases.download(RELEASE, tmp_path, source=server.url).read_bytes() == CONTENT


def test_a_mirrors_checksum_is_compared(server, tmp_path):
  server.answers[f"{FILE}.sha256"] = f"{SHA256}  clip_cn_rn50.pt\n".encode()
  server.answers[FILE] = CONTENT[:-1] + b"x"
  with pytest.raises(ValueError, match=rf"expected SHA-256 {SHA256}, found .* start again"):
    releases.download(RELEASE, tmp_path, source=server.url)
  assert not list(tmp_path.iterdir())
  server.answers[FILE] = CONTENT
  assert releases.download(RELEASE, tmp_path, source=server.url).read_bytes() == CONTENT


def test_modelscope_serves_chinese_clips(server, tmp_path, monkeypatch):
  monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
  entry = {"Path": "clip_cn_rn50.pt", "Sha256": SHA256, "Size": len(CONTENT)}
  api = "/api/v1/models/AI-ModelScope/x/repo/files?Revision=master&Recursive=True"
  server.answers = {
    api: json.dumps({"Code": 200, "Data": {"Files": [{"Path": "README.md"}, entry]}}).encode(),
    "/models/AI-ModelScope/x/resolve/master/clip_cn_rn50.pt": CONTENT,
  }
  path = releases.download(RELEASE, tmp_path / "a", source="modelscope")
  assert path.read_bytes() == CONTENT
  server.answers[api] = json.dumps({"Data": {"Files": [{**entry, "Sha256": "0" * 64}]}}).encode()
  with pytest.raises(ValueError, match="expected SHA-256 000"):
    releases.download(RELEASE, tmp_path / "b", source="modelscope")
  server.answers[api] = b'{"Code": 404}'
  with pytest.raises(ValueError, match="found: no such file in its list"):
    releases.download(RELEASE, tmp_path / "c", source="modelscope")
  with pytest.raises(ValueError, match="on the Hugging Face Hub only"):
    hub.download("OFA-tiny", tmp_path, source="modelscope")
  assert all(
    hub.RELEASES[name].modelscope == f"AI-ModelScope/{hub.RELEASES[name].repo.split('/')[1]}"
    for name in ("ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50")
  )


def addressed(server, *, archive=""):
  """A release of two files at addresses of their own; the SHA-256 of the second is known."""
  addresses = (
    Address(f"{server.url}/checkpoints", archive=archive),
    Address(f"{server.url}/utils/BPE", sha256=SHA256),
  )
  return Release("OFA-Sys/OFA", ("x.pt", "dict.txt"), addresses=addresses)


def test_files_may_have_addresses_of_their_own(server, tmp_path):
  server.answers = {"/checkpoints/x.pt": b"weights", "/utils/BPE/dict.txt": CONTENT}
  for _ in range(2):
    path = releases.download(addressed(server), tmp_path / "a")
    assert path.read_bytes() == b"weights"
  assert (tmp_path / "a" / "dict.txt").read_bytes() == CONTENT
  assert [path for path, _ in server.asked] == ["/checkpoints/x.pt", "/utils/BPE/dict.txt"]
  server.answers["/utils/BPE/dict.txt"] = b"another"
  with pytest.raises(ValueError, match=rf"dict\.txt.*: expected SHA-256 {SHA256}"):
    releases.download(addressed(server), tmp_path / "b")
  with pytest.raises(ValueError, match=r"x\.pt of OFA-Sys/OFA, .* the server of its authors only"):
    releases.download(addressed(server), tmp_path / "c", source="modelscope")
  server.answers.clear()
  with pytest.raises(ValueError, match=r"404.*source \(OFA_JAX_SOURCE=<a mirror's URL>\), or put"):
    releases.download(addressed(server), tmp_path / "d")


def test_mirrors_have_them_in_the_folders_of_these_addresses(server, tmp_path):
  release = addressed(server)
  server.answers = {"/m/checkpoints/x.pt": b"weights", "/m/BPE/dict.txt": b"another"}
  with pytest.raises(ValueError, match=rf"dict\.txt: expected SHA-256 {SHA256}"):
    releases.download(release, tmp_path, source=f"{server.url}/m/")
  assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
  server.answers["/m/BPE/dict.txt"] = CONTENT
  assert releases.download(release, tmp_path, source=f"{server.url}/m").read_bytes() == b"weights"


def test_weights_may_be_in_an_archive(server, tmp_path):
  def packed(*names):
    with zipfile.ZipFile(packing := io.BytesIO(), "w") as archive:
      for name in names:
        archive.writestr(name, name)
    return packing.getvalue()

  release, place = addressed(server, archive="x.zip"), "/checkpoints/x.zip"
  server.answers = {place: packed("x/clip/y.pt", "x/x.pt"), "/utils/BPE/dict.txt": CONTENT}
  path = releases.download(release, tmp_path / "a")
  assert path == tmp_path / "a" / "x.pt" and path.read_bytes() == b"x/x.pt"
  assert {x.name for x in path.parent.iterdir()} == {"x.pt", "x.zip", "dict.txt"}
  whole = server.answers[place]
  server.answers[place] = whole.replace(b"x/x.ptx/x.pt", b"x/x.ptx/x.px")  # the second is content
  for _ in range(2):  # it is downloaded again
    with pytest.raises(ValueError, match=r"whole \.zip, found: Bad CRC-32.*start again"):
      releases.download(release, tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())
  locked = bytearray(whole)
  for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
    locked[whole.rindex(mark) + flags] |= 1  # of x.pt: encrypted
  server.answers[place] = bytes(locked)
  with pytest.raises(ValueError, match=r"encrypted.*; put x\.pt beside it yourself"):
    releases.download(release, tmp_path / "locked")
  server.answers[place] = packed("x/clip/y.pt")
  with pytest.raises(ValueError, match=r"x\.zip: expected one x\.pt in it, found 0"):
    releases.download(release, tmp_path / "c")


def test_what_cannot_be_reached_is_one_line(server, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r"found: HTTP Error 404.*yourself\.$") as raised:
    releases.download(RELEASE._replace(repo="a/b"), tmp_path, source=server.url)
  assert raised.value.__cause__ is None and raised.value.__suppress_context__
  server.shutdown()
  server.server_close()
  for source in (server.url, "modelscope"):
    monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
    with pytest.raises(ValueError, match=r"\[Errno \d+\] Connection refused") as raised:
      releases.download(RELEASE, tmp_path, source=source)
    assert "\n" not in str(raised.value) and raised.value.__suppress_context__
  with pytest.raises(ValueError, match="Expected huggingface, modelscope or the https://"):
    releases.download(RELEASE, tmp_path, source="file:///etc")


def test_another_hugging_face_hub_may_be_named(server, tmp_path):
  repo = RELEASE.repo
  info = {"type": "file", "path": "clip_cn_rn50.pt", "size": len(CONTENT), "oid": "0" * 40}
  info["lfs"] = {"oid": SHA256, "size": len(CONTENT), "pointerSize": 1}
  server.answers = {
    f"/api/models/{repo}/paths-info/main": json.dumps([info]).encode(),
    f"/{repo}/resolve/main/clip_cn_rn50.pt": CONTENT,
  }
  code = (
    "import pathlib, sys; from ofa_jax.convert import releases\n"
    f"release = releases.Release({repo!r}, ('clip_cn_rn50.pt',))\n"
    "try:\n  print(releases.download(release, pathlib.Path(sys.argv[1])))\n"
    "except ValueError as error:\n  sys.exit(str(error))"
  )
  environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}
  command = [sys.executable, "-c", code, str(tmp_path / "a")]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "a" / "clip_cn_rn50.pt").read_bytes() == CONTENT
  command[-1] = str(tmp_path / "b")
  environment["HF_HUB_OFFLINE"] = "1"
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert "offline mode is enabled" in done.stderr and "yourself." in done.stderr
