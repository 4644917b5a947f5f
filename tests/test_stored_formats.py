"""What earlier versions wrote is read: a run of training and a model directory of version 0.1.0.

`tests/stored` holds both with inputs and the outputs that the version gave which wrote them. The
run is of a small Chinese-CLIP with a moving average; the directory of a small OFA without a
tokenizer, its image trunk's kernels zero to keep it small.
"""

import pathlib
import tarfile

import jax
import numpy as np
import pytest
from flax import nnx

import ofa_jax
from ofa_jax import hub, train
from ofa_jax.models.abstract import abstract
from tests import tiny

STORED = pathlib.Path(__file__).parent / "stored"


@pytest.fixture
def stored(tmp_path):
  for name in ("run", "model"):
    with tarfile.open(STORED / f"{name}.tar.gz") as archive:
      archive.extractall(tmp_path, filter="data")
  return tmp_path


def test_a_run(stored):
  model, _ = ofa_jax.load_from_name(stored / "run")
  expected = np.load(STORED / "run_expected.npz")
  image, text = model.encode_image(expected["image"]), model.encode_text(expected["text"])
  np.testing.assert_allclose(image, expected["image_features"], atol=1e-6)
  np.testing.assert_allclose(text, expected["text_features"], atol=1e-6)


def test_a_run_goes_on(stored, digits):
  """Its optimizer, counters and moving average are found too."""
  config = hub.open_model(stored / "run").config
  metrics = train.train(tiny.config(digits, model=config, steps=4, ema=0.9), str(stored / "run"))
  assert metrics == {}
  log = (stored / "run/log.txt").read_text()
  assert "resumed from this workdir at step 3" in log and "Global Steps: 4/4" in log


def test_a_model_directory(stored):
  config, params, rest = hub.load_directory(stored / "model")
  model = nnx.merge(abstract(config)[0], params, rest)
  expected = np.load(STORED / "model_expected.npz")

  @jax.jit
  def decoded(model, source, image, tokens):
    return model.decode(model.encode(source, image=image), tokens)

  logits = decoded(model, *(expected[name] for name in ("source", "images", "decoder")))
  np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
