"""Requests per second of the service: 16 clients at once, their rows in batches, and one at a time.

    pip install -e ".[serve,test]"
    python benchmarks/serve.py [--models digits,ViT-B-16] [--requests 200] [--clients 16]

`python -m ofa_jax.serve` runs in a process of its own, with random weights, and is asked over
loopback by this one. Three ways take turns over the same requests, every one with another picture
or text: "together", 16 clients and batches of up to 16 rows; "apart", 16 clients and batches of
one row; "alone", one client that waits for each answer before it asks again, batches of one row,
without a wait for others. No picture is remembered. Every answer of each is compared with the API's
in this process. `digits` is of the quickstart's size (3.9 million parameters), `ViT-B-16` of the
released model's (188 million).
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import importlib.metadata
import io
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from input_pipeline import cpu_model
from PIL import Image

from ofa_jax import api, hub, trees
from ofa_jax.configs import quickstart
from ofa_jax.models import cnclip

GOAL = 2.0  # of "together" over "alone", of features, on a CPU
CLOSE = 1e-6  # of features of length 1: batches of other sizes are other programs
BATCHED = ("--remember=0", "--max-batch=16", "--max-wait-ms=5")
SINGLE = ("--remember=0", "--max-batch=1", "--max-wait-ms=0")
JSON = {"content-type": "application/json", "accept": "application/x-npy"}
BOUNDARY = "of-a-form"
FORM = JSON | {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", default="digits,ViT-B-16")
  parser.add_argument("--requests", type=int, default=200)
  parser.add_argument("--clients", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--side", type=int, default=224, help="pixels of the pictures, JPEG files")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  threads = len(os.sched_getaffinity(0))
  args.out.mkdir(parents=True, exist_ok=True)
  for name in args.models.split(","):
    begin = os.getloadavg()
    found = measure(name, args)
    report = {
      "device": f"cpu-{threads}core",
      "cpu": cpu_model(),
      "load_average": {"before": begin, "after": os.getloadavg()},
      "versions": {
        library: importlib.metadata.version(library)
        for library in ("jax", "fastapi", "uvicorn", "starlette")
      },
      "model": name,
      "requests": args.requests,
      "clients": args.clients,
      "flags": {"together": BATCHED, "apart and alone": SINGLE},
      "picture": f"JPEG, {args.side} x {args.side}",
      "goal": GOAL,
      **found,
    }
    path = args.out / f"serve_{name.lower()}.{report['device']}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(path)


def measure(name: str, args: argparse.Namespace) -> dict:
  """All ways of one model, in turns."""
  config = (
    quickstart.get_config().model if name == "digits" else cnclip.config(*cnclip.MODELS[name])
  )
  found = {}
  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder) / name
    model = random_model(config, place)
    with service(place, BATCHED) as batched, service(place, SINGLE) as single:
      for job in ("images", "texts"):
        requests, expected = requests_of(job, model, args)
        ways = {
          "together": (batched, args.clients),
          "apart": (single, args.clients),
          "alone": (single, 1),
        }
        runs, worst = {way: [] for way in ways}, 0.0
        for _ in range(args.repeats):
          for way, (port, clients) in ways.items():
            before = batches_of(port, job)
            seconds, each, answers = ask(port, requests, clients)
            worst = max(worst, check(answers, expected))
            after = batches_of(port, job)
            runs[way].append((seconds, each, after - before))
        found[job] = {way: told(x, args.requests) for way, x in runs.items()}
        rates = {way: x["requests_per_second"] for way, x in found[job].items()}
        found[job]["together_over_alone"] = round(rates["together"] / rates["alone"], 2)
        found[job]["together_over_apart"] = round(rates["together"] / rates["apart"], 2)
        found[job]["largest_deviation"] = worst
        print(name, job, json.dumps(found[job], indent=2))
  return {"parameters": model.num_params, "features": found}


def random_model(config: cnclip.CNCLIPConfig, place: pathlib.Path) -> api.CNCLIPModel:
  """Writes a model directory of random weights and loads it."""
  make = jax.jit(lambda: trees.split(config.build(rngs=nnx.Rngs(0)))[1:])
  hub.save_directory(place, config, *make())
  return api.load_from_name(place)[0]


@contextlib.contextmanager
def service(place: pathlib.Path, flags: tuple[str, ...]) -> Iterator[int]:
  """The command, ready; gives its port."""
  command = [sys.executable, "-m", "ofa_jax.serve", f"--model={place}", "--port=0", *flags]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  port = None
  for line in process.stdout:
    found = re.search(r"Listening at http://127\.0\.0\.1:(\d+)", line)
    port = int(found[1]) if found else port
    if line == "Ready\n":
      break
  try:
    yield port
  finally:
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def requests_of(job: str, model: api.CNCLIPModel, args: argparse.Namespace) -> tuple[list, list]:
  """Requests (path, body, headers), and the API's features of each, asked for one by one.

  Pictures and texts are all different.
  """
  rng = np.random.default_rng(0)
  if job == "texts":
    texts = [
      f"{number} 只小狗在草地上奔跑, 第 {number * 7} 张照片" for number in range(args.requests)
    ]
    bodies = [json.dumps({"texts": [text]}).encode() for text in texts]
    expected = [model.encode_text(model.tokenizer(text)) for text in texts]
    return [("/v1/features/texts", body, JSON) for body in bodies], expected
  transform = api.image_transform(model.image_size)
  requests, expected = [], []
  for _ in range(args.requests):
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((args.side, args.side), Image.Resampling.BICUBIC).save(file, "jpeg")
    expected.append(model.encode_image(transform(Image.open(file))[None]))
    head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="images"; filename="x"\r\n\r\n'
    body = head.encode() + file.getvalue() + f"\r\n--{BOUNDARY}--\r\n".encode()
    requests.append(("/v1/features/images", body, FORM))
  return requests, expected


def ask(port: int, requests: list, clients: int) -> tuple[float, list[float], list[np.ndarray]]:
  """Sends all requests, each client one after the other; seconds in all and of each, answers."""
  connections = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(clients)]

  def client(number: int) -> list[tuple[float, np.ndarray]]:
    told = []
    for path, body, headers in requests[number::clients]:
      begin = time.perf_counter()
      connections[number].request("POST", path, body, headers)
      answer = connections[number].getresponse()
      content = answer.read()
      told.append((time.perf_counter() - begin, content))
      assert answer.status == 200, content
    return told

  begin = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(clients) as pool:
    all_told = list(pool.map(client, range(clients)))
  seconds = time.perf_counter() - begin
  each, answers = [0.0] * len(requests), [b""] * len(requests)
  for number, told in enumerate(all_told):
    for place, (taken, content) in zip(range(number, len(requests), clients), told, strict=True):
      each[place], answers[place] = taken, content
  return seconds, each, [np.load(io.BytesIO(x), allow_pickle=False) for x in answers]


def check(answers: list[np.ndarray], expected: list[np.ndarray]) -> float:
  """The largest deviation of an answer from the API's, which is small."""
  deviations = [
    np.abs(found - features).max() / np.linalg.norm(features)
    for found, features in zip(answers, expected, strict=True)
  ]
  assert max(deviations) < CLOSE, max(deviations)
  return float(max(deviations))


def batches_of(port: int, job: str) -> float:
  """How many batches of a job there were."""
  connection = http.client.HTTPConnection("127.0.0.1", port)
  connection.request("GET", "/metrics")
  text = connection.getresponse().read().decode()
  found = re.search(rf'^ofa_jax_batch_rows_count{{what="{job}"}} (\S+)$', text, re.MULTILINE)
  return float(found[1]) if found else 0.0


def told(runs: list[tuple[float, list[float], float]], requests: int) -> dict[str, float | list]:
  """Rates, and latencies of all requests of all runs."""
  each = [1000 * x for _, taken, _ in runs for x in taken]
  return {
    "requests_per_second": round(requests / statistics.median(s for s, _, _ in runs), 1),
    "p50_ms": round(float(np.percentile(each, 50)), 1),
    "p99_ms": round(float(np.percentile(each, 99)), 1),
    "rows_of_a_batch": round(requests / statistics.mean(n for _, _, n in runs), 1),
    "all_seconds": [round(s, 2) for s, _, _ in runs],
  }


if __name__ == "__main__":
  main()
