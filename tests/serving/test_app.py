"""What a request may be, what it is answered, and that hostile ones cost nobody else an answer."""

import base64
import concurrent.futures
import contextlib
import io
import json
import re
import socket
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx", reason="the extra test is not installed")

from ofa_jax.serving import operations  # noqa: E402 (they need what is skipped for)
from tests.serving import stand_in  # noqa: E402


def encoded(colour=(10, 20, 30), *, size=(5, 4), form="png") -> bytes:
  file = io.BytesIO()
  Image.new("RGB", size, colour).save(file, format=form)
  return file.getvalue()


PNG = encoded()
IN_BASE64 = base64.b64encode(PNG).decode()
GOOD = {"texts": ["a", "bcd"]}


@pytest.fixture(scope="module")
def model():
  return stand_in.Model()


@pytest.fixture(scope="module")
def port(model):
  made = stand_in.service(
    model, body=100_000, pixels=10_000, images=3, texts=4, letters=20, reading=0.5, queue=6
  )
  with stand_in.listening(made) as port:
    yield port


@pytest.fixture
def client(port):
  with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
    yield client
    answer = client.post("/v1/features/texts", json=GOOD)  # whatever came before
    assert answer.json()["features"] == [[1, 1, 2], [3, 1, 2]]


def chunk(kind: bytes, data: bytes) -> bytes:
  return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bomb(side: int) -> bytes:
  """A PNG file of a few bytes that says it has side x side pixels."""
  header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
  body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 1000)) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + body


def image(data: bytes) -> dict:
  return {"images": [base64.b64encode(data).decode()]}


HOSTILE = {
  "no JSON": ("/v1/features/texts", b'{"texts": [', 422, "Expected JSON in the body"),
  "deep JSON": ("/v1/features/texts", b"[" * 90_000, 422, "Expected JSON in the body"),
  "not UTF-8": ("/v1/features/texts", b'{"texts": ["\xff"]}', 422, "Expected JSON in the body"),
  "half a pair": ("/v1/features/texts", rb'{"texts": ["\ud800"]}', 422, "Expected JSON in the"),
  "no object": ("/v1/features/texts", b"[1, 2]", 422, "Expected the fields model, texts"),
  "no body": ("/v1/features/texts", b"", 422, "Expected JSON in the body"),
  "no field": ("/v1/features/texts", {}, 422, "texts: Field required"),
  "another field": ("/v1/features/texts", GOOD | {"textz": 1}, 422, "textz: Extra inputs"),
  "no list": ("/v1/features/texts", {"texts": "a"}, 422, "texts: Input should be a valid list"),
  "a number": ("/v1/features/texts", {"texts": [3]}, 422, "texts.0: Input should be a valid str"),
  "many faults": ("/v1/features/texts", {"texts": [3] * 1000}, 422, "and 995 more"),
  "no texts": ("/v1/features/texts", {"texts": []}, 422, "Expected texts, found none"),
  "many texts": ("/v1/features/texts", {"texts": ["a"] * 5}, 422, "at most 4 texts .* found 5"),
  "a long text": ("/v1/features/texts", {"texts": ["a" * 21]}, 422, "at most 20 characters"),
  "many images": ("/v1/features/images", {"images": [IN_BASE64] * 4}, 422, "at most 3 images"),
  "a bad text": ("/v1/features/texts", {"texts": ["bad"]}, 422, "Expected good texts"),
  "another model": ("/v1/features/texts", GOOD | {"model": "x"}, 422, "Expected model: colours"),
  "an address": ("/v1/features/images", {"images": ["http://127.0.0.1/a.png"]}, 422, "never fetch"),
  "a path": ("/v1/features/images", {"images": ["/etc/passwd"]}, 422, "never fetched"),
  "a path in base64": ("/v1/features/images", image(b"/etc/passwd"), 422, "number 0 of images"),
  "no image": ("/v1/features/images", image(b"hello"), 422, "not a JPEG, PNG"),
  "nothing": ("/v1/features/images", {"images": [""]}, 422, "not a JPEG, PNG"),
  "half a JPEG": ("/v1/features/images", image(encoded(form="jpeg")[:-200]), 422, "number 0 of"),
  "pixels": ("/v1/features/images", image(bomb(200)), 422, "at most 10,000 pixels .* 200 x 200"),
  "a bomb": ("/v1/features/images", image(bomb(100_000)), 422, "100000 x 100000|exceeds limit"),
  "an SVG": ("/v1/features/images", image(b"<svg xmlns='x'/>"), 422, "not a JPEG, PNG"),
  "a body": ("/v1/features/texts", {"texts": ["a" * 200_000]}, 413, "at most 100,000 bytes"),
  "the deadline": ("/v1/features/texts?deadline=-1", GOOD, 422, "Expected deadline in seconds"),
  "no deadline": ("/v1/features/texts?deadline=nan", GOOD, 422, "Expected deadline in seconds"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused_with_a_line(client, name):
  path, body, status, text = HOSTILE[name]
  content = body if isinstance(body, bytes) else json.dumps(body).encode()
  answer = client.post(path, content=content, headers={"content-type": "application/json"})
  assert answer.status_code == status, answer.text
  (detail,) = answer.json().values()
  assert re.search(text, detail) and len(detail) < 1100


@pytest.mark.parametrize("content", ["", "text/plain", "application/x-www-form-urlencoded", ";;"])
def test_other_content_types_are_refused(client, content):
  headers = {"content-type": content} if content else {}
  answer = client.post("/v1/features/texts", content=json.dumps(GOOD), headers=headers)
  assert answer.status_code == 415 and "Expected the content type" in answer.json()["detail"]


def test_broken_forms_are_refused(client):
  path = "/v1/features/images"
  for header, content in (
    ("multipart/form-data", b"x"),
    ("multipart/form-data; boundary=b", b"--b\r\nContent-Dispo"),
    ("multipart/form-data; boundary=b", b"nothing of it"),
  ):
    answer = client.post(path, content=content, headers={"content-type": header})
    assert answer.status_code in (400, 422), answer.text
    assert "detail" in answer.json()
  files = [("images", ("a.png", PNG))] * 9
  assert client.post(path, files=files).status_code in (400, 422)
  twice = client.post(path, files=files[:1], data={"normalize": ["1", "0"]})
  assert twice.status_code == 422 and "Expected one normalize" in twice.json()["detail"]


def test_forms_and_json_are_answered_alike(client):
  path = "/v1/features/images"
  asked = [("images", ("a.png", PNG, "image/png")), ("images", ("b.png", encoded((1, 2, 3))))]
  form = client.post(path, files=asked, data={"normalize": "true", "model": "colours"})
  body = {
    "images": [IN_BASE64, f"data:image/png;base64,{base64.b64encode(asked[1][1][1]).decode()}"]
  }
  plain = client.post(path, json=body | {"normalize": True})
  assert form.status_code == 200 and form.json() == plain.json()
  features = np.array(form.json()["features"])
  assert features.shape == (2, 3)
  np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)


def test_arrays_are_the_bits_of_the_json(client):
  body = {"images": [IN_BASE64], "texts": ["a", "bc"]}
  for path, keys in (("/v1/features/images", ["images"]), ("/v1/similarity", ["images", "texts"])):
    given = {key: body[key] for key in keys}
    told = client.post(path, json=given).json()
    array = client.post(path, json=given, headers={"accept": "application/x-npy"})
    assert array.headers["content-type"] == "application/x-npy"
    read = np.load(io.BytesIO(array.content), allow_pickle=False)
    (values,) = (value for key, value in told.items() if key != "model")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(np.array(values, np.float32), read)


def test_a_picture_is_encoded_once(client, model):
  new = base64.b64encode(encoded((7, 7, 7))).decode()
  begin = len(model.batches)
  told = client.post("/v1/features/images", json={"images": [new, new, new]}).json()
  assert model.batches[begin:] == [1]
  assert told["features"][0] == told["features"][1] == told["features"][2]
  client.post("/v1/similarity", json={"images": [new], "texts": ["a"]})
  assert model.batches[begin:] == [1, 1]  # the text


def test_other_paths_and_methods_are_refused(client):
  assert client.post("/v1/caption", json={}).status_code == 404  # no OFA is served
  assert client.post("/v1/topk", json={}).status_code == 404  # no file is there to search in
  assert client.get("/v1/features/texts").status_code == 405
  assert client.put("/v1/features/texts", content=b"x").status_code == 405
  assert client.get("/../../etc/passwd").status_code == 404


def test_other_sites_cannot_speak_to_it_under_their_name(client):
  assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
  assert client.get("/health", headers={"host": "localhost:1234"}).status_code == 200


def test_a_fault_of_the_program_is_one_answer(client):
  answer = client.post("/v1/features/texts", json={"texts": ["fault"]})
  assert answer.status_code == 500 and answer.json()["detail"].startswith("The service failed")


def test_a_full_queue_and_a_late_answer(client, model):
  with concurrent.futures.ThreadPoolExecutor(4) as pool:

    def post(texts, query=""):
      return pool.submit(httpx.post, f"{client.base_url}/v1/features/texts{query}", json=texts,
                         timeout=20)  # fmt: skip

    model.begun.clear()
    slow = post({"texts": ["slow"]})
    assert model.begun.wait(20)
    late = client.post("/v1/features/texts?deadline=0.1", json=GOOD)
    assert late.status_code == 504 and "within the deadline" in late.json()["detail"]
    waiting = post({"texts": ["a"] * 4})
    # The rows of the late one wait, too, until it is their turn.
    stand_in.until(lambda: "ofa_jax_waiting_rows 6.0" in client.get("/metrics").text)
    full = client.post("/v1/features/texts", json=GOOD)
    assert full.status_code == 429 and full.headers["retry-after"] == "1"
    assert "there is room for 6" in full.json()["detail"]
    assert client.get("/health").json() == {"alive": True}
    model.go.set()
    assert slow.result(20).status_code == waiting.result(20).status_code == 200
  model.go.clear()


def talk(port, *parts) -> bytes:
  """Sends bytes, and reads until the other side hangs up."""
  answer = b""
  with (
    socket.create_connection(("127.0.0.1", port), 20) as connection,
    contextlib.suppress(ConnectionError),
  ):
    for part in parts:
      connection.sendall(part)
    while data := connection.recv(65536):
      answer += data
  return answer


HEAD = b"POST /v1/features/texts HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def test_slow_and_broken_clients(port, client):
  slow = talk(port, HEAD + b"content-length: 100\r\n\r\n", b"{")
  assert slow.startswith(b"HTTP/1.1 408 ") and b"Expected the body within 0.5 s" in slow
  endless = talk(port, HEAD + b"content-length: 99999999999\r\n\r\n", b"{")
  assert endless.startswith(b"HTTP/1.1 413 ")
  chunks = [b"10000\r\n" + b"a" * 65536 + b"\r\n"] * 5
  chunked = talk(port, HEAD + b"transfer-encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n")
  assert chunked.startswith(b"HTTP/1.1 413 ")
  assert talk(port, b"\x16\x03\x01hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")
  assert talk(port, b"POST / HTTP/1.1\r\n" + b"a: " + b"b" * 300_000) == b""  # headers without end
  with socket.create_connection(("127.0.0.1", port), 20) as connection:  # hangs up amid its body
    connection.sendall(HEAD + b"content-length: 100\r\n\r\n{")
  stand_in.until(lambda: 'ofa_jax_refused_total{reason="gone"}' in client.get("/metrics").text)


def test_who_has_gone_is_not_computed_for(port, client, model):
  with (
    concurrent.futures.ThreadPoolExecutor(1) as pool,
    httpx.Client(base_url=client.base_url) as other,
  ):
    model.begun.clear()
    slow = pool.submit(client.post, "/v1/features/texts", json={"texts": ["slow"]})
    assert model.begun.wait(20)
    begin = len(model.batches)
    content = b'{"texts": ["never seen"]}'
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
      connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(content) + content)
      stand_in.until(lambda: "ofa_jax_waiting_rows 1.0" in other.get("/metrics").text)
    stand_in.until(lambda: "ofa_jax_active_requests 1.0" in other.get("/metrics").text)
    model.go.set()
    assert slow.result(20).status_code == 200
  model.go.clear()
  assert client.post("/v1/features/texts", json=GOOD).status_code == 200
  assert model.batches[begin:] == [2]


def test_what_is_counted(client):
  def counted():  # a moment after the answer
    stand_in.until(lambda: "ofa_jax_active_requests 0.0" in client.get("/metrics").text)
    return client.get("/metrics").text

  before = counted()
  client.post("/v1/features/texts", json=GOOD)
  after = counted()

  def value(text, name):
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

  for name, more in (
    ('ofa_jax_requests_total{path="/v1/features/texts",status="200"}', 1),
    ('ofa_jax_batch_rows_sum{what="texts"}', 2),
    ('ofa_jax_request_seconds_count{path="/v1/features/texts"}', 1),
  ):
    assert value(after, name) == value(before, name) + more


def test_the_page_and_the_schema_load_nothing(client):
  schema = client.get("/openapi.json").json()
  paths = {path for path in schema["paths"] if path.startswith("/v1/")}
  served = [x for x in operations.OPERATIONS if "features" in x.path or "similarity" in x.path]
  assert paths == {operation.path for operation in served} | {"/v1/models"}
  fields = schema["paths"]["/v1/similarity"]["post"]["requestBody"]["content"]
  for form in ("application/json", "multipart/form-data"):
    assert set(fields[form]["schema"]["properties"]) == {"model", "images", "texts"}
  page = client.get("/docs")
  assert "default-src 'none'" in page.headers["content-security-policy"]
  assert page.headers["content-type"].startswith("text/html")
  for operation in served:
    assert operation.path in page.text and operation.summary in page.text
  assert not re.search(r"<script|src=|https?://(?!127\.0\.0\.1)|@import", page.text)
  models = client.get("/v1/models").json()["models"]
  assert [model["name"] for model in models] == ["colours"]


def test_nothing_is_taken_before_it_is_ready_or_when_it_stops():
  made = stand_in.service()
  with (
    stand_in.listening(made) as port,
    httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
  ):
    assert client.get("/ready").status_code == 200
    made.ready = False
    assert client.get("/ready").status_code == 503
    answer = client.post("/v1/features/texts", json=GOOD)
    assert answer.status_code == 503 and "being compiled" in answer.json()["detail"]
    made.ready = True
    assert client.post("/v1/features/texts", json=GOOD).status_code == 200


def test_stopping_finishes_what_is_running():
  model = stand_in.Model()
  made = stand_in.service(model)
  with (
    stand_in.listening(made) as port,
    httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    concurrent.futures.ThreadPoolExecutor(2) as pool,
  ):
    running = [pool.submit(client.post, "/v1/features/texts", json={"texts": ["slow"]})]
    assert model.begun.wait(20)
    running.append(pool.submit(client.post, "/v1/features/texts", json={"texts": ["a"]}))
    stand_in.until(lambda: made.active == 2)
    made.stop()
    refused = client.post("/v1/features/texts", json=GOOD)
    assert refused.status_code == 503 and "stopping" in refused.json()["detail"]
    assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
    model.go.set()
    assert [answer.result(20).status_code for answer in running] == [200, 200]
  with pytest.raises(httpx.ConnectError):
    httpx.get(f"http://127.0.0.1:{port}/health")
