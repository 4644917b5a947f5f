"""Pairs per second of Chinese-CLIP's training step, beside `cn_clip` in PyTorch.

    pip install --no-deps cn_clip        # its other requirements are not needed here
    python benchmarks/cnclip_train.py [--models ViT-B-16] [--batch-size 16] [--repeats 3]

Both sides train the same random weights, whose loss on one batch is compared first: forward,
backward, AdamW by the original's rule, dropout, in-batch accuracy. Each is a process of its own,
so that its peak memory is its own, and they take turns. "synthetic" is one batch that stays on the
device, "decoded" are JPEG files from TSV (ours) and LMDB (the original's way, one worker process a
core). The plain matrix products of a layer are timed beside it, as most of the time goes to them.

On a CPU both compute in fp32, cn_clip as it is. On a GPU it is bf16: cn_clip under
`torch.autocast`, with fused AdamW and `scaled_dot_product_attention` in both towers. The two sides
stand in one long file to be read beside each other: what one does the other has to.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

GOALS = {"cpu": 0.9, "gpu": 1.5}  # pairs per second over cn_clip's
INPUTS = ("synthetic", "decoded")
CONTEXT = 52
LR, BETAS, EPS, DECAY = 1e-6, (0.9, 0.98), 1e-6, 0.001
MODELS = {"cpu": ("ViT-B-16",), "gpu": ("ViT-B-16", "ViT-L-14", "ViT-H-14")}
BATCHES = {
  "cpu": {"ViT-B-16": 16, "ViT-L-14": 8, "ViT-L-14-336": 4, "ViT-H-14": 4},
  "gpu": {"ViT-B-16": 256, "ViT-L-14": 128, "ViT-L-14-336": 40, "ViT-H-14": 64},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What both sides are told.

  Attributes:
    model: its name.
    fields: its sizes, by the names of cn_clip's JSON files.
    platform: "cpu" or "gpu".
    batch_size: pairs of an update.
    unroll: layers per turn of our loop over layers.
    threads: of the CPU.
    folder: of the data and the weights.
  """

  model: str
  fields: dict[str, Any]
  platform: str
  batch_size: int
  unroll: int
  threads: int
  folder: pathlib.Path

  @property
  def precision(self) -> str:
    return "fp32" if self.platform == "cpu" else "bf16"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--platform", choices=GOALS, default="cpu")
  parser.add_argument("--models", nargs="+", metavar="NAME", help="on a GPU: B/16, L/14 and H/14")
  parser.add_argument("--batch-size", type=int, help="the default depends on model and platform")
  parser.add_argument("--steps", type=int, help="of a turn; 1 on a CPU, 20 on a GPU")
  parser.add_argument("--repeats", type=int, default=3, help="turns of each side and input")
  parser.add_argument("--unroll", type=int, default=1, help="layers per turn of our loop")
  parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args(argv)
  unknown = [name for name in args.models or () if name not in BATCHES[args.platform]]
  if unknown:
    parser.error(f"expected models out of {', '.join(BATCHES['cpu'])}, found {', '.join(unknown)}")
  args.models = args.models or list(MODELS[args.platform])
  args.steps = args.steps or (1 if args.platform == "cpu" else 20)
  return args


def settings(args: argparse.Namespace, *, folder: pathlib.Path) -> list[Setting]:
  """One for each model."""
  from ofa_jax.convert.cnclip import model_config
  from ofa_jax.models import cnclip

  results = []
  for name in args.models:
    config = cnclip.config(*cnclip.MODELS[name])
    results.append(
      Setting(
        model=name,
        fields=model_config.to_fields(config),
        platform=args.platform,
        batch_size=args.batch_size or BATCHES[args.platform][name],
        unroll=args.unroll,
        threads=args.threads,
        folder=folder,
      )
    )
  return results


def main() -> None:
  args = parse()
  from input_pipeline import cpu_model, make_data

  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    pending = settings(args, folder=folder)
    make_data(folder, 4 * max(setting.batch_size for setting in pending))
    models = {setting.model: measure(setting, args) for setting in pending}
  device = next(iter(models.values()))["device"]
  report = {
    "device": f"cpu-{args.threads}core" if args.platform == "cpu" else device,
    "cpu": cpu_model(),
    "load_average": os.getloadavg(),
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "cn_clip")},
    "steps": args.steps,
    "goal": GOALS[args.platform],
    "models": models,
  }
  for name, result in models.items():
    print(f"{name}, batch {result['batch_size']}, {result['precision']}")
    for way, rate in result["pairs_per_second"].items():
      print(f"  {way:28}{rate:10.2f} pairs/s")
    for key in ("ofa_jax_over_cn_clip", "product_over_torch", "seconds_by_part", "peak_bytes"):
      print(f"  {key}: {json.dumps(result[key])}")
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / f"cnclip_train.{report['device'].replace(' ', '-').lower()}.json"
  path.write_text(json.dumps(report, indent=2) + "\n")
  print(path)


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
  """Both sides of one model, in turn."""
  with Side("cn_clip", setting) as theirs, Side("ofa_jax", setting) as ours:
    sides = {"ofa_jax": ours, "cn_clip": theirs}
    losses = {name: side.ask("loss") for name, side in sides.items()}
    tolerance = 1e-4 if setting.precision == "fp32" else 2e-2
    assert math.isclose(*losses.values(), rel_tol=tolerance), f"not the same model: {losses}"
    seconds = {f"{kind}, {name}": [] for kind in INPUTS for name in sides}
    products = {name: [] for name in sides}
    for turn in range(args.repeats + 1):  # the first compiles and fills caches
      for kind in INPUTS:
        for name, side in sides.items():
          took = side.ask("steps", kind, 1 if turn == 0 else args.steps)
          if turn:
            seconds[f"{kind}, {name}"].append(took / args.steps)
      for name, side in sides.items():
        products[name].append(side.ask("product"))
    peaks = {name: side.ask("peak") for name, side in sides.items()}
    parts = {name: side.ask("parts", args.repeats) for name, side in sides.items()}
    facts = ours.ask("facts")
  rates = {name: setting.batch_size / statistics.median(values) for name, values in seconds.items()}
  product = {name: max(values) for name, values in products.items()}
  work = facts.pop("flops_per_pair")
  return {
    **facts,
    "batch_size": setting.batch_size,
    "precision": setting.precision,
    "unroll": setting.unroll,
    "loss": losses,
    "pairs_per_second": {name: round(rate, 3) for name, rate in rates.items()},
    "all_seconds": {name: [round(x, 4) for x in values] for name, values in seconds.items()},
    "ofa_jax_over_cn_clip": {
      kind: round(rates[f"{kind}, ofa_jax"] / rates[f"{kind}, cn_clip"], 2) for kind in INPUTS
    },
    "product_flops_per_second": {name: round(rate) for name, rate in product.items()},
    "product_over_torch": round(product["ofa_jax"] / product["cn_clip"], 2),
    "flops_per_pair": work,
    "share_of_product": {
      name: round(rates[f"synthetic, {name}"] * work / product[name], 3) for name in product
    },
    "share_of_peak": facts["peak"]
    and {name: round(rates[f"synthetic, {name}"] * work / facts["peak"], 3) for name in product},
    "seconds_by_part": parts,
    "peak_bytes": peaks,
  }


class Side:
  """One of the two in a process of its own, which works only when asked."""

  def __init__(self, name: str, setting: Setting):
    context = multiprocessing.get_context("spawn")
    self._here, there = context.Pipe()
    self._process = context.Process(target=_serve, args=(name, setting, there))
    self._process.start()
    there.close()
    self._here.recv()

  def ask(self, *request: Any) -> Any:
    """Sends a method's name and its arguments, waits for the answer."""
    self._here.send(request)
    return self._here.recv()

  def __enter__(self) -> "Side":
    return self

  def __exit__(self, *_: Any) -> None:
    self._here.close()  # the process ends when nobody can ask any more
    self._process.join()


def _serve(name: str, setting: Setting, connection: Any) -> None:
  os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[setting.platform]
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # two programs share a card
  if setting.platform == "cpu":  # XLA has a thread for each core that it may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.threads])
  side = {"ofa_jax": Ours, "cn_clip": Theirs}[name](setting)
  connection.send("ready")
  while True:
    try:
      method, *arguments = connection.recv()
    except EOFError:
      side.close()
      return
    connection.send(getattr(side, method)(*arguments))


def synthetic(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
  """Pixels uint8[B, S, S, 3] and tokens int32[B, 52] of one batch."""
  rng = np.random.default_rng(0)
  size = setting.fields["image_resolution"]
  pixels = rng.integers(0, 256, (setting.batch_size, size, size, 3), np.uint8)
  tokens = rng.integers(1, setting.fields["vocab_size"], (setting.batch_size, CONTEXT), np.int32)
  tokens[:, CONTEXT // 2 :] = 0  # half of a text is padding
  return pixels, tokens


def product_shapes(setting: Setting) -> list[tuple[int, int, int]]:
  """(rows, inputs, outputs) of the products of a layer's MLP."""
  width = setting.fields["vision_width"]
  patches = (setting.fields["image_resolution"] // setting.fields["vision_patch_size"]) ** 2
  rows = setting.batch_size * (patches + 1)
  return [(rows, width, 4 * width), (rows, 4 * width, width)]


def fastest(function: Callable[[], Any], *, repeats: int) -> float:
  """Seconds of the fastest call, after one that is not counted."""
  seconds = []
  for _ in range(repeats + 1):
    begin = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - begin)
  return min(seconds[1:])


def resident() -> int:
  """The largest resident set of this process so far, in bytes."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Ours:
  """The step of `ofa_jax.train`, on one device."""

  def __init__(self, setting: Setting):
    import jax

    from ofa_jax import hub
    from ofa_jax.config import Config, Optim
    from ofa_jax.convert.cnclip import model_config
    from ofa_jax.data import pipeline
    from ofa_jax.data.pairs import PairData
    from ofa_jax.engine import sharding, step
    from ofa_jax.models import cnclip
    from ofa_jax.tasks.contrastive import Contrastive

    self._jax, self._setting = jax, setting
    self._libraries = resident()
    config = Config(
      model=model_config.from_fields(setting.fields),
      task=Contrastive(
        train=(PairData.of(setting.folder, "train"),),
        image_size=setting.fields["image_resolution"],
        context_length=CONTEXT,
      ),
      batch_size=setting.batch_size,
      steps=10**6,
      precision=setting.precision,
      unroll=setting.unroll,
      optim=Optim(
        lr=LR,
        b1=BETAS[0],
        b2=BETAS[1],
        eps=EPS,
        weight_decay=DECAY,
        no_decay=cnclip.NO_DECAY_ORIGINAL,
        clamp=cnclip.LOGIT_SCALE_BOUNDS,
      ),
    )
    self._mesh = sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
    self._program = step.build(config, self._mesh, steps=config.steps)
    self._state = step.init(self._program)
    shardings = self._program.shardings
    source = hub.open_model(setting.folder / f"{setting.model}.pt", config=config.model)
    params, rest = source.load((shardings.params, shardings.rest))
    self._state = dataclasses.replace(self._state, params=params, rest=rest)
    pixels, tokens = synthetic(setting)
    rows = np.arange(setting.batch_size, dtype=np.int32)
    batch = {
      "image": pixels,
      "tokens": tokens,
      "image_index": rows,
      "caption_index": rows,
      "weight": np.ones(setting.batch_size, np.float32),
    }
    self._batch = sharding.to_global(batch, self._mesh)
    self._update = step.train_step(self._program).lower(self._state, self._batch).compile()
    decoded = pipeline.train_batches(
      config.task.examples("train"),
      batch_size=setting.batch_size,
      seed=0,
      start=0,
      workers=setting.threads,
      bad=pipeline.BadRows(),
    )
    self._decoded = decoded
    self._next = lambda: sharding.to_global(next(decoded), self._mesh)

  def loss(self) -> float:
    """Of the synthetic batch, without dropout."""
    return float(self._function(training=False)(self._state.params, self._state.rest, self._batch))

  def steps(self, kind: str, num: int) -> float:
    """Seconds of some updates."""
    begin = time.perf_counter()
    for _ in range(num):
      batch = self._batch if kind == "synthetic" else self._next()
      self._state, metrics = self._update(self._state, batch)
    self._jax.block_until_ready(metrics)
    return time.perf_counter() - begin

  def product(self) -> float:
    """FLOP/s of a layer's plain matrix products."""
    jax = self._jax
    precision = "highest" if self._setting.precision == "fp32" else None
    dtype = jax.numpy.float32 if self._setting.precision == "fp32" else jax.numpy.bfloat16
    multiply = jax.jit(lambda a, b: jax.numpy.matmul(a, b, precision=precision))
    rates = []
    for rows, inputs, outputs in product_shapes(self._setting):
      keys = jax.random.split(jax.random.key(0))
      a = jax.random.normal(keys[0], (rows, inputs), dtype)
      b = jax.random.normal(keys[1], (inputs, outputs), dtype)
      seconds = fastest(lambda a=a, b=b: multiply(a, b).block_until_ready(), repeats=5)
      rates.append(2 * rows * inputs * outputs / seconds)
    return statistics.mean(rates)

  def parts(self, repeats: int) -> dict[str, float]:
    """Seconds of the forward pass, with the backward pass, and of a whole update."""
    jax, state = self._jax, self._state
    forward = self._function(training=True)
    both = jax.jit(jax.grad(forward))
    inputs = (state.params, state.rest, self._batch)
    calls = {"forward": forward, "forward and backward": both}
    seconds = {
      name: fastest(lambda f=f: jax.block_until_ready(f(*inputs)), repeats=repeats)
      for name, f in calls.items()
    }
    seconds["update"] = fastest(lambda: self.steps("synthetic", 1), repeats=repeats)
    return {name: round(value, 4) for name, value in seconds.items()}

  def facts(self) -> dict[str, Any]:
    """The device, what it can do where that is published, and the work of a pair."""
    from ofa_jax.ahead import flops, topology

    device = self._jax.devices()[0]
    forward = self._function(training=True)
    inputs = (self._program.abstract.params, self._program.abstract.rest, self._batch)
    work = 3 * flops.count(self._jax.make_jaxpr(forward)(*inputs)) / self._setting.batch_size
    return {
      "device": device.device_kind,
      "peak": topology.peak(device.device_kind),
      "flops_per_pair": round(work),
    }

  def peak(self) -> dict[str, int]:
    """The most memory: of the process, of which some is libraries, or of the device."""
    if self._setting.platform == "cpu":
      return {"all": resident(), "libraries": self._libraries}
    return {"all": self._jax.devices()[0].memory_stats()["peak_bytes_in_use"]}

  def close(self) -> None:
    self._decoded.close()

  def _function(self, *, training: bool) -> Callable[..., Any]:
    """`(params, rest, batch) -> loss`."""
    program, jax = self._program, self._jax

    @jax.jit
    @program.traced
    def loss(params, rest, batch):
      key = jax.random.key(0) if training else None
      return program.config.task.loss(program.model(params, rest), batch, rngs=key)["loss"].value

    return loss


class Theirs:
  """cn_clip with the loop of its training on one device."""

  def __init__(self, setting: Setting):
    import torch
    from input_pipeline import LmdbPairs
    from torchvision_stand_in import stand_in_for_torchvision

    with stand_in_for_torchvision():
      from cn_clip.clip import modeling_bert, tokenize
      from cn_clip.clip.model import CLIP

    from ofa_jax.data.images import CLIP_MEAN, CLIP_STD

    class Pairs(LmdbPairs):
      def __getitem__(self, index):
        pixels, _, _ = super().__getitem__(index)
        return pixels, tokenize([f"图片{index}"], context_length=CONTEXT)[0]

    self._torch, self._setting = torch, setting
    torch.set_num_threads(setting.threads)
    self._device = "cuda" if setting.platform == "gpu" else "cpu"
    self._libraries = resident()
    torch.manual_seed(0)
    if setting.platform == "gpu":
      fuse_attention(modeling_bert.BertSelfAttention)
    self._model = CLIP(**setting.fields)
    torch.save({"state_dict": self._model.state_dict()}, setting.folder / f"{setting.model}.pt")
    self._model.to(self._device).train()
    spared = ("bn", "ln", "bias", "logit_scale")  # the original's rule
    groups = ([], [])
    for name, p in self._model.named_parameters():
      groups[not any(word in name for word in spared)].append(p)
    self._optimizer = torch.optim.AdamW(
      [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": DECAY}],
      lr=LR,
      betas=BETAS,
      eps=EPS,
      fused=True if setting.platform == "gpu" else None,
    )
    pixels, tokens = synthetic(setting)
    mean, std = np.float32(CLIP_MEAN), np.float32(CLIP_STD)
    pixels = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).copy()
    self._batch = self._place(torch.from_numpy(pixels), torch.from_numpy(tokens).long())
    self._loader = torch.utils.data.DataLoader(
      Pairs(setting.folder / "lmdb" / "train", size=setting.fields["image_resolution"]),
      batch_size=setting.batch_size,
      shuffle=True,
      num_workers=setting.threads,
      persistent_workers=True,
      multiprocessing_context="fork",  # the original's; a spawned process would spawn
      pin_memory=setting.platform == "gpu",
    )
    self._rows = iter(())

  def loss(self) -> float:
    self._model.eval()
    with self._torch.no_grad():
      loss = float(self._forward(*self._batch))
    self._model.train()
    return loss

  def steps(self, kind: str, num: int) -> float:
    begin = time.perf_counter()
    for _ in range(num):
      batch = self._batch if kind == "synthetic" else self._place(*self._next())
      self._optimizer.zero_grad()
      self._forward(*batch).backward()
      self._optimizer.step()
    self._finish()
    return time.perf_counter() - begin

  def product(self) -> float:
    torch = self._torch
    dtype = torch.float32 if self._setting.precision == "fp32" else torch.bfloat16
    rates = []
    for rows, inputs, outputs in product_shapes(self._setting):
      a = torch.randn(rows, inputs, dtype=dtype, device=self._device)
      b = torch.randn(inputs, outputs, dtype=dtype, device=self._device)
      seconds = fastest(lambda a=a, b=b: (torch.matmul(a, b), self._finish()), repeats=5)
      rates.append(2 * rows * inputs * outputs / seconds)
    return statistics.mean(rates)

  def parts(self, repeats: int) -> dict[str, float]:
    def forward():
      loss = self._forward(*self._batch)
      self._finish()
      return loss

    def both():
      self._optimizer.zero_grad()
      forward().backward()
      self._finish()

    calls = {
      "forward": forward,
      "forward and backward": both,
      "update": lambda: self.steps("synthetic", 1),
    }
    return {name: round(fastest(call, repeats=repeats), 4) for name, call in calls.items()}

  def peak(self) -> dict[str, int]:
    if self._setting.platform == "cpu":
      return {"all": resident(), "libraries": self._libraries}
    return {"all": self._torch.cuda.max_memory_allocated()}

  def close(self) -> None:
    self._rows = self._loader = None  # ends the workers

  def _forward(self, images: Any, texts: Any) -> Any:
    """The loss of cn_clip's `get_loss` on one device, with the accuracies that it reports."""
    torch = self._torch
    half = torch.autocast(self._device, torch.bfloat16, enabled=self._setting.precision == "bf16")
    with half:
      image, text, scale = self._model(images, texts)
      logits = scale * image @ text.t()
      right = torch.arange(len(logits), device=self._device)
      entropy = torch.nn.functional.cross_entropy
      loss = (entropy(logits, right) + entropy(logits.t(), right)) / 2
    for side in (logits, logits.t()):
      (side.argmax(-1) == right).sum() / len(right)
    return loss

  def _next(self) -> list[Any]:
    try:
      return next(self._rows)
    except StopIteration:
      self._rows = iter(self._loader)
      return next(self._rows)

  def _place(self, *tensors: Any) -> tuple[Any, ...]:
    return tuple(x.to(self._device, non_blocking=True) for x in tensors)

  def _finish(self) -> None:
    if self._setting.platform == "gpu":
      self._torch.cuda.synchronize()


def fuse_attention(attention: type) -> None:
  """Gives cn_clip's BERT PyTorch's fused attention; its image tower has it by itself."""
  from torch.nn import functional

  def forward(self, hidden_states, attention_mask=None, head_mask=None):
    assert head_mask is None
    q, k, v = (
      self.transpose_for_scores(part(hidden_states)) for part in (self.query, self.key, self.value)
    )
    mask = None if attention_mask is None else attention_mask.to(q.dtype)
    rate = self.dropout.p if self.training else 0.0
    x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
    return (x.permute(0, 2, 1, 3).flatten(2),)

  attention.forward = forward


if __name__ == "__main__":
  main()
