"""The TPU's compiler takes ordinary train steps: it once crashed where dropout is computed again.

Each step is compiled in a process of its own, since a crash ends it. Two layers a tower stand for
all: the body of a loop is compiled once, whatever the depth.
"""

import dataclasses
import functools

import jax
import pytest

from ofa_jax import compile_ahead
from ofa_jax.ahead import apart, topology
from ofa_jax.config import Config, MeshShape
from ofa_jax.models import cnclip
from ofa_jax.tasks.contrastive import Contrastive

pytestmark = pytest.mark.slow  # minutes of the TPU's compiler for each of them

LAYERS = 2
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}


@pytest.fixture(autouse=True)
def compiler():
  pytest.importorskip("libtpu")


def config(name, *, rows, remat, fsdp=1):
  """The pretraining step of a released model on four chips, `rows` on each."""
  model = cnclip.config(*cnclip.MODELS[name])
  model.vision = dataclasses.replace(model.vision, layers=LAYERS)
  model.text = dataclasses.replace(model.text, layers=LAYERS)
  return Config(
    name=name,
    model=model,
    task=Contrastive(train=(), valid=()),
    batch_size=4 * rows,
    steps=10,
    mesh=MeshShape(data=4 // fsdp, fsdp=fsdp),
    remat=remat,
  )


def compile_there(config, name):
  jax.config.update("jax_platforms", "cpu")
  target = topology.parse(name)
  return compile_ahead.analyse(config, target, topology.devices(target))


def check(config, kind):
  report = apart.call(compile_there, config, TOPOLOGIES[kind])
  assert report.fits
  assert 0 < report.prediction.share_of_peak < 1
  return report


def test_attention_dropout_computed_again():
  """Its bits, fused into attention's products, were what overflowed the compiler's stack."""
  check(config("ViT-B-16", rows=32, remat="dots"), "v5e")


@functools.cache
def at_64_rows():
  return check(config("ViT-H-14", rows=64, remat="full"), "v5e")


def test_split_weights_are_gathered_and_not_multiplied_in_slices():
  split = check(config("ViT-H-14", rows=64, remat="full", fsdp=4), "v5e")
  assert split.cost.cycles < 1.1 * at_64_rows().cost.cycles
  moved = split.collectives.get("collective-permute")  # slices of weights would be hundreds of MB
  assert moved is None or moved.num_bytes < 2**20


def test_a_row_of_many_takes_no_longer():
  """Rows side by side in memory would cost a third more of the ViT's time (`layers.num_parts`)."""
  many = check(config("ViT-H-14", rows=128, remat="full"), "v5e")
  assert many.cost.cycles < 1.1 * 2 * at_64_rows().cost.cycles


def ordinary():
  """Both models on both kinds of chip, few rows to many; every number of rows with every remat."""
  rows, remats = (16, 48, 256), ("dots", "full", "none")
  for i, kind in enumerate(TOPOLOGIES):
    for j, name in enumerate(("ViT-B-16", "ViT-H-14")):
      for k in range(3):
        yield kind, name, rows[k], remats[(i + j + k) % 3]


@pytest.mark.parametrize(("kind", "name", "rows", "remat"), ordinary())
def test_ordinary_steps(kind, name, rows, remat):
  check(config(name, rows=rows, remat=remat), kind)
