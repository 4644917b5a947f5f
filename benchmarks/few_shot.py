"""What a Chinese-CLIP learns from a few pictures of each class: by LoRA, and as a whole.

    python benchmarks/few_shot.py [--shots 1 4 16] [--seeds 3] [--start-steps 60]

The quickstart's model is trained for a few steps on its digits. From there the recipe for few
pictures (configs/cnclip_few_shot.py) and that of one's own pictures (configs/cnclip_custom.py)
learn from as many pictures of each digit as there are shots, drawn by the seed, with one caption
each, for as many epochs. Rates are raised for a model so small. What each leaves is scored on the
360 held-out digits, which nothing was chosen by. Results are JSON and, on the screen, the table of
docs/training.md.
"""

import argparse
import dataclasses
import json
import pathlib
import runpy
import tempfile
import time

import jax
import numpy as np
from input_pipeline import cpu_model

from ofa_jax import train
from ofa_jax.config import Config
from ofa_jax.data import quickstart

ROOT = pathlib.Path(__file__).parent.parent
EPOCHS = 50  # of the recipe for few pictures
METRIC = "valid/zeroshot_top1"
# The recipe's rate is for matrices of 768 and more; this model's are of 128.
RUNS = {"LoRA, rank 2": ("cnclip_few_shot.py", 4e-3), "all parameters": ("cnclip_custom.py", 5e-4)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shots", nargs="+", type=int, default=[1, 4, 16])
  parser.add_argument("--seeds", type=int, default=3, help="draws of the pictures")
  parser.add_argument("--start-steps", type=int, default=60)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  device = jax.devices()[0]
  name = "cpu-2core" if device.platform == "cpu" else device.device_kind
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"few_shot.{name}.json"
  base = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
  evals = tuple(dataclasses.replace(e, every=0) for e in base.evals)
  base = dataclasses.replace(base, evals=evals, log_every=50, save_every=0)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    start = folder / "start"
    metrics = train.train(dataclasses.replace(base, steps=args.start_steps), str(start))
    report = {
      "device": name,
      "cpu": cpu_model(),
      "jax": jax.__version__,
      "start_steps": args.start_steps,
      "epochs": EPOCHS,
      "start": round(metrics[METRIC], 4),
      "runs": {run: {} for run in RUNS},
    }
    for shots in args.shots:
      tables = [write(folder / f"{shots}_{seed}", shots, seed=seed) for seed in range(args.seeds)]
      for run, (recipe, rate) in RUNS.items():
        found, begin = [], time.perf_counter()
        for table in tables:
          config = tuned(base, recipe, rate, start=start, table=table, rows=10 * shots)
          found.append(train.train(config, str(table.parent / run))[METRIC])
        seconds = round((time.perf_counter() - begin) / len(tables), 1)
        told = {"zero-shot top-1": [round(x, 4) for x in found], "seconds": seconds}
        report["runs"][run][str(shots)] = {"lr": rate, **told}
        path.write_text(json.dumps(report, indent=2) + "\n")  # what is done stays
  print(shown(report))
  print(path)


def write(folder: pathlib.Path, shots: int, *, seed: int) -> pathlib.Path:
  """A table of so many training pictures of each digit, and the pictures beside it."""
  folder.mkdir()
  scans, labels = quickstart.scans()
  known = ~quickstart.held_out(labels)
  rng, lines = np.random.default_rng(seed), ["filepath,title"]
  for label, name in enumerate(quickstart.CLASS_NAMES):
    for i in rng.choice(np.flatnonzero(known & (labels == label)), shots, replace=False):
      (folder / f"{i}.png").write_bytes(scans[i])
      lines.append(f"{i}.png,{quickstart.TEMPLATES[0].format(name)}")
  table = folder / "few.csv"
  table.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return table


def tuned(
  base: Config, recipe: str, rate: float, *, start: pathlib.Path, table: pathlib.Path, rows: int
) -> Config:
  """A recipe for these pictures, scored on the digits at the end."""
  config = runpy.run_path(str(ROOT / "configs" / recipe))["get_config"](str(start))
  task = dataclasses.replace(config.task, train=(str(table),), hold_out=0.0, augment="none")
  return dataclasses.replace(
    config,
    task=task,
    batch_size=min(config.batch_size, rows),
    epochs=EPOCHS,
    precision=base.precision,
    log_every=50,
    save_every_epochs=0,
    best_metric=None,
    optim=dataclasses.replace(config.optim, lr=rate),
    evals=base.evals[1:],
  )


def shown(report: dict) -> str:
  """The Markdown of docs/training.md."""
  shots = list(next(iter(report["runs"].values())))
  lines = [
    "| | " + " | ".join(f"{k} a class" for k in shots) + " |",
    "|---" * (1 + len(shots)) + "|",
  ]
  start = " | ".join([f"{report['start']:.1%}"] * len(shots))
  lines.append(f"| the start, zero-shot | {start} |")
  for run, told in report["runs"].items():
    values = [np.array(told[k]["zero-shot top-1"]) for k in shots]
    cells = (f"{x.mean():.1%} ({x.min():.1%} to {x.max():.1%})" for x in values)
    lines.append(f"| {run}, {told[shots[0]]['lr']:g} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
