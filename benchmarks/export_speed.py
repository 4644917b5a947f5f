"""Exports on a CPU: seconds to make, bytes, and how fast they run beside our own programs.

    python benchmarks/export_speed.py [--model ViT-B-16] [--dtype fp32] [--batches 1,8]
    python benchmarks/export_speed.py --model OFA-tiny --tokenizer DIR
    python benchmarks/export_speed.py --model runs/world

The model has drawn weights, or is a stored one. Each format is exported to a folder, which compares
it with the model at 1, 3 and 8 rows; then ours (in fp32), ONNX Runtime and StableHLO compute the
same inputs by turns: every part, and of an OFA whole captions of random pictures, five beams, by
the API and by the exports' own search. The least time of each is told, by the clock and of all
processors together; the second is less moved by what else a machine does.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from input_pipeline import cpu_model
from PIL import Image

from ofa_jax import api, hub, trees
from ofa_jax.exporting import clip, folder, ofa
from ofa_jax.exporting.beside import exported
from ofa_jax.models import cnclip
from ofa_jax.models import ofa as ofa_models


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="ViT-B-16")
  parser.add_argument("--tokenizer", help="folder of an OFA's tokenizer, with drawn weights")
  parser.add_argument("--batches", default="1,8")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--formats", default="onnx,stablehlo")
  parser.add_argument("--dtype", default="fp32")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  batches = [int(batch) for batch in args.batches.split(",")]
  report = {
    "device": f"cpu-{len(os.sched_getaffinity(0))}core",
    "cpu": cpu_model(),
    "versions": {
      name: importlib.metadata.version(name) for name in ("jax", "jax2onnx", "onnx", "onnxruntime")
    },
    "model": pathlib.Path(args.model).name,
    "dtype": args.dtype,
    "formats": {},
  }
  with tempfile.TemporaryDirectory() as place:
    directory = stored(args.model, pathlib.Path(place) / "model", args.tokenizer)
    source = hub.open_model(directory)
    report["parameters"] = sum(x.size for x in jax.tree.leaves(source.load()[0]))
    exports = {}
    for form in args.formats.split(","):
      path = pathlib.Path(place) / form
      begun = time.process_time()
      written = folder.write(source, path, form=form, dtype=args.dtype)
      report["formats"][form] = {
        "seconds_of_processors_to_make": round(time.process_time() - begun, 1),
        "bytes": sum(x.stat().st_size for x in path.rglob("*") if x.is_file()),
        "parts": {x.name: {"bytes": x.bytes, "difference": x.difference} for x in written},
      }
      print(form, json.dumps(report["formats"][form]), flush=True)
      exports[form] = exported.Model(path)
    calls = calls_of(source, directory, exports, batches)
    report["load_average"] = os.getloadavg()
    report["seconds"] = timed(calls, args.repeats)
  args.out.mkdir(parents=True, exist_ok=True)
  name = f"export_speed_{report['model'].lower()}.{report['device']}.{args.dtype}.json"
  (args.out / name).write_text(json.dumps(report, indent=2) + "\n")
  print(args.out / name)


def stored(name: str, place: pathlib.Path, tokenizer: str | None) -> pathlib.Path:
  """A model directory: what is given, or one of a released size with drawn weights."""
  size = name.removeprefix("OFA-")
  if name in cnclip.MODELS:
    config, files = cnclip.config(*cnclip.MODELS[name]), None
  elif size in ofa_models.SIZES:
    config, files = ofa_models.config(size), tokenizer and pathlib.Path(tokenizer)
  else:
    return pathlib.Path(name)
  make = jax.jit(lambda: trees.split(config.build(rngs=nnx.Rngs(0)))[1:])
  hub.save_directory(place, config, *make(), files=files)
  return place


def calls_of(
  source: hub.Source,
  directory: pathlib.Path,
  exports: dict[str, exported.Model],
  batches: list[int],
) -> dict[str, Callable[[], object]]:
  """What is timed: "part, rows, ours" and so on."""
  is_clip = source.family.name == "cnclip"
  if is_clip:
    parts, _ = clip.parts(source, None, dtype="fp32")
  else:
    lengths = ofa.sizes(source, image_size=None, context_length=None, max_length=None)
    parts, _ = ofa.parts(source, None, dtype="fp32", lengths=lengths)
  calls = {}
  for rows in batches:
    for part in parts:
      given = part.examples(rows, 0)
      name = f"{part.name}, {rows}"
      calls[f"{name}, ours"] = functools.partial(part.reference, given)
      for form, model in exports.items():
        calls[f"{name}, {form}"] = functools.partial(
          model.parts[part.name], **_typed(model, part.name, given)
        )
    if not is_clip:
      rng = np.random.default_rng(0)
      pictures = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(rows)]
      model, _ = api.load_from_name(directory)
      calls[f"caption, {rows}, ours"] = functools.partial(model.caption, pictures)
      for form, made in exports.items():
        images = [made.preprocess(picture) for picture in pictures]
        calls[f"caption, {rows}, {form}"] = functools.partial(made.caption, images)
  return calls


def _typed(model: exported.Model, part: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inputs in the types of an export: caches are of its precision."""
  types = {x["name"]: x["dtype"] for x in model.config["parts"][part]["inputs"]}
  return {name: np.asarray(x).astype(types[name]) for name, x in given.items()}


def timed(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
  """The least times of each, by turns, after a first call that compiles."""
  times = {name: [] for name in calls}
  for number in range(repeats + 1):
    for name, call in calls.items():
      begun, used = time.perf_counter(), time.process_time()
      jax.block_until_ready(call())
      if number:
        times[name].append((time.perf_counter() - begun, time.process_time() - used))
  return {
    name: {
      "clock": round(min(clock for clock, _ in values), 4),
      "processors": round(min(used for _, used in values), 4),
    }
    for name, values in times.items()
  }


if __name__ == "__main__":
  main()
