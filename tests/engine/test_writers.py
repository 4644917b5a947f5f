"""Metrics in TensorBoard and Weights & Biases, read back by their own readers."""

import sys
import types

import pytest
from etils import epath

from ofa_jax import validation
from ofa_jax.engine import log, writers
from ofa_jax.train import train
from ofa_jax.validation import validate
from tests import tiny

FIRST = [(2, {"train/loss": 2.0}), (4, {"train/loss": 1.0}), (4, {"valid/t2i_r1": 0.5})]
AGAIN = [(4, {"train/loss": 1.25}), (6, {"train/loss": 0.75}), (6, {"valid/t2i_r1": 0.75})]
EXPECTED = {
  "train/loss": [(2, 2.0), (4, 1.25), (6, 0.75)],
  "valid/t2i_r1": [(6, 0.75)],
}


def killed_and_resumed(workdir, name):
  """A run that got beyond its checkpoint of step 3, and its second start from there."""
  for start, rows in ((0, FIRST), (3, AGAIN)):
    with log.Log(
      str(workdir), steps=6, start=start, log_to=(name,), described={"name": "tiny", "seed": 7}
    ) as out:
      for step, values in rows:
        out.metrics(step, values)
      out.metrics(*rows[-1])  # a row that is there already is not written again


def test_tensorboard_reads_what_was_logged(tmp_path):
  pytest.importorskip("tensorboardX")
  reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  killed_and_resumed(tmp_path, "tensorboard")
  events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  found = {
    name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
  }
  assert found == EXPECTED
  rows = log.read_metrics(tmp_path)
  assert [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r] == found["train/loss"]


def test_a_run_logs_to_tensorboard(digits, tmp_path):
  pytest.importorskip("tensorboardX")
  reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  train(tiny.config(digits, steps=2, log_to=("tensorboard",)), str(tmp_path))
  events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  (row,) = log.read_metrics(tmp_path)
  assert {"step", *events.Tags()["scalars"]} == row.keys()
  assert events.Scalars("train/loss")[0].value == pytest.approx(row["train/loss"])


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
  """A stand-in takes the calls; the package itself is met below."""
  runs = []

  def init(**options):
    run = types.SimpleNamespace(options=options, rows=[], code=None)
    run.log = lambda values, step: run.rows.append((step, values))
    run.finish = lambda exit_code: setattr(run, "code", exit_code)
    runs.append(run)
    return run

  class Error(Exception):
    pass

  stand_in = types.SimpleNamespace(
    init=init, Settings=lambda **options: options, Error=Error, __spec__=None
  )
  monkeypatch.setitem(sys.modules, "wandb", stand_in)
  killed_and_resumed(tmp_path, "wandb")
  first, again = runs
  assert first.rows == FIRST and again.rows == AGAIN
  assert first.options == again.options
  assert first.options["id"] == (tmp_path / "wandb_id.txt").read_text()
  assert first.options["resume"] == "allow" and first.options["name"] == "tiny"
  assert first.options["config"] == {"name": "tiny", "seed": 7}
  assert first.code == again.code == 0

  with pytest.raises(RuntimeError), log.Log(str(tmp_path), steps=6, start=6, log_to=("wandb",)):
    raise RuntimeError("the run failed")
  assert runs[-1].code == 1

  def refuse(**_):
    raise Error("no API key")

  stand_in.init = refuse
  with pytest.raises(ValueError, match=r"no API key\. Run `wandb login`"):
    writers.open_writers(("wandb",), epath.Path(tmp_path), start=0, described={})


def test_wandb_offline(tmp_path, monkeypatch):
  wandb = pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  with log.Log(str(tmp_path), steps=6, start=0, log_to=("wandb",), described={"seed": 7}) as out:
    for step, values in FIRST:
      out.metrics(step, values)
  (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
  assert (tmp_path / "wandb_id.txt").read_text() in file.name
  assert wandb.run is None
  content = file.read_bytes()
  assert all(part in content for part in (b"train/loss", b"valid/t2i_r1", b"seed"))


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(log.jax, "process_index", lambda: 1)
  with log.Log(str(tmp_path / "run"), steps=6, start=0, log_to=("tensorboard",)) as out:
    out.metrics(2, {"train/loss": 1.0})
  assert not (tmp_path / "run").exists()


def test_what_is_missing_is_told_with_the_config(digits, monkeypatch):
  monkeypatch.setattr(validation.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError) as error:
    validate(tiny.config(digits, log_to=("tensorbord", "wandb")), devices=8)
  assert "found 'tensorbord'; did you mean tensorboard?" in str(error.value)
  assert "wandb needs the package wandb, found none; pip install wandb" in str(error.value)
