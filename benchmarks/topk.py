"""Time and memory of `retrieve topk`, beside the original's algorithm.

    python benchmarks/topk.py [--rows 100000] [--width 512] [--queries 20]

Both read the same feature files. Ours runs whole, from JSONL and from `.npy`, in a process of its
own whose peak memory is taken. The original reads with `json`, multiplies one query at a time by
all candidates in float32 (PyTorch, same threads) and sorts a list of all their scores in Python:
its reading is timed on `--lines` lines and its search on `--queries` queries, and both are
extrapolated in proportion. The predictions for these queries are compared.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import torch
from input_pipeline import cpu_model

from ofa_jax.data.features import FeatureWriter

GOAL = 3.0
CHUNK = 32768  # candidates of one product, the original's default


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=100_000, help="queries, and as many candidates")
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--top-k", type=int, default=10)
  parser.add_argument("--queries", type=int, default=20, help="timed for the original")
  parser.add_argument("--lines", type=int, default=2000, help="read for the original")
  parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  torch.set_num_threads(args.threads)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    vectors = write_features(folder, args)
    original = time_original(folder, vectors, args)
    ours = {form: time_ours(folder, form, args) for form in ("jsonl", "npy")}
    agreement = compare(folder, original.pop("predictions"))
  report = {
    "device": f"cpu-{args.threads}core",
    "cpu": cpu_model(),
    "load_average": os.getloadavg(),
    "versions": {
      "python": platform.python_version(),
      "jax": jax.__version__,
      "torch": torch.__version__,
    },
    "queries": args.rows,
    "candidates": args.rows,
    "width": args.width,
    "top_k": args.top_k,
    "goal_over_original": GOAL,
    "original": original,
    "ofa_jax": ours,
    "over_original": {
      form: round(original["extrapolated_seconds"] / times["seconds"], 1)
      for form, times in ours.items()
    },
    "full_score_matrix_gigabytes": round(4e-9 * args.rows**2, 1),
    "same_predictions": agreement,
  }
  print(json.dumps(report, indent=2))
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"topk.{report['device']}.json"
  path.write_text(json.dumps(report, indent=2) + "\n")
  print(path)


def write_features(folder: pathlib.Path, args: argparse.Namespace) -> dict[str, np.ndarray]:
  """Random unit features as JSONL and `.npy`; returns them."""
  rng = np.random.default_rng(0)
  vectors = {}
  for kind in ("image", "text"):
    features = rng.standard_normal((args.rows, args.width), np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    vectors[kind] = features
    for form in ("jsonl", "npy"):
      with FeatureWriter(folder / f"{kind}.{form}", kind=kind, width=args.width) as writer:
        writer.resume([], first=[], multiple=1)
        for start in range(0, args.rows, 1000):
          part = features[start : start + 1000]
          writer.write(writer.encode(range(start, start + len(part)), part))
        writer.finish()
  return vectors


def time_ours(folder: pathlib.Path, form: str, args: argparse.Namespace) -> dict:
  """Seconds and peak memory of the command."""
  command = [
    *(sys.executable, "-m", "ofa_jax.retrieve", "topk", f"--top-k={args.top_k}"),
    *(f"--image-feats={folder / f'image.{form}'}", f"--text-feats={folder / f'text.{form}'}"),
    f"--output={folder / 'ours.jsonl'}",
  ]
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
  begin = time.perf_counter()
  process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
  _, status, usage = os.wait4(process.pid, 0)
  assert status == 0, status
  return {
    "seconds": round(time.perf_counter() - begin, 1),
    "peak_memory_gigabytes": round(usage.ru_maxrss * 1024 / 1e9, 2),
  }


def time_original(folder: pathlib.Path, vectors: dict[str, np.ndarray], args) -> dict:
  """Seconds of the original's algorithm, extrapolated, and its predictions for some queries."""
  begin = time.perf_counter()
  with open(folder / "image.jsonl") as file:
    read = [json.loads(next(file))["feature"] for _ in range(args.lines)]
  np.array(read, np.float32)
  reading = (time.perf_counter() - begin) / args.lines
  candidates, ids = vectors["image"], range(args.rows)
  seconds, predictions = [], []
  for query in vectors["text"][: args.queries].tolist():
    begin = time.perf_counter()
    feature, scored = torch.tensor([query]), []
    for start in range(0, args.rows, CHUNK):
      part = torch.from_numpy(candidates[start : start + CHUNK])
      scores = (feature @ part.t())[0].tolist()
      scored += zip(ids[start : start + CHUNK], scores, strict=True)
    scored.sort(key=lambda pair: pair[1], reverse=True)
    predictions.append([i for i, _ in scored[: args.top_k]])
    seconds.append(time.perf_counter() - begin)
  search = statistics.median(seconds)
  return {
    "read_seconds_per_line": round(reading, 6),
    "search_seconds_per_query": round(search, 4),
    "queries_timed": args.queries,
    "extrapolated_seconds": round(2 * args.rows * reading + args.rows * search, 1),
    "this_process_peak_gigabytes": round(
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2
    ),
    "predictions": predictions,
  }


def compare(folder: pathlib.Path, predictions: list[list[int]]) -> str:
  """How many of the original's predictions ours has in the same place."""
  with open(folder / "ours.jsonl") as file:
    same = [json.loads(next(file))["image_ids"] == expected for expected in predictions]
  return f"{sum(same)} of {len(same)} queries"


if __name__ == "__main__":
  main()
