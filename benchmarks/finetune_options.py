"""What the options of contrastive training make of a converted checkpoint.

    python benchmarks/finetune_options.py [--only plain FLIP] [--start-steps 60] [--steps 150]

The quickstart's model is trained for a few steps, written as the original's `.pt` and converted
back by ofa_jax.convert. From there it is fine-tuned on the quickstart's digits,
each time with another option and the same data, rate and seed. Every run is scored on the held-out
digits. Results are JSON and, on the screen, the table of docs/training.md.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from input_pipeline import cpu_model

from ofa_jax import evaluate, train
from ofa_jax.config import Config, Lora, Optim
from ofa_jax.convert.cnclip import model_config
from ofa_jax.models.cnclip import layer_rates

ROOT = pathlib.Path(__file__).parent.parent
METRICS = {
  "zero-shot top-1": "valid/zeroshot_top1",
  "image to text R@1": "valid/i2t_r1",
  "text to image R@1": "valid/t2i_r1",
}
LORA = Lora(matrices=(r"/(attn|mlp)/(qkv|out|up|down)/kernel$",), rank=8, alpha=16.0)
GOAL = 0.95  # zero-shot, or better than the start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs; the default is all")
  parser.add_argument("--start-steps", type=int, default=60)
  parser.add_argument(
    "--steps", type=int, default=150, help="of a fine-tune; SigLIP has twice as many"
  )
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  base = quickstart()
  device = jax.devices()[0]
  name = "cpu-2core" if device.platform == "cpu" else device.device_kind
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"finetune_options.{name}.json"
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    start, metrics = make_start(base, folder, steps=args.start_steps)
    report = {
      "device": name,
      "cpu": cpu_model(),
      "jax": jax.__version__,
      "batch_size": base.batch_size,
      "start_steps": args.start_steps,
      "steps": args.steps,
      "goal_zeroshot": GOAL,
      "start": score(metrics),
      "runs": {},
    }
    for run, (flags, config) in options(base, start=start, folder=folder, args=args).items():
      if args.only and run not in args.only:
        continue
      begin = time.perf_counter()
      metrics = train.train(config, str(folder / run))
      seconds = round(time.perf_counter() - begin, 1)
      report["runs"][run] = {"flags": flags, **score(metrics), "seconds": seconds}
      path.write_text(json.dumps(report, indent=2) + "\n")  # what is done stays
  print(table(report))
  print(path)


def quickstart() -> Config:
  """The quickstart's config, scored only at the end."""
  config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
  evals = tuple(dataclasses.replace(e, every=0) for e in config.evals)
  return dataclasses.replace(config, evals=evals, log_every=50, save_every=10_000)


def make_start(base: Config, folder: pathlib.Path, *, steps: int) -> tuple[str, dict[str, float]]:
  """A model directory that went through the original's format, and its metrics."""
  trained = train.train(dataclasses.replace(base, steps=steps), str(folder / "short"))
  sizes = folder / "sizes.json"  # the heads, which are in no tensor
  sizes.write_text(json.dumps(model_config.to_fields(base.model)))
  convert("short", "start.pt", "--to=torch", folder=folder)
  convert("start.pt", "start", f"--model-config={sizes}", folder=folder)
  start = str(folder / "start")
  metrics = evaluate.run(base, start)
  assert metrics == trained, f"the way through .pt changed the model: {trained} to {metrics}"
  return start, metrics


def convert(source: str, target: str, *flags: str, folder: pathlib.Path) -> None:
  """Runs ofa_jax.convert."""
  command = [sys.executable, str(ROOT / "tools" / "convert_torch_weights.py")]
  subprocess.run(
    [*command, str(folder / source), str(folder / target), *flags],
    check=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )


def options(
  base: Config, *, start: str, folder: pathlib.Path, args: argparse.Namespace
) -> dict[str, tuple[str, Config]]:
  """Every run by name: what it changes, in words, and its config."""
  fine = dataclasses.replace(base.optim, lr=1e-3, warmup=20)
  config = dataclasses.replace(base, init=start, steps=args.steps, optim=fine)

  def task(**changes: Any) -> dict[str, Any]:
    return {"task": dataclasses.replace(base.task, **changes)}

  def optim(**changes: Any) -> dict[str, Optim]:
    return {"optim": dataclasses.replace(fine, **changes)}

  siglip = dataclasses.replace(base.model, logit_bias=-10.0)
  runs = {
    "plain": ("", {}),
    "accumulation": ("`accum=4`", {"accum": 4}),
    "FLIP": (
      f"`mask_ratio=0.5`, `mask_until={args.steps * 4 // 5}`",
      task(mask_ratio=0.5, mask_until=args.steps * 4 // 5),
    ),
    "frozen image tower": (
      '`layer_rates(model, "image", trained=0)`',
      optim(lr_scale=layer_rates(base.model, "image", trained=0)),
    ),
    "LoRA": (
      f"`optim.lora`, rank {LORA.rank}, alpha {LORA.alpha:g}, attention and feed-forward parts",
      optim(lora=LORA),
    ),
    "SigLIP": (
      f'`loss_kind="sigmoid"`, `logit_bias=-10`, {2 * args.steps} steps',
      {"model": siglip, "steps": 2 * args.steps, **task(loss_kind="sigmoid")},
    ),
    "distillation": (
      "`teacher` = the plain one, `distill_features=0.5`, `distill_logits=1`",
      task(teacher=str(folder / "plain"), distill_features=0.5, distill_logits=1.0),
    ),
  }
  return {name: (flags, dataclasses.replace(config, **new)) for name, (flags, new) in runs.items()}


def score(metrics: dict[str, float]) -> dict[str, float]:
  return {name: round(metrics[key], 4) for name, key in METRICS.items()}


def table(report: dict[str, Any]) -> str:
  """The Markdown of docs/training.md."""
  rows = [("the start", report["start"])]
  rows += [
    (f"{name}: {run['flags']}" if run["flags"] else name, run)
    for name, run in report["runs"].items()
  ]
  lines = ["| run | " + " | ".join(METRICS) + " |", "|---" * (1 + len(METRICS)) + "|"]
  for name, run in rows:
    values = (f"{100 * run[metric]:.1f} %" for metric in METRICS)
    lines.append(f"| {name} | " + " | ".join(values) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
