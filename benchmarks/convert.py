"""Time and peak memory of converting the released models of both families, at true size.

    python benchmarks/convert.py [--models RN50 ViT-B-16 ...] [--to orbax torch hf]

Makes a checkpoint of each model in the released layout, fp32, its weights drawn by a rule; then
runs the command in a process of its own, as a user does, and reports that process's wall and CPU
time and the largest memory it held (its resident set: interpreter and libraries, and the pages of
the checkpoint that it mapped). --to=torch and --to=hf start from the model directory. Needs
PyTorch, and disk for four copies of the largest model.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np

from ofa_jax import trees
from ofa_jax.convert import rules, torch_files
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.convert.ofa import sizes as ofa_sizes
from ofa_jax.convert.ofa import table as convert_ofa
from ofa_jax.models import cnclip, ofa
from ofa_jax.models.abstract import abstract

COMMAND = pathlib.Path(__file__).parents[1] / "tools" / "convert_torch_weights.py"
SMALLEST_FIRST = (
  *("RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"),
  *(f"OFA-{size}" for size in ofa.SIZES),
)
TARGET = 2.5  # times the checkpoint


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", nargs="+", choices=SMALLEST_FIRST, default=SMALLEST_FIRST)
  parser.add_argument("--to", nargs="+", choices=("orbax", "torch", "hf"), default=("orbax",))
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  report = {
    "device": f"cpu-{os.cpu_count()}core",
    "python": platform.python_version(),
    "target_over_checkpoint": TARGET,
  }
  *_, libraries = run(sys.executable, "-c", "import torch; from ofa_jax import hub")
  report |= {"libraries_megabytes": round(libraries / 1e6), "results": {}}
  for name in args.models:
    with tempfile.TemporaryDirectory() as folder:
      report["results"][name] = measure(
        name, pathlib.Path(folder), targets=args.to, libraries=libraries
      )
    print(name, json.dumps(report["results"][name]), flush=True)
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"convert.{report['device']}.json"
  path.write_text(json.dumps(report, indent=2) + "\n")
  print(path)


def measure(name: str, folder: pathlib.Path, *, targets: tuple[str, ...], libraries: int) -> dict:
  """Seconds and peak memory of a model's conversions; `libraries` is what Python itself holds."""
  checkpoint = folder / "released.pt"
  # In a process of its own, which gives its memory back.
  making = multiprocessing.get_context("spawn").Process(target=make, args=(name, checkpoint))
  making.start()
  making.join()
  assert making.exitcode == 0
  size = checkpoint.stat().st_size
  results = {"checkpoint_megabytes": round(size / 1e6)}
  for target in ("orbax", *(t for t in targets if t != "orbax")):
    source = checkpoint if target == "orbax" else folder / "orbax"
    if target == "hf" and name == "RN50":  # which Hugging Face has not
      continue
    seconds, cpu_seconds, memory = run(
      sys.executable, COMMAND, source, folder / target, f"--to={target}"
    )
    results[target] = {
      "seconds": round(seconds, 1),
      "cpu_seconds": round(cpu_seconds, 1),
      "peak_megabytes": round(memory / 1e6),
      "over_checkpoint": round(memory / size, 2),
      "over_checkpoint_without_libraries": round((memory - libraries) / size, 2),
    }
  return results


def run(*command) -> tuple[float, float, int]:
  """Runs a command and returns its wall and CPU time in seconds and its peak memory in bytes."""
  start = time.perf_counter()
  process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise SystemExit(f"{command} failed")
  cpu_seconds = usage.ru_utime + usage.ru_stime
  return time.perf_counter() - start, cpu_seconds, usage.ru_maxrss * 1024


def make(name: str, file: pathlib.Path) -> None:
  """Writes a checkpoint with a released model's names and shapes."""
  if name in cnclip.MODELS:
    config = cnclip.config(*cnclip.MODELS[name])
    table = convert.rules_of(config)
  else:
    config, table = ofa.config(name.removeprefix("OFA-")), convert_ofa.RULES
  _, params, rest = abstract(config)
  arrays = {**trees.flatten(params), **trees.flatten(rest)}
  shapes = {path: x.shape for path, x in arrays.items()}
  tensors = {t.name: draw(t.name, t.shape) for t in rules.needed_tensors(table, shapes)}
  if name in cnclip.MODELS:
    torch_files.save_checkpoint(file, tensors, name=name)
    return
  tensors |= dict.fromkeys(convert_ofa.TIED, tensors[convert_ofa.WORDS])
  tensors |= convert_ofa.buffers(config) | rules.counters(tensors)
  options = ofa_sizes.to_options(config, ofa_sizes.settings({}))
  torch_files.save_fairseq(file, tensors, options=options)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Weights that keep a signal's size through all layers, the same at every call."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if name == "logit_scale":
    return np.array(4.0, np.float32)
  if name.endswith("running_var"):
    return (0.5 + rng.random(shape)).astype(np.float32)
  x = rng.standard_normal(shape)
  if len(shape) == 1 and name.endswith("weight"):
    return (1 + 0.02 * x).astype(np.float32)
  if len(shape) == 4:
    return (x * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
  matrix = len(shape) == 2 and "embedding" not in name
  return (x * (0.04 if matrix else 0.02)).astype(np.float32)


if __name__ == "__main__":
  main()
