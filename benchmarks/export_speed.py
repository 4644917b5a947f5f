"""Exports of a Chinese-CLIP of true size: seconds to make, bytes, and how fast they run on a CPU.

    python benchmarks/export_speed.py [--model ViT-B-16] [--batch 8] [--formats onnx,stablehlo]

The model has random weights, or is a stored one (--model=PATH). Each format is exported to a
folder, which compares it with the model at 1, 3 and 8 rows; then ours, ONNX Runtime and StableHLO
encode the same pictures and texts by turns, and the least processor time of each is printed, that
of all threads together.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time

import jax
import numpy as np
from flax import nnx

from ofa_jax import hub, trees
from ofa_jax.exporting import clip, folder
from ofa_jax.exporting.beside import exported
from ofa_jax.models import cnclip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="ViT-B-16")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--formats", default="onnx,stablehlo")
  parser.add_argument("--dtype", default="fp32")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  source = _random(args.model) if args.model in cnclip.MODELS else hub.open_model(args.model)
  report = {"device": f"cpu-{os.cpu_count()}core", "model": args.model, "dtype": args.dtype}
  report |= {"batch": args.batch, "formats": {}, "seconds": {}}
  with tempfile.TemporaryDirectory() as place:
    calls = {}
    for form in args.formats.split(","):
      path = pathlib.Path(place) / form
      begun = time.process_time()
      written = folder.write(source, path, form=form, dtype=args.dtype)
      report["formats"][form] = {
        "seconds": round(time.process_time() - begun, 1),
        "bytes": sum(x.stat().st_size for x in path.rglob("*") if x.is_file()),
        "parts": {x.name: {"bytes": x.bytes, "difference": x.difference} for x in written},
      }
      print(json.dumps(report["formats"][form]), flush=True)
      calls |= {f"{name} {form}": call for name, call in exported.Model(path).parts.items()}
    parts, _ = clip.parts(source, None, dtype="fp32")
    given = {part.name: part.examples(args.batch, 0) for part in parts}
    calls |= {f"{part.name} ours": lambda part=part, **x: part.reference(x) for part in parts}
    for name, call in calls.items():  # compiles
      jax.block_until_ready(call(**given[name.split()[0]]))
    times = {name: [] for name in sorted(calls)}
    for _ in range(args.repeats):
      for name in times:
        begun = time.process_time()
        jax.block_until_ready(calls[name](**given[name.split()[0]]))
        times[name].append(time.process_time() - begun)
  report["seconds"] = {name: round(min(values), 3) for name, values in times.items()}
  print(json.dumps(report))
  args.out.mkdir(parents=True, exist_ok=True)
  name = f"export_speed.{args.model.replace('/', '_')}.{args.dtype}.{report['device']}.json"
  (args.out / name).write_text(json.dumps(report, indent=2) + "\n")


def _random(name: str) -> hub.Source:
  """A model of a released size with drawn weights."""
  config = cnclip.config(*cnclip.MODELS[name])

  def load(shardings=None):
    del shardings
    made = jax.jit(lambda: trees.split(config.build(rngs=nnx.Rngs(0)))[1:])
    return jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x)), made())

  return hub.Source(config=config, load=load, form="drawn", settings={"context_length": 52})


if __name__ == "__main__":
  main()
