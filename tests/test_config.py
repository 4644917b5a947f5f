import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ofa_jax import config as config_lib
from ofa_jax.config import Config, Eval, MeshShape, Optim, mesh_sizes, validate
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture
def good(digits):
  return tiny.config(digits)


def test_a_good_config_passes(good):
  validate(good, devices=8, hosts=2)


def test_all_faults_are_told_at_once(good):
  bad = dataclasses.replace(
    good,
    batch_size=30,
    steps=None,
    precision="fp8",
    ema=1.5,
    ema_start=-1,
    optim=Optim(lr=0.0, schedule="cosin", adam="fair", warmup_ratio=1.5, freeze=("(",)),
    task=dataclasses.replace(good.task, image_size=24, context_length=99, mask_ratio=1.0),
  )
  with pytest.raises(ValueError) as e:
    validate(bad, devices=8)
  for text in (
    "expected steps or epochs, found neither",
    "precision: expected one of bf16, fp32, fp64, found 'fp8'",
    "ema: expected None or a decay",
    "ema_start: expected at least 0",
    "optim.lr: expected more than 0",
    "optim.schedule: expected one of constant, cosine, linear, polynomial, found 'cosin'",
    "optim.adam: expected one of adamw, fairseq, found 'fair'",
    "optim.warmup_ratio: expected 0 <= ratio < 1, found 1.5",
    "'(' is no regular expression",
    "batch_size: expected a multiple of 8 (data x fsdp devices), found 30; the nearest is 32",
    "task.image_size: expected the model's 16, found 24",
    "task.context_length: expected 2 to 16",
    "task.mask_ratio",
  ):
    assert text in str(e.value)


def test_batches_divide_among_hosts_and_accumulation(good):
  with pytest.raises(ValueError, match=r"multiple of 3 \(hosts\)"):
    validate(good, devices=1, hosts=3)
  with pytest.raises(ValueError, match=r"accum x data x fsdp = 3 x 8"):
    validate(dataclasses.replace(good, accum=3), devices=8)
  evals = (Eval(name="valid", task=good.task, batch_size=9),)
  with pytest.raises(ValueError, match=r"evals\[valid\].batch_size"):
    validate(dataclasses.replace(good, evals=evals), devices=8)


def test_mesh_sizes():
  assert mesh_sizes(MeshShape(), 8) == (8, 1, 1)
  assert mesh_sizes(MeshShape(data=2, fsdp=-1, tensor=2), 8) == (2, 2, 2)
  for shape in (MeshShape(data=3), MeshShape(fsdp=3), MeshShape(fsdp=-1), MeshShape(tensor=0)):
    with pytest.raises(ValueError, match="mesh"):
      mesh_sizes(shape, 8)


def test_tensor_axis_stays_on_a_host(good):
  shape = dataclasses.replace(good, mesh=MeshShape(tensor=4))
  with pytest.raises(ValueError, match=r"mesh.tensor: expected a divisor of the 2 devices"):
    validate(shape, devices=8, hosts=4)


def test_config_is_json(good):
  data = json.loads(json.dumps(config_lib.to_dict(good)))
  assert data["_class"] == "ofa_jax.config.Config"
  assert data["optim"]["lr"] == good.optim.lr
  assert data["model"]["vision"]["width"] == 32


def test_fields_of_config_are_those_the_docs_promise():
  names = {f.name for f in dataclasses.fields(Config)}
  promised = "model task init batch_size steps epochs seed log_every save_every evals optim mesh"
  assert names >= {*promised.split(), "precision", "remat", "accum", "ema"}


def train(digits, tmp_path, *overrides):
  command = [sys.executable, "-m", "ofa_jax.train", "--config=configs/quickstart.py"]
  return subprocess.run(
    [*command, f"--workdir={tmp_path / 'run'}", *overrides],
    capture_output=True, text=True, cwd=ROOT,
    env={**os.environ, "OFA_JAX_DATA": str(digits.parent)},
  )  # fmt: skip


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("--config.optim.lrr=1", "Optim has no field 'lrr'; did you mean lr"),
    ("--config.batchsize=1", "Config has no field 'batchsize'; did you mean batch_size"),
    ("--config.batch_size=0", "batch_size: expected at least 1, found 0"),
    ("--config.mesh.data=3", "expected data x fsdp x tensor = 1 devices"),
  ],
)
def test_command_line_errors_are_one_message(digits, tmp_path, override, message):
  result = train(digits, tmp_path, override)
  assert result.returncode == 1
  assert message in result.stderr and "Traceback" not in result.stderr
  assert not (tmp_path / "run").exists()
