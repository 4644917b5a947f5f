"""Host time of the training loop per step, outside the device.

  python benchmarks/step_overhead.py

The device's work is asynchronous: what the loop itself costs is the processor time of its thread
for handing over a batch, dispatching the step and reading the counters of the step before. It
depends on how many arrays the state has, not on their sizes, so the towers here have the structure
of ViT-H-14 and tiny widths. The goal is less than 1 ms.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from ofa_jax.config import Config, Optim
from ofa_jax.engine import sharding, step
from ofa_jax.models.bert import BertConfig
from ofa_jax.models.cnclip import LOGIT_SCALE_BOUNDS, NO_DECAY, CNCLIPConfig
from ofa_jax.models.vit import ViTConfig
from ofa_jax.tasks.contrastive import Contrastive

RESULTS = Path(__file__).parent / "results"


def tiny_like_vit_h14() -> Config:
  """The parameter tree of ViT-H-14 with RoBERTa large, in arrays of a few numbers."""
  return Config(
    model=CNCLIPConfig(
      vision=ViTConfig(image_size=8, patch_size=8, width=8, layers=32, head_width=8),
      text=BertConfig(vocab_size=64, width=8, layers=24, heads=1, mlp=8, max_positions=8),
      embed_dim=8,
    ),
    task=Contrastive(image_size=8, context_length=4),
    batch_size=8,
    steps=1000,
    optim=Optim(lr=1e-4, weight_decay=0.1, no_decay=NO_DECAY, clamp=LOGIT_SCALE_BOUNDS),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--steps", type=int, default=300)
  arguments = parser.parse_args()

  config = tiny_like_vit_h14()
  mesh = sharding.make_mesh((jax.device_count(), 1, 1))
  program = step.build(config, mesh, steps=config.steps)
  state = step.init(program)
  rng = np.random.default_rng(0)
  host_batch = {
    name: rng.integers(0, 60, spec.shape).astype(spec.dtype)
    for name, spec in config.task.batch_spec(config.batch_size).items()
  }
  update = step.train_step(program).lower(state, sharding.to_global(host_batch, mesh)).compile()

  seconds = {"batch": [], "dispatch": [], "counters": []}
  before = None
  for _ in range(arguments.steps + 20):
    jax.block_until_ready(state)  # so that no wait for the device is counted
    begin = time.thread_time()
    batch = sharding.to_global(host_batch, mesh)
    placed = time.thread_time()
    state, metrics = update(state, batch)
    dispatched = time.thread_time()
    if before is not None:
      np.asarray(before["bad"])
    end = time.thread_time()
    before = metrics
    seconds["batch"].append(placed - begin)
    seconds["dispatch"].append(dispatched - placed)
    seconds["counters"].append(end - dispatched)

  milliseconds = {k: 1e3 * statistics.median(v[20:]) for k, v in seconds.items()}
  total = sum(milliseconds.values())
  device = jax.devices()[0]
  result = {
    "device": f"{device.platform} {device.device_kind}",
    "jax": jax.__version__,
    "arrays_in_state": len(jax.tree.leaves(state)),
    "steps": arguments.steps,
    "median_ms": {k: round(v, 3) for k, v in milliseconds.items()},
    "total_ms": round(total, 3),
  }
  print(json.dumps(result, indent=2))
  name = "cpu-2core" if device.platform == "cpu" else device.device_kind.replace(" ", "-").lower()
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / f"step_overhead.{name}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
