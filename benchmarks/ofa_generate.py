"""Captions per second of OFA-Base, beside `transformers`' BART of the same size in PyTorch.

    python benchmarks/ofa_generate.py [--platform=gpu] [--batch-sizes 1 16] [--repeats 3] [--quick]

Both search with 5 beams for exactly 16 tokens and the end, no 3-gram twice, and take turns: on a
CPU in fp32 with the same number of threads, on a GPU in bf16. BART has OFA-Base's layers, widths,
heads and vocabulary and reads as many tokens as OFA's encoder does for a picture of 384 pixels, 576
patches and 8 words. "tokens": OFA reads 584 tokens too, so that the work is the same. "pictures":
OFA begins with the pixels and runs its ResNet-101, for which BART has nothing to compare.

All-candidate scoring: one question, which the decoder reads too, and 3,129 answers of one to five
words. The scores of `ofa_jax.decode.candidates` are compared with those of scoring each answer
alone, 20 at a time, as the original does; of the latter some are run, the time of all is worked
out. "Token-steps" are positions that go through the decoder.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from input_pipeline import cpu_model
from transformers import BartConfig, BartForConditionalGeneration

from ofa_jax import hub
from ofa_jax.convert.ofa import family as ofa_family
from ofa_jax.convert.params import place
from ofa_jax.decode import beam, candidates
from ofa_jax.inference.runner import Runner
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa import SIZES
from ofa_jax.tokenizers.ofa import OFATokenizer

SIZE, WORDS, LENGTH, BEAMS = 384, 8, 16, 5
TOKENS = (SIZE // 16) ** 2 + WORDS
GOAL, GOAL_STEPS = 1.2, 20
PRECISIONS = {"cpu": "fp32", "gpu": "bf16"}
AT_ONCE = 20  # answers that the original scores together: its --valid-batch-size
QUESTION = " what is the man next to the red car holding in his hand?"

# Answers are made of these: things, plurals, colours, numbers, times, places, doings, and phrases.
NOUNS = """
man woman boy girl dog cat horse cow sheep bird elephant giraffe zebra bear car bus truck train boat
plane bike street road sign light pole tree grass field beach water ocean snow mountain sky cloud
kite ball bat racket glove helmet hat shirt jacket pants shoe tie dress bag umbrella phone camera
laptop keyboard mouse remote book clock vase flower plant table chair couch bed desk shelf lamp
window door wall floor ceiling roof fence bench bridge building house church tower kitchen bathroom
bedroom office park zoo farm store restaurant plate bowl cup glass bottle knife fork spoon pizza
sandwich cake donut apple banana orange carrot broccoli salad cheese bread rice meat chicken fish
egg coffee tea milk juice wine beer toilet sink tub mirror towel oven stove fridge microwave
skateboard surfboard ski snowboard frisbee wheel tire engine wing tail ear eye
"""
COLOURS = "red blue green yellow black white brown gray pink purple orange tan gold silver"
KINDS = """
big small old young wooden metal plastic stone brick wet dry clean dirty new round square tall short
long open closed empty full sunny cloudy dark bright happy sad asleep striped plaid floral
"""
DOINGS = """
stand sit walk run sleep eat drink talk read write cook clean play swim surf ski skat rid driv fly
jump throw catch hit kick pull push carry hold wait look point smil laugh cry paint draw danc sing
shop work climb fall land park fish hunt graz drink bark lean bend wash brush comb cut pour mix bak
"""
PLACES = ["on", "in", "under", "near", "behind", "next to", "in front of", "left of", "right of"]
# How many answers of one, two, ... words there are: most of VQA's have one.
SHARES = {1: 0.7, 2: 0.19, 3: 0.08, 4: 0.02, 5: 0.01}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--platform", choices=PRECISIONS, default="cpu")
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--answers", type=int, default=3129)
  parser.add_argument("--chunks", type=int, default=6, help="of 20 answers that are scored alone")
  parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument("--quick", action="store_true", help="batch 1, once, and nothing is written")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
  args = parser.parse_args()
  jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[args.platform])
  if args.quick:
    args.batch_sizes, args.repeats, args.chunks = [1], 1, 1
  torch.set_num_threads(args.threads)
  torch.set_grad_enabled(False)
  source = random_base()
  captions = {}
  for n in args.batch_sizes:
    captions[str(n)] = compare_captions(source, n, args)
    print(f"batch {n}: {json.dumps(captions[str(n)])}", flush=True)
  device = f"cpu-{args.threads}core" if args.platform == "cpu" else jax.devices()[0].device_kind
  report = {
    "device": device,
    "cpu": cpu_model(),
    "load_average": os.getloadavg(),
    "versions": {
      name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")
    },
    "model": "OFA-Base",
    "precision": PRECISIONS[args.platform],
    "beams": BEAMS,
    "tokens": LENGTH + 1,
    "encoder_tokens": TOKENS,
    "goal": GOAL,
    "captions_by_batch_size": captions,
    "goal_fewer_steps": GOAL_STEPS,
    "candidates": compare_candidates(source, args),
  }
  print(json.dumps(report["candidates"], indent=2))
  if not args.quick:
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"ofa_generate.{device.replace(' ', '-').lower()}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(path)


def random_base() -> hub.Source:
  """OFA-Base with random weights; the search takes as long with any."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    if "scale" in path[-1].key:
      return np.ones(x.shape, np.float32)
    return rng.standard_normal(x.shape, np.float32) * np.float32(0.02)

  config = SIZES["base"]
  _, params, rest = abstract(config)
  params = jax.tree_util.tree_map_with_path(draw, params)
  rest = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), rest)
  weights = jax.tree.map(jnp.asarray, (params, rest))

  def load(shardings=None):
    return place(*jax.tree.map(lambda x: x, weights), shardings)

  return hub.Source(config=config, load=load, form="torch", settings=ofa_family.SETTINGS)


def compare_captions(source: hub.Source, batch: int, args: argparse.Namespace) -> dict:
  """Seconds and captions/s of the sides, which take turns, and their ratios."""
  rng = np.random.default_rng(0)
  search = beam.Search(
    num_beams=BEAMS, max_length=LENGTH, min_length=LENGTH, no_repeat_ngram_size=3
  )
  runner = Runner([source], precision=PRECISIONS[args.platform])
  image = rng.integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
  words = rng.integers(4, 50_000, (batch, TOKENS)).astype(np.int32)
  config = source.config
  bart = BartForConditionalGeneration(
    BartConfig(
      vocab_size=config.vocab_size,
      d_model=config.width,
      encoder_layers=config.encoder_layers,
      decoder_layers=config.decoder_layers,
      encoder_attention_heads=config.heads,
      decoder_attention_heads=config.heads,
      encoder_ffn_dim=config.mlp,
      decoder_ffn_dim=config.mlp,
      dropout=0.0,
      forced_eos_token_id=None,
    )
  ).eval()
  ids = torch.from_numpy(words).long()
  if args.platform == "gpu":
    bart, ids = bart.to("cuda", torch.bfloat16), ids.to("cuda")

  def ours(rows):
    hypotheses = runner.generate(rows, search=search)
    assert (hypotheses.lengths[:, 0] == LENGTH + 1).all()

  def theirs():
    hypotheses = bart.generate(
      input_ids=ids,
      attention_mask=torch.ones_like(ids),
      num_beams=BEAMS,
      do_sample=False,
      no_repeat_ngram_size=3,
      min_new_tokens=LENGTH + 1,
      max_new_tokens=LENGTH + 1,
    )
    assert hypotheses.cpu().shape == (batch, LENGTH + 2)  # waits for a GPU

  ways = {
    "ofa_jax, tokens": lambda: ours({"source": words}),
    "transformers, tokens": theirs,
    "ofa_jax, pictures": lambda: ours({"source": words[:, :WORDS], "image": image}),
  }
  seconds = {name: [] for name in ways}
  for way in ways.values():
    way()  # compiles, fills caches
  for _ in range(args.repeats):
    for name, way in ways.items():
      begin = time.perf_counter()
      way()
      seconds[name].append(time.perf_counter() - begin)
  rates = {name: batch / statistics.median(values) for name, values in seconds.items()}
  return {
    "captions_per_second": {name: round(rate, 3) for name, rate in rates.items()},
    "all_seconds": {name: [round(x, 3) for x in values] for name, values in seconds.items()},
    "ofa_jax_over_transformers": {
      job: round(rates[f"ofa_jax, {job}"] / rates["transformers, tokens"], 2)
      for job in ("tokens", "pictures")
    },
  }


def compare_candidates(source: hub.Source, args: argparse.Namespace) -> dict:
  """Token-steps and seconds of scoring all answers, together and each alone."""
  texts = make_answers(args.answers)
  tokenizer = OFATokenizer.train([QUESTION, *(f" {text}" for text in texts)], vocab_size=1_000)
  answers = [tokenizer.encode(f" {text}") for text in texts]
  prompt = [0, *tokenizer.encode(QUESTION)]
  runner = Runner([source], precision="fp32")
  rng = np.random.default_rng(0)
  rows = {
    "source": np.array([[*prompt, 2]], np.int32),
    "image": rng.integers(0, 256, (1, SIZE, SIZE, 3), np.uint8),
    "decoder": np.array([prompt], np.int32),
  }
  begin = time.perf_counter()
  plan = candidates.plan(answers)
  planned = time.perf_counter() - begin
  scores, _ = timed(lambda: runner.score(rows, plan=plan)[0], 1)
  scores, seconds = timed(lambda: runner.score(rows, plan=plan)[0], args.repeats)
  alone = each_alone(source, rows, answers, prompt)
  begins = AT_ONCE * rng.permutation(len(answers) // AT_ONCE)[: args.chunks]
  chunks = [range(begin, begin + AT_ONCE) for begin in begins.tolist()]
  timed(lambda: alone(chunks[0]), 1)
  timings = [timed(lambda chunk=chunk: alone(chunk), 1) for chunk in chunks]
  deviation = max(
    np.abs(x - scores[list(c)]).max() for (x, _), c in zip(timings, chunks, strict=True)
  )
  assert deviation < 1e-4, deviation
  steps = {
    "together": len(prompt) + plan.num_steps,
    "each_alone": sum(len(prompt) + len(answer) for answer in answers),
  }
  whole = statistics.median(x for _, x in timings) * len(answers) / AT_ONCE
  return {
    "answers": len(answers),
    "answers_by_words": dict(sorted(count_words(texts).items())),
    "tokens_per_answer": round(sum(map(len, answers)) / len(answers), 2),
    "prompt_tokens": len(prompt),
    "token_steps": steps,
    "fewer_steps": round(steps["each_alone"] / steps["together"], 1),
    "largest_deviation": float(deviation),
    "seconds": {
      "together": round(seconds, 3),
      "each_alone": round(whole, 1),
      "plan_once": round(planned, 3),
    },
    "faster": round(whole / seconds, 1),
  }


def each_alone(source: hub.Source, rows: dict, answers: list, prompt: list):
  """The original's way: a function of a chunk's places that gives the scores of its answers."""
  graph = abstract(source.config)[0]
  weights = source.load()
  allowed = {}
  for answer in answers:
    ended = (*answer, 2)
    for i, token in enumerate(ended):
      allowed.setdefault(ended[:i], set()).add(token)
  length = len(prompt) + max(map(len, answers))
  image = jnp.asarray(rows["image"], jnp.float32) / 127.5 - 1

  @jax.jit
  def encode(weights):
    return nnx.merge(graph, *weights).encode(jnp.asarray(rows["source"]), image=image)

  @jax.jit
  def log_probs(weights, encoded, tokens, mask, target):
    encoded = jax.tree.map(
      lambda x: jnp.repeat(x, len(tokens), axis=0) if len(x) == 1 else x, encoded
    )
    logits = nnx.merge(graph, *weights).decode(encoded, tokens)
    lprobs = jax.nn.log_softmax(jnp.where(mask, logits, -jnp.inf))
    return jnp.take_along_axis(lprobs, target[..., None], axis=-1)[..., 0]

  with jax.default_matmul_precision("highest"):
    encoded = jax.block_until_ready(encode(weights))

  def score(chunk):
    tokens = np.full((len(chunk), length), 1, np.int32)
    target = np.full((len(chunk), length), 1, np.int32)
    mask = np.ones((len(chunk), length, source.config.vocab_size), bool)
    keep = np.zeros((len(chunk), length), bool)
    for row, number in enumerate(chunk):
      ended = (*answers[number], 2)
      tokens[row, : len(prompt) + len(ended) - 1] = [*prompt, *ended[:-1]]
      for i, token in enumerate(ended):
        at = len(prompt) - 1 + i
        target[row, at], keep[row, at], mask[row, at] = token, True, False
        mask[row, at, list(allowed[ended[:i]])] = True
    with jax.default_matmul_precision("highest"):
      return np.where(keep, log_probs(weights, encoded, tokens, mask, target), 0).sum(1)

  return score


def make_answers(number: int) -> list[str]:
  """Different answers of one to five words, of each length the share that `SHARES` says."""
  rng = np.random.default_rng(0)
  nouns, colours = NOUNS.split(), COLOURS.split()
  things = [*nouns, *(f"{noun}s" for noun in nouns)]
  looks = [*colours, *KINDS.split()]
  doings = [f"{doing}ing" for doing in DOINGS.split()]
  times = [f"{hour}:{minute:02}" for hour in range(1, 13) for minute in range(0, 60, 5)]
  years, numbers = map(str, range(1950, 2021)), map(str, range(301))
  compounds = (a + b for a, b in itertools.permutations(nouns[:40], 2))
  texts = {
    *("yes", "no", *looks, *things, *doings, *(f"{doing}er" for doing in DOINGS.split())),
    *(*times, *years, *numbers, *compounds),
    *(f"{a} {b}" for a, b in itertools.product(looks, things)),
    *(f"{a} {b}" for a, b in itertools.permutations(nouns, 2)),
    *(f"{a} and {b}" for a, b in itertools.permutations((*colours, *nouns[:40]), 2)),
    *(f"{a} the {b}" for a, b in itertools.product((*PLACES, *doings), nouns)),
    *(f"{a} {b}" for a, b in itertools.product((*PLACES, *doings), things)),
    *(f"{a} {b} {c}" for a, b, c in itertools.product(PLACES, ("the", "a"), nouns)),
  }
  drawn = rng.permutation(sorted(texts)).tolist()
  kept = []
  for words, share in SHARES.items():
    kept += [text for text in drawn if len(text.split()) == words][: round(share * number)]
  return (kept + [text for text in drawn if text not in set(kept)])[:number]


def count_words(texts: list[str]) -> dict[int, int]:
  """How many texts have so many words."""
  lengths = [len(text.split()) for text in texts]
  return {length: lengths.count(length) for length in set(lengths)}


def timed(function, repeats: int):
  """The last result, and the median of the seconds."""
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    result = function()
    seconds.append(time.perf_counter() - begin)
  return result, statistics.median(seconds)


if __name__ == "__main__":
  main()
