import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from ofa_jax import cli, validation
from ofa_jax import config as config_lib
from ofa_jax.config import Config, Eval, MeshShape, Optim, mesh_sizes
from ofa_jax.data import splits
from ofa_jax.data.pairs import PairData
from ofa_jax.validation import validate
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
  evals = (Eval(name="valid", task=good.task, batch_size=-8),)
  with pytest.raises(ValueError, match=r"evals\[valid\].batch_size: .* at least 1, found -8"):
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


def due(steps=0, epochs=0.0, *, last=20, rows=10, batch_size=4):
  size = {"rows": rows, "batch_size": batch_size}
  return [
    done
    for done in range(1, last + 1)
    if config_lib.is_due(done, steps=steps, epochs=epochs, **size)
  ]


def test_intervals_are_steps_and_epochs_and_off_at_zero_and_below():
  assert due(steps=5) == [5, 10, 15, 20]
  assert due() == due(steps=-1) == due(epochs=-1.0) == due(steps=-1, epochs=-1.0) == []
  assert due(epochs=1.0) == [3, 5, 8, 10, 13, 15, 18, 20]  # ceil(2.5), ceil(5), ceil(7.5), ...
  assert due(epochs=0.5, last=8) == [2, 3, 4, 5, 7, 8]
  assert due(steps=4, epochs=1.0, last=8) == [3, 4, 5, 8]
  assert due(epochs=0.1, last=4) == [1, 2, 3, 4]  # several ends within one step
  assert due(epochs=3.0) == [8, 15]


def test_an_epoch_ends_with_the_update_that_reads_its_last_row():
  for rows, batch_size in ((10, 4), (7, 7), (250_314, 1024), (3, 8)):
    for epoch in range(1, 6):
      end = config_lib.epoch_end(epoch, rows=rows, batch_size=batch_size)
      assert (end - 1) * batch_size < epoch * rows <= end * batch_size
      size = {"rows": rows, "batch_size": batch_size}
      assert config_lib.is_due(end, steps=0, epochs=1.0, **size)
  assert config_lib.epoch_end(0.1, rows=30, batch_size=1) == 3  # not 4, as 0.1 * 30 in floats


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"best_metric": "valid/x"}, "one out of valid/t2i_r1, .* found 'valid/x'"),
    ({"best_metric": "valid/mean_recall"}, r"did you mean valid/\w+_mean_recall\?"),
    ({"best_metric": "test/t2i_r1"}, r"NAME/METRIC of one of the evals, .* \(evals: valid\)"),
    ({"best_metric": "valid"}, "found 'valid'"),
    ({"best_metric": "valid/loss", "best_mode": "least"}, "best_mode: expected one of max, min"),
    ({"reset_step": True}, "reset_step: expected resume=WORKDIR"),
    ({"resume": "a", "init": "b"}, "expected one of them, found 'a' and 'b'"),
    ({"save_every_epochs": float("nan")}, "save_every_epochs: expected a finite number, found nan"),
    ({"step_timeout": float("nan")}, "step_timeout: expected a finite number, found nan"),
    ({"optim": Optim(lr=float("inf"))}, "optim.lr: expected a finite number, found inf"),
    ({"optim": Optim(clip_norm=float("nan"))}, "optim.clip_norm: expected a finite number"),
    (
      {"optim": Optim(weight_decay=-1.0, warmup=-1)},
      r"(?s)optim.weight_decay: .*optim.warmup: expected at",
    ),
    ({"seed": -1}, "seed: expected at least 0, found -1"),
    ({"seed": 2**32}, r"seed: expected less than 2\^32, found 4294967296"),
    ({"workers": -1}, r"workers: expected None \(one a core\) or 1 to 1,024, found -1"),
    ({"workers": 1_000_000}, r"workers: expected None .* or 1 to 1,024, found 1000000"),
    ({"batch_size": None}, "config.batch_size: expected int, found None"),
    ({"evals": (None,)}, "evals: expected Eval"),
    ({"evals": ("valid",)}, "evals: expected Eval"),
  ],
)
def test_faults_of_saves_and_names(good, changes, message):
  config = dataclasses.replace(good, evals=(Eval(name="valid", task=good.task),))
  validate(config, devices=1)
  with pytest.raises(ValueError, match=message):
    validate(dataclasses.replace(config, **changes), devices=1)


def test_the_best_must_be_evaluated_where_it_is_saved(good):
  evals = (Eval(name="valid", task=good.task, every=3),)
  config = dataclasses.replace(good, evals=evals, best_metric="valid/t2i_r1", save_every=2)
  size = {"rows": 64, "steps": 6}
  with pytest.raises(ValueError, match=r"save_every=2.*evals\[valid\] has every=3"):
    validation.check_best(config, **size)
  validation.check_best(config, rows=64, steps=7)  # step 6
  validation.check_best(dataclasses.replace(config, save_every_epochs=1.5), **size)  # step 3
  validation.check_best(dataclasses.replace(config, best_metric=None), **size)
  validation.check_best(config, rows=64, steps=2)  # only the end is saved, and evaluated
  without = dataclasses.replace(config, evals=())
  validation.check_best(without, **size)
  validate(without, devices=1)


def parse(digits, *overrides):
  """The config of the quickstart with its fields given as flags."""
  argv = ["train", "--config=configs/quickstart.py", *overrides]
  values = flags.FlagValues()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("OFA_JAX_DATA", str(digits.parent))
    patch.chdir(ROOT)
    holder = cli.define_config(flag_values=values, argv=argv)
    values(argv)
    return holder.value


def test_data_and_names_are_given_as_text(digits):
  config = parse(
    digits,
    f"--config.task.train={digits}",
    "--config.log_to=tensorboard,wandb",
    "--config.init=M@8",
    "--config.save_every=-1",
    "--config.save_every_epochs=0.5",
    "--config.evals[0].every_epochs=1",
  )
  assert config.task.train == (str(digits),)
  assert splits.of(config.task.train[0], "train") == PairData.of(digits, "train")
  assert len(config.task.examples("train")) == 8622
  assert config.log_to == ("tensorboard", "wandb") and config.init == "M@8"
  assert (config.save_every, config.save_every_epochs) == (-1, 0.5)
  assert config.evals[0].every_epochs == 1.0


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("/a/b.tar,/c/d e.tar", ("/a/b.tar", "/c/d e.tar")),
    ("/a/{0..9}-{x,y}.tar,b", ("/a/{0..9}-{x,y}.tar", "b")),
    ("('a','b')", ("a", "b")),
    ("()", ()),
  ],
)
def test_lists_of_files_are_given_with_commas(digits, text, expected):
  assert parse(digits, f"--config.task.train={text}").task.train == expected


def test_files_and_none_are_given_as_text(digits, tmp_path):
  shutil.copy(digits / "train_imgs.tsv", tmp_path)
  config = parse(
    digits, "--config.task.train=a", "--config.task.train=b.tar", "--config.optim.clip_norm=None"
  )
  assert config.task.train == ("a", "b.tar") and config.optim.clip_norm is None
  assert splits.of(str(tmp_path / "x.csv"), "train") == PairData((str(tmp_path / "x.csv"),))
  task = dataclasses.replace(config.task, train=(str(tmp_path),))
  with pytest.raises(ValueError, match=r"Expected train_imgs\.tsv and train_texts\.jsonl"):
    task.examples("train")


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
    ("--config.lr=1", "Config has no field 'lr'; did you mean --config.optim.lr?"),
    ("--config.image_size=1", "did you mean --config.model.vision.image_size or --config.task."),
    ("--config.weight_decy=1", "did you mean --config.optim.weight_decay?"),
    ("--config.optim.accum=1", "Optim has no field 'accum'; did you mean --config.accum?"),
    ("--config.batch_size=0", "batch_size: expected at least 1, found 0"),
    ("--config.mesh.data=3", "expected data x fsdp x tensor = 1 devices"),
  ],
)
def test_command_line_errors_are_one_message(digits, tmp_path, override, message):
  result = train(digits, tmp_path, override)
  assert result.returncode == 1
  assert message in result.stderr and "Traceback" not in result.stderr
  assert not (tmp_path / "run").exists()


def test_a_label_tells_evaluations_of_one_name_apart(good):
  class One:
    metrics = ("score",)

  class Two:
    metrics = ("exact", "bleu4")

  plain, one, two = (
    Eval(name="valid", task=task, label=label)
    for task, label in ((One(), ""), (One(), "boxes"), (Two(), "words"))
  )
  assert plain.called("score") == "valid/score" and one.called("score") == "valid/boxes"
  assert two.called("exact") == "valid/words_exact"
  evals = (one, two)
  validate(dataclasses.replace(good, evals=evals, best_metric="valid/words_bleu4"), devices=8)
  with pytest.raises(ValueError, match="did you mean valid/boxes"):
    validate(dataclasses.replace(good, evals=evals, best_metric="valid/boxe"), devices=8)
