"""What the tests of the data commands share."""

import importlib

import pytest

from ofa_jax import evaluate
from ofa_jax.tokenizers.ofa import OFATokenizer
from ofa_jax.validate_data import validate_data

TEXTS = [" yes no maybe positive negative what does the image describe a red cat box"] * 50


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  OFATokenizer.train(TEXTS, vocab_size=600, num_bins=100).save(folder)
  return str(folder)


@pytest.fixture
def check(tokenizer, tmp_path, monkeypatch):
  """Checks what was prepared by the config of its task; returns how many faults there were."""
  monkeypatch.setenv("OFA_JAX_DATA", str(tmp_path / "out"))

  def run(recipe, argument, **fields):
    config = importlib.import_module(f"ofa_jax.configs.{recipe}").get_config(argument)
    evaluate.set_tokenizer(config, tokenizer)
    for task in [config.task, *(evaluation.task for evaluation in config.evals)]:
      for name, value in fields.items():
        setattr(task, name, value)
    return validate_data(config)

  return run
