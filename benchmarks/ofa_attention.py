"""OFA's absolute position bias: added to the logits, or folded into queries and keys.

    python benchmarks/ofa_attention.py [--batch 2] [--length 588] [--layers 6]

The bias is a product of position queries and keys, so that it could be had by appending them to the
content's: no array of length x length x heads, but twice the terms in the product of every layer.
The positions are the same for all rows of a batch (unless patches are drawn), so that the array is
one for the batch and for all layers. Checks that both give the same values and gradients, and
prints the CPU time of each, the least of some runs one after the other.
"""

import argparse
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp

from ofa_jax.models.attention import attention
from ofa_jax.models.ofa.layers import PRODUCTS, position_product

HEADS, HEAD = 12, 64  # Base


def added(q, k, v, position_q, position_k, relative, *, layers):
  """The bias as an array, made once."""
  bias = position_product(position_q, position_k)

  def layer(x, _):
    return attention(x * PRODUCTS**-0.5, k, v, bias=bias + relative), None

  return jax.lax.scan(layer, q, None, length=layers)[0]


def folded(q, k, v, position_q, position_k, relative, *, layers):
  """Position queries and keys beside the content's in every layer."""
  k = jnp.concatenate([k, jnp.broadcast_to(position_k, k.shape)], axis=-1)
  position_q = jnp.broadcast_to(position_q, q.shape)

  def layer(x, _):
    return attention(jnp.concatenate([x, position_q], axis=-1), k, v, bias=relative), None

  return jax.lax.scan(layer, q, None, length=layers)[0]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=2)
  parser.add_argument("--length", type=int, default=588)  # 384 pixels and 12 tokens
  parser.add_argument("--layers", type=int, default=6)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  rows, places = ((n, args.length, HEADS, HEAD) for n in (args.batch, 1))
  shapes = (rows, rows, rows, places, places, (1, HEADS, args.length, args.length))
  keys = jax.random.split(jax.random.key(0), len(shapes))
  inputs = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
  runs = {}
  for fn in (added, folded):
    run = jax.jit(lambda *x, fn=fn: fn(*x, layers=args.layers))
    runs[f"{fn.__name__} forward"] = run
    runs[f"{fn.__name__} gradient"] = jax.jit(
      jax.grad(lambda *x, run=run: jnp.sum(jnp.sin(run(*x))), argnums=tuple(range(len(shapes))))
    )
  outputs = {name: jax.block_until_ready(run(*inputs)) for name, run in runs.items()}
  report = {"device": f"cpu-{os.cpu_count()}core", **vars(args), "difference": {}, "seconds": {}}
  del report["out"]
  for kind in ("forward", "gradient"):
    pairs = zip(
      *(jax.tree.leaves(outputs[f"{n} {kind}"]) for n in ("folded", "added")), strict=True
    )
    worst = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    assert worst < 1e-5, worst
    report["difference"][kind] = worst
  times = {name: [] for name in runs}
  for _ in range(args.repeats):
    for name, run in runs.items():
      start = time.process_time()
      jax.block_until_ready(run(*inputs))
      times[name].append(time.process_time() - start)
  report["seconds"] = {name: round(min(values), 3) for name, values in times.items()}
  print(json.dumps(report))
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"ofa_attention.{report['device']}.json"
  path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  main()
