"""Seconds a picture: OFA draws 1,024 image codes of a caption, and a VQGAN decodes them.

    python benchmarks/image_gen.py [--platform=gpu] [--size=base] [--batch 1 4 16] [--dtype=fp32]
      [--samples=1] [--guidance=1] [--repeats=1] [--quick] [--add]

All weights are random; drawing takes as long with any. A batch is so many captions of 16 tokens,
each with `--samples` pictures of 256 pixels, top-k 256 as in the original's script. `--add` puts
further batches into the results of an earlier call.

"without_cache" runs the whole prefix for every code. It is timed at a few lengths, and the time of
all is worked out from them. The operations of the original's algorithm are worked out as well: it
draws for one caption at a time, keeps keys and values, computes the logits of all 59,457 tokens,
and the position biases of the whole prefix for every code and every sample.

"bandwidth_limit" is the time in which a device reads what a step must read: the decoder's weights
and the table of codes once, of each sample the keys and values so far, of each caption those of the
encoder's output. The memory's speed is the vendor's figure for the device (`BANDWIDTHS`), or
`--bandwidth` in GB/s.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ofa_jax.ahead import flops
from ofa_jax.decode import codes
from ofa_jax.decode.beam import Search
from ofa_jax.models import ofa
from ofa_jax.models.abstract import abstract

WORDS, PIXELS, TOP_K = 16, 256, 256
CODES = (PIXELS // 8) ** 2
LENGTHS = (32, 256, 640, 1025)  # of prefixes that are timed without a cache
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
# GB/s of the memory, as the vendor has it; the first name in the device's kind counts.
BANDWIDTHS = {"H200": 4800, "H100 NVL": 3900, "H100 PCIe": 2000, "H100": 3350, "A100": 2039}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
  parser.add_argument("--size", choices=ofa.SIZES, default="base")
  parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
  parser.add_argument("--samples", type=int, default=1, help="pictures of each caption")
  parser.add_argument("--dtype", choices=DTYPES, default="fp32")
  parser.add_argument("--guidance", type=float, default=1.0)
  parser.add_argument("--pieces", type=int, default=codes.PIECES, help="in which the cache grows")
  parser.add_argument("--repeats", type=int, default=1, help="0: the first call counts")
  parser.add_argument("--bandwidth", type=float, help="of the device's memory, GB/s")
  parser.add_argument("--no-uncached", action="store_true", help="nothing without a cache")
  parser.add_argument("--no-codec", action="store_true", help="the codes alone, no pictures")
  parser.add_argument("--trace", type=pathlib.Path, help="folder for a profile of the last batch")
  parser.add_argument("--quick", action="store_true", help="few codes, and nothing is written")
  parser.add_argument("--add", action="store_true", help="batches to the results that are there")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[args.platform])
  jax.config.update("jax_default_matmul_precision", None if args.dtype == "bf16" else "highest")
  args.codes = 16 if args.quick else CODES
  config = ofa.config(args.size, code_image_size=PIXELS)
  with phase(f"weights of OFA-{args.size}, {args.dtype}, on {args.platform}"):
    model = Model(config, dtype=DTYPES[args.dtype])
    jax.block_until_ready(model.weights)
  threads = len(os.sched_getaffinity(0))
  device = f"cpu-{threads}core" if args.platform == "cpu" else jax.devices()[0].device_kind
  report = {
    "device": device,
    "processor": f"{platform.machine()} {platform.processor()}".strip(),
    "load_average": os.getloadavg(),
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    "model": f"OFA-{args.size}",
    "precision": args.dtype,
    "codes": args.codes,
    "samples": args.samples,
    "guidance": args.guidance,
    "pieces": args.pieces,
    "by_batch_size": {},
  }
  with phase("operations, counted"):
    report["gigaflop_a_picture"] = operations(config, model, args)
  print(json.dumps(report["gigaflop_a_picture"]), flush=True)
  for batch in args.batch:
    told = measured(config, model, batch, args, device=device)
    report["by_batch_size"][str(batch)] = {**told, "load_average": os.getloadavg()}
    print(f"batch {batch}: {json.dumps(told)}", flush=True)
  if not args.no_uncached:
    report["without_cache"] = uncached(config, model, args)
    print(f"without cache: {json.dumps(report['without_cache'])}", flush=True)
  if not (args.no_codec or args.quick):
    report["codec_seconds_a_picture"] = codec_seconds(args)
    print(f"codec: {report['codec_seconds_a_picture']} s a picture", flush=True)
  if not args.quick:
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{device}.{args.size}.{args.dtype}".replace(" ", "-").lower()
    path = args.out / f"image_gen.{name}.json"
    path.write_text(json.dumps(added(path, report) if args.add else report, indent=2) + "\n")
    print(path)


def added(path: pathlib.Path, report: dict) -> dict:
  """The results in a file with those of a report; ValueError where they are of something else."""
  there = json.loads(path.read_text())
  same = ("model", "precision", "codes", "samples", "guidance", "pieces", "versions")
  if other := [name for name in same if there[name] != report[name]]:
    raise ValueError(f"Expected the settings of {path}, found other {', '.join(other)}")
  batches = {**there["by_batch_size"], **report["by_batch_size"]}
  return {**there, **report, "by_batch_size": batches}


class Model:
  """Weights that were drawn on the device, and what is compiled of them."""

  def __init__(self, config, *, dtype):
    self.graph, params, rest = abstract(config)
    self.weights = random_weights(params, dtype), random_weights(rest, jnp.float32)

  def merged(self, weights):
    return nnx.merge(self.graph, *weights)


def random_weights(shapes, dtype):
  """Arrays of these shapes on the device: scales and variances are 1, all else is small."""

  @jax.jit
  def draw():
    key, count = jax.random.key(0), iter(range(10**6))

    def one(path, x):
      if "scale" in str(path[-1]) or "var" in str(path[-1]):
        return jnp.ones(x.shape, dtype)
      return (jax.random.normal(jax.random.fold_in(key, next(count)), x.shape) * 0.02).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)

  return draw()


def generating(model, batch, args):
  """The function that draws, of weights, sources and keys."""
  search = Search(
    num_beams=args.samples,
    max_length=args.codes,
    min_length=args.codes,
    gen_code=True,
    sample=True,
    top_k=TOP_K,
  )

  def generate(weights, source, keys):
    merged = model.merged(weights)
    if args.guidance != 1:
      source = jnp.concatenate([source, source.at[:, WORDS // 2 :].set(1)])
    encoded = merged.encode(source)
    found = codes.generate(
      merged, encoded, search=search, rngs=keys, guidance=args.guidance, pieces=args.pieces
    )
    return found.tokens, found.scores

  rng = np.random.default_rng(0)
  source = jnp.asarray(rng.integers(4, 50_000, (batch, WORDS)).astype(np.int32))
  return generate, source, jax.random.split(jax.random.key(0), batch)


def measured(config, model, batch, args, *, device) -> dict:
  """Seconds a picture, and how near that is to what the memory's speed allows."""
  generate, *inputs = generating(model, batch, args)
  pictures = batch * args.samples
  size = f"{batch} x {args.samples} pictures of {args.codes} codes"
  begin = time.perf_counter()
  with phase(f"compile {size}"):
    compiled = jax.jit(generate).lower(model.weights, *inputs).compile()
  told = {"compile_seconds": round(time.perf_counter() - begin, 1)}
  run = functools.partial(compiled, model.weights, *inputs)
  with phase(f"draw {size}, times: {1 + args.repeats}"):
    seconds = timed(run, args.repeats)
  told["seconds_a_picture"] = round(seconds / pictures, 4)
  told["milliseconds_a_step"] = round(1000 * seconds / (args.codes + 1), 3)
  speed = args.bandwidth or next((x for name, x in BANDWIDTHS.items() if name in device), None)
  if speed:
    limit = least_bytes(config, batch, args) / (speed * 1e9)
    told["bandwidth_limit_seconds_a_picture"] = round(limit / pictures, 5)
    told["share_of_bandwidth_limit"] = round(limit / seconds, 3)
  if args.trace and batch == args.batch[-1]:
    with jax.profiler.trace(str(args.trace)):
      jax.block_until_ready(run())
  return told


def least_bytes(config, batch, args) -> float:
  """What must be read of the memory for all codes of a batch, see above."""
  size, D, L = DTYPES[args.dtype].dtype.itemsize, config.width, config.decoder_layers
  rows = batch * (2 if args.guidance != 1 else 1)
  steps = args.codes + 1
  layer = 4 * D * D + 2 * D * D + 2 * D * config.mlp  # self, cross without keys and values, mlp
  weights = L * layer + (4 + config.num_codes) * D
  cache = L * 2 * D * rows * args.samples * (steps + 1) / 2  # on average half of the positions
  memory = L * 2 * D * rows * WORDS
  return size * steps * (weights + cache + memory)


def operations(config, model, args) -> dict:
  """Operations of a picture, ours counted from the program, the original's worked out."""
  generate, *inputs = generating(model, 1, args)
  ours = flops.count(jax.make_jaxpr(generate)(model.weights, *inputs)) / args.samples
  theirs = originals(config, args.codes)
  return {
    "ours": round(ours / 1e9, 1),
    "original": round(theirs / 1e9, 1),
    "fewer": round(theirs / ours, 2),
  }


def originals(config, length) -> float:
  """Operations of the original's decoder for one sample, a multiply-add being two."""
  D, V, L = config.width, config.vocab_size, config.decoder_layers
  total = 0
  for step in range(length + 1):
    seen = step + 1
    projections = L * (4 * D * D + 2 * D * D + 2 * D * config.mlp)
    attention = L * 2 * D * (seen + WORDS)
    # Of the whole prefix: its position queries and keys, those across, and their products.
    positions = 3 * seen * D * D + WORDS * D * D + D * seen * seen + D * seen * WORDS
    total += 2 * (projections + attention + positions + D * V)
  return total


def uncached(config, model, args) -> dict:
  """Seconds a picture where every code runs the whole prefix again, from a few lengths."""
  lengths = sorted({min(n, args.codes + 1) for n in LENGTHS})
  source = jnp.full((1, WORDS), 5, jnp.int32)
  seconds = []
  for length in lengths:
    tokens = jnp.full((1, length), config.first_code, jnp.int32)

    @jax.jit
    def forward(weights, source, tokens):
      merged = model.merged(weights)
      hidden = merged.hidden(merged.encode(source), tokens, code_mask=True)
      return merged.code_logits(hidden[:, -1])

    with phase(f"without a cache, {length} codes"):
      seconds.append(timed(lambda: forward(model.weights, source, tokens), 2))  # noqa: B023
  steps = np.arange(1, args.codes + 2)
  return {
    "seconds_by_length": dict(zip(lengths, [round(x, 4) for x in seconds], strict=True)),
    "seconds_a_picture": round(float(np.interp(steps, lengths, seconds).sum()), 1),
  }


def codec_seconds(args) -> float:
  """Seconds in which a VQGAN of the released size decodes a picture."""
  from ofa_jax.models import vqgan

  graph, params, rest = abstract(vqgan.VQGANConfig())
  weights = random_weights(params, jnp.float32), random_weights(rest, jnp.float32)
  number = 1 if args.platform == "cpu" else 8
  tokens = jnp.zeros((number, PIXELS // 8, PIXELS // 8), jnp.int32)

  @jax.jit
  def decode(weights, tokens):
    return vqgan.decode_batches(nnx.merge(graph, *weights), tokens, batch_size=number)

  with phase(f"the codec, {number} pictures"):
    return round(timed(lambda: decode(weights, tokens), 2) / number, 3)


@contextlib.contextmanager
def phase(name: str):
  """Says what begins, and how long it took: a run that is ended by a limit shows where it was."""
  print(f"{name} ...", flush=True)
  begin = time.perf_counter()
  yield
  print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)


def timed(function, repeats: int) -> float:
  """The median of the seconds, after one call that is not counted; of 0 those of that call."""
  seconds = []
  begin = time.perf_counter()
  jax.block_until_ready(function())
  if not repeats:
    return time.perf_counter() - begin
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds)


if __name__ == "__main__":
  main()
