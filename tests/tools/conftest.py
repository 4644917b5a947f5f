"""What the tests of the data commands share."""

import dataclasses
import importlib

import numpy as np
import pytest

from ofa_jax import evaluate
from ofa_jax.config import MeshShape
from ofa_jax.engine import log
from ofa_jax.tokenizers.ofa import OFATokenizer
from ofa_jax.train import train
from ofa_jax.validate_data import validate_data
from tests.ofa_task_cases import made_small

TEXTS = [" yes no maybe positive negative what does the image describe a red cat box"] * 50


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  OFATokenizer.train(TEXTS, vocab_size=600, num_bins=100).save(folder)
  return str(folder)


# Learnt from as well it is slow: every layout has a program of its own to compile.
@pytest.fixture(params=["checked", pytest.param("learnt", marks=pytest.mark.slow)])
def check(request, tokenizer, tmp_path, monkeypatch, two_devices):
  """Checks what was prepared by the config of its task; returns how many faults there were.

  With the parameter "learnt" a model of no size learns from it once, for two updates.
  """
  monkeypatch.setenv("OFA_JAX_DATA", str(tmp_path / "out"))
  workdir = tmp_path / "run"

  def run(recipe, argument, **fields):
    config = importlib.import_module(f"ofa_jax.configs.{recipe}").get_config(argument)
    evaluate.set_tokenizer(config, tokenizer)
    for task in [config.task, *(evaluation.task for evaluation in config.evals)]:
      for name, value in fields.items():
        setattr(task, name, value)
    faults = validate_data(config)
    if request.param == "learnt" and not workdir.exists():
      small = made_small(config, {"tokenizer": tokenizer}, MeshShape())
      train(dataclasses.replace(small, batch_size=2, steps=2, evals=()), str(workdir))
      losses = [row["train/loss"] for row in log.read_metrics(workdir)]
      assert len(losses) == 2 and np.isfinite(losses).all()
    return faults

  return run
