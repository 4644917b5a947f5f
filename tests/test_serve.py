"""The command: a model in, answers over HTTP out, and an end that finishes what is running."""

import concurrent.futures
import io
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ofa_jax import serve
from tests.compiling import QUICK
from tests.ofa_directory import save_micro

ROOT = Path(__file__).parent.parent


def test_a_missing_extra_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "fastapi", None)
  told = r"extra serve, found no fastapi: pip install .*serve"
  with pytest.raises(ValueError, match=told), serve._extra():
    import fastapi  # noqa: F401
  with pytest.raises(ModuleNotFoundError, match="ofa_jax"), serve._extra():
    import ofa_jax.nothing_of_this_name  # noqa: F401


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  """A service of the micro OFA that compiles when it is asked, and its address."""
  pytest.importorskip("fastapi", reason="the extra serve is not installed")
  model = save_micro(tmp_path_factory.mktemp("ofa"))
  command = [sys.executable, "-m", "ofa_jax.serve", f"--model={model}", "--port=0", "--nocompile"]
  environment = {**os.environ, **QUICK, "JAX_ENABLE_COMPILATION_CACHE": "false"}
  process = subprocess.Popen(
    command, env=environment, cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip
  said = []
  for line in process.stdout:
    said.append(line)
    if line == "Ready\n":
      break
  url = re.search(r"Listening at (http://127\.0\.0\.1:\d+)", "".join(said))
  assert url, said
  yield process, url[1]
  process.kill()
  process.wait(20)
  process.stdout.close()


def test_sigterm_finishes_what_is_running_and_takes_no_more(served):
  httpx = pytest.importorskip("httpx", reason="the extra test is not installed")
  from tests.serving.stand_in import until

  process, url = served
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(
    file, "png"
  )
  pictures = [("images", ("x.png", file.getvalue()))]
  assert httpx.get(f"{url}/ready").status_code == 200
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    running = [  # compiles, which takes seconds
      pool.submit(httpx.post, f"{url}/v1/{path}", files=pictures, data=fields, timeout=100)
      for path, fields in (("caption", {}), ("caption", {}), ("answer", {"texts": ["what"]}))
    ]
    until(lambda: "ofa_jax_active_requests 3.0" in httpx.get(f"{url}/metrics").text)
    process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{url}/ready").status_code == 503)
    new = httpx.post(f"{url}/v1/caption", files=pictures)
    assert new.status_code == 503 and "stopping" in new.json()["detail"]
    assert not any(answer.done() for answer in running)
    answers = [answer.result(100) for answer in running]
  assert [answer.status_code for answer in answers] == [200] * 3
  captions = [answer.json()["results"][0]["caption"] for answer in answers[:2]]
  assert captions[0] == captions[1]
  assert process.wait(30) == 0
  assert process.stdout.read().endswith("Stopped\n")


def test_what_cannot_be_served_is_told_at_once(tmp_path):
  pytest.importorskip("fastapi", reason="the extra serve is not installed")
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    result = subprocess.run(
      [sys.executable, "-m", "ofa_jax.serve", f"--model={tmp_path}", f"--port={port}"],
      capture_output=True, text=True, timeout=100, cwd=ROOT, env={**os.environ, **QUICK},
    )  # fmt: skip
  assert result.returncode == 1 and "Traceback" not in result.stderr
  assert f"--port={port}, found: Address already in use" in result.stderr
