"""The length of a run, rows that cannot be read, and losses that go astray."""

import base64
import dataclasses
import shutil

import numpy as np
import pytest

from ofa_jax.data import pipeline
from ofa_jax.data.pairs import PairData
from ofa_jax.engine import log
from ofa_jax.train import train
from tests import tiny


def test_intervals_by_epochs_and_off(digits, tmp_path):
  config = tiny.config(digits, evals=True, batch_size=1024, steps=5, log_every=-1)
  config.task = dataclasses.replace(config.task, train=config.task.valid)  # 2,160 pairs
  config.save_every, config.save_every_epochs, config.keep = -1, 0.5, 9
  contrastive, zeroshot = config.evals
  config.evals = (
    dataclasses.replace(contrastive, every=-1, every_epochs=1.0),
    dataclasses.replace(zeroshot, every=-1, every_epochs=-1.0),
  )
  train(config, str(tmp_path))
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "3", "4", "5"}
  rows = log.read_metrics(tmp_path)
  assert [r["step"] for r in rows if "valid/t2i_r1" in r] == [3, 5]
  assert [r["step"] for r in rows if "valid/zeroshot_top1" in r] == [5]
  assert [r["step"] for r in rows if "train/loss" in r] == [5]
  text = (tmp_path / "log.txt").read_text()
  assert "Validation Result (epoch 1 @ 3 steps)" in text
  assert "Train Epoch: 2 [2048/2048 (100%)]" in text  # updates 4 and 5; 3 had rows of both


def test_epochs_are_whole_passes(digits, tmp_path):
  task = {"train": (PairData.of(digits, "valid"),)}
  config = tiny.config(digits, steps=None, epochs=1.0, batch_size=1024)
  config.task = dataclasses.replace(config.task, **task)
  train(config, str(tmp_path))
  assert log.read_metrics(tmp_path)[-1]["step"] == 3  # 2,160 pairs


def spoiled(digits, folder, *, every):
  """The training data with every n-th image cut short."""
  lines = (digits / "train_imgs.tsv").read_text().splitlines()
  for i in range(0, len(lines), every):
    image_id, text = lines[i].split("\t")
    png = base64.b64decode(text)
    lines[i] = f"{image_id}\t{base64.b64encode(png[: len(png) // 2]).decode()}"
  (folder / "train_imgs.tsv").write_text("\n".join(lines) + "\n")
  shutil.copy(digits / "train_texts.jsonl", folder)
  return (PairData.of(folder, "train"),)


def test_bad_images_are_skipped_counted_and_named(digits, tmp_path):
  config = tiny.config(digits, max_bad_rate=0.2)
  config.task = dataclasses.replace(config.task, train=spoiled(digits, tmp_path, every=20))
  train(config, str(tmp_path / "run"))
  text = (tmp_path / "run" / "log.txt").read_text()
  assert "Skipped a bad row: " in text and "train_imgs.tsv:" in text
  assert all(np.isfinite(r["train/loss"]) for r in log.read_metrics(tmp_path / "run"))


def test_too_many_bad_images_stop_the_run(digits, tmp_path):
  config = tiny.config(digits, max_bad_rate=0.001)
  config.task = dataclasses.replace(config.task, train=spoiled(digits, tmp_path, every=2))
  with pytest.raises(pipeline.TooManyBadRows, match=r"train_imgs.tsv:\d+"):
    train(config, str(tmp_path / "run"))


def test_diverging_runs_stop_and_say_what_to_do(digits, tmp_path, monkeypatch):
  config = tiny.config(digits, log_every=1)
  config.optim = dataclasses.replace(config.optim, max_bad_steps=2)
  real = type(config.task).loss

  def loss(self, *args, **options):
    metrics = real(self, *args, **options)
    return metrics | {"loss": metrics["loss"]._replace(total=metrics["loss"].total * np.nan)}

  monkeypatch.setattr(type(config.task), "loss", loss)
  with pytest.raises(FloatingPointError, match=r"3 steps in a row .* lower optim.lr"):
    train(config, str(tmp_path))
  assert "Skipped non-finite steps: 2" in (tmp_path / "log.txt").read_text()


def test_advice_only_when_the_loss_sits_at_ln_batch(digits):
  task = tiny.config(digits).task
  chance = np.log(32)

  def advice(*shares, rates=(1e-3,) * 5):
    rows = [
      {"step": i, "train/loss": share * chance, "train/chance_loss": chance, "train/lr": rate}
      for i, (share, rate) in enumerate(zip(shares, rates, strict=False))
    ]
    return task.advise(rows)

  assert "sits at ln(batch) = 3.466" in advice(1, 1.002, 0.998, 1.001, 0.999)
  assert advice(1, 1, 1, 1) is None  # too early to say
  assert advice(1, 1, 1, 1, 0.6) is None
  assert advice(1.5, 1.5, 1.5, 1.5, 1.5) is None  # above it: worse than chance
  assert advice(1.02, 1.01, 1.0, 0.99, 0.98) is None  # on its way
  assert advice(1, 1, float("nan"), 1, 1) is None
  assert advice(1, 1, 1, 1, 1, rates=(1e-5, 2e-5, 3e-5, 4e-5, 5e-5)) is None  # warming up
