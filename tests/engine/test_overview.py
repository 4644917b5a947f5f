"""What a run shows before it starts."""

import dataclasses
import math

import pytest

from ofa_jax.config import Optim
from ofa_jax.engine import overview, sharding, step
from tests import tiny


@pytest.fixture(scope="module")
def program(digits):
  config = tiny.config(
    digits, evals=True, steps=90, accum=2, ema=0.99, name="mine", save_every=30, keep=2
  )
  config.optim = Optim(lr=5e-4, warmup=7, freeze=("^visual/",), clip_norm=1.0)
  return step.build(config, sharding.make_mesh((2, 4, 1)), steps=90)


def test_it_says_what_a_person_wants_to_know(program):
  rows = dict(
    overview.rows(program, num_rows={None: 2160}, steps=90, origin="of W", workdir="runs/mine")
  )
  text = "\n".join(f"{name}: {value}" for name, value in rows.items())
  for part in (
    "parameters (image ",
    "weights: of W",
    "data: 2,160 pairs of ",
    "train_imgs.tsv, batch 32",
    "length: 90 steps, 1.333 epochs; a checkpoint every 30 steps, the newest 2 stay; accumulated",
    "AdamW, lr 0.0005, cosine after 7 steps of warm-up, gradients clipped at 1, frozen: ^visual/, "
    "moving average 0.99",
    "evaluations: valid (Contrastive, valid) at the end; valid (ZeroShot, test) at the end",
    "mesh data 2 x fsdp 4 x tensor 1",
    "output: runs/mine: config.json",
  ):
    assert part in text
  image = int(rows["model"].split("(image ")[1].split(", ")[0].replace(",", ""))
  parameters = int(rows["model"].split(", ")[1].split()[0].replace(",", ""))
  assert rows["trained"].startswith(f"{parameters - image:,} numbers, ")
  assert "of the parameters: bert/blocks/attn/out/bias, " in rows["trained"]
  assert "(" not in rows["data"] and "Config" not in text and "_class" not in text
  shapes = program.abstract.params
  assert parameters == sum(math.prod(x.shape) for x in _leaves(shapes))


def _leaves(tree):
  for value in tree.values():
    yield from _leaves(value) if isinstance(value, dict) else [value]


def test_bf16_on_a_cpu_is_told(program):
  config = dataclasses.replace(program.config, precision="bf16")
  (line,) = overview.advice(config, backend="cpu")
  assert "--config.precision=fp32" in line
  assert overview.advice(config, backend="gpu") == []
  assert overview.advice(program.config, backend="cpu") == []


def test_long_compiling_is_worth_a_cache():
  (line,) = overview.after_compiling(60.0, cache=None)
  assert "JAX_COMPILATION_CACHE_DIR" in line
  assert overview.after_compiling(60.0, cache="/x") == overview.after_compiling(1.0, cache="") == []
