"""Time and memory of the loss over the vocabulary: whole logits, and blocks of words.

    python benchmarks/vocabulary_loss.py [--sizes base large] [--tokens 512 2048] [--blocks 4 16]
    python benchmarks/vocabulary_loss.py --topology=v5e:2x2 --dtype=bfloat16

One loss with label smoothing and its gradient by the decoder's states, and by the table of tokens
unless --frozen, of a released OFA's width and its 59,457 words. Ways to do it take turns; the
median counts. Memory is what the compiled program needs beside its inputs and outputs. With
--topology it is compiled for one of these devices, which are not there, and the time is the
compiler's prediction.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from input_pipeline import cpu_model

from ofa_jax import losses
from ofa_jax.ahead import cost, topology
from ofa_jax.losses_vocabulary import InBlocks
from ofa_jax.models import ofa


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", nargs="+", default=["base", "large"], choices=ofa.SIZES)
  parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
  parser.add_argument("--blocks", nargs="+", type=int, default=[4, 16])
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--topology", help="compile for these, like v5e:2x2; nothing is run")
  parser.add_argument("--frozen", action="store_true", help="the table is not trained")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  device = jax.devices()[0]
  if args.topology:
    device = topology.devices(topology.parse(args.topology))[0]
  rows = [row for size in args.sizes for n in args.tokens for row in measure(size, n, device, args)]
  name = f"{device.platform}-{len(os.sched_getaffinity(0))}core"
  report = {
    "device": name if device.platform == "cpu" else device.device_kind.replace(" ", "-").lower(),
    "compiled_only": args.topology is not None,
    "cpu": cpu_model(),
    "load_average": os.getloadavg(),
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "dtype": args.dtype,
    "frozen": args.frozen,
    "rows": rows,
  }
  print(json.dumps(report, indent=2))
  args.out.mkdir(parents=True, exist_ok=True)
  kind = f"{args.dtype}{'.frozen' if args.frozen else ''}"
  path = args.out / f"vocabulary_loss.{report['device']}.{kind}.json"
  path.write_text(json.dumps(report, indent=2) + "\n")
  print(path)


def measure(
  size: str, tokens: int, device: jax.Device, args: argparse.Namespace
) -> list[dict[str, object]]:
  """A row of the report for each number of blocks; 1: whole logits."""
  config, rng = ofa.SIZES[size], np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(8, tokens // 8, config.width)), args.dtype)
  table = jnp.asarray(rng.normal(0, 0.02, (config.vocab_size, config.width)), args.dtype)
  targets = jnp.asarray(rng.integers(4, config.vocab_size, hidden.shape[:2]), jnp.int32)

  def total(hidden, table, blocks):
    logits = InBlocks(hidden, table, blocks)
    if blocks == 1:
      logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    return losses.label_smoothed(logits, targets, smoothing=0.1)["loss"].value

  def gradient(blocks):
    run = functools.partial(total, blocks=blocks)
    run = jax.jit(jax.value_and_grad(run, 0 if args.frozen else (0, 1)))
    place = jax.sharding.SingleDeviceSharding(device)
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in (hidden, table))
    return run.lower(*shapes).compile()

  ways = {blocks: gradient(blocks) for blocks in (1, *args.blocks)}
  rows = [
    {
      "size": size,
      "tokens": tokens,
      "blocks": blocks,
      "temporary_megabytes": round(run.memory_analysis().temp_size_in_bytes / 1e6, 1),
    }
    for blocks, run in ways.items()
  ]
  if args.topology:
    clock = topology.parse(args.topology).hardware.clock
    for row, run in zip(rows, ways.values(), strict=True):
      row["predicted_seconds"] = round(cost.estimate(run.as_text()).cycles / clock, 6)
    return rows
  seconds = {blocks: [] for blocks in ways}
  for turn in range(args.repeats + 1):
    for blocks, run in ways.items():
      begin = time.perf_counter()
      jax.block_until_ready(run(hidden, table))
      if turn:
        seconds[blocks].append(time.perf_counter() - begin)
  for row, (blocks, run) in zip(rows, ways.items(), strict=True):
    row["seconds"] = round(statistics.median(seconds[blocks]), 4)
    row["loss"] = float(run(hidden, table)[0])
  return rows


if __name__ == "__main__":
  main()
