"""Learning from a reward through the front door: trained, validated, saved and gone on with."""

import dataclasses
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from ofa_jax import hub
from ofa_jax.decode.beam import Search
from ofa_jax.engine import log
from ofa_jax.models.abstract import abstract
from ofa_jax.train import _Run, train
from tests import ofa_picture_files, tiny
from tests.engine import test_step
from tests.test_train import assert_bit_equal, final_state

RECIPE = Path(__file__).parent.parent / "configs" / "ofa_caption.py"
STEPS = 3


def letters(texts, references):
  """A reward of one's own: what no text is without."""
  return [len(text) / 10 + text.count("a") for text in texts]


@pytest.fixture(scope="module")
def config(shapes, tmp_path_factory):
  """The recipe with tiny files and a model as small, which stays near to another one."""
  folder = tmp_path_factory.mktemp("reward")
  fields = ofa_picture_files.caption(folder, shapes)
  recipe = runpy.run_path(str(RECIPE))["get_config"]("base,scst")
  small = tiny.caption_config(shapes, batch_size=16)
  model = dataclasses.replace(small.model, freeze_resnet=True)
  params, rest = (
    jax.tree.map(lambda x: np.random.default_rng(0).normal(0, 0.1, x.shape).astype(x.dtype), tree)
    for tree in abstract(model)[1:]
  )
  rest = jax.tree.map(lambda x: np.abs(x) + 1, rest)
  hub.save_directory(folder / "other", model, params, rest)
  search = Search(num_beams=2, max_length=6, no_repeat_ngram_size=3)
  fields |= {"search": search}
  evaluation = dataclasses.replace(recipe.evals[0], every=0, batch_size=16)
  evaluation.task = dataclasses.replace(evaluation.task, page=0, **fields)
  return dataclasses.replace(
    small,
    model=model,
    task=dataclasses.replace(
      recipe.task, reward=letters, sampling=search, kl=0.1, kl_model=str(folder / "other"), **fields
    ),
    steps=STEPS,
    log_every=1,
    save_every=2,
    evals=(evaluation,),
  )


def test_trained_validated_and_gone_on_with(config, tmp_path, monkeypatch):
  compiled, compile_step = [], _Run._compile

  def once(run, *args):  # such programs are not in the cache
    if not compiled:
      compiled.append(compile_step(run, *args))
    return compiled[0]

  monkeypatch.setattr(_Run, "_compile", once)
  workdir = tmp_path / "run"
  metrics = train(config, str(workdir))
  assert {"valid/cider", "valid/exact"} < metrics.keys()
  rows = [row for row in log.read_metrics(workdir) if "train/loss" in row]
  assert len(rows) == STEPS
  for name in ("reward", "kl", "grad_norm", "words", "scoring_s_per_row"):
    assert all(row[f"train/{name}"] > 0 for row in rows), name
  assert "| Scoring Time: 0.0" in (workdir / "log.txt").read_text()
  assert '"reward": "tests.test_reward_training.letters"' in (workdir / "config.json").read_text()
  shutil.copytree(workdir, tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "checkpoints" / str(STEPS))
  assert train(config, str(tmp_path / "broken")) == metrics
  assert_bit_equal(final_state(workdir), final_state(tmp_path / "broken"))


@pytest.mark.slow  # two programs that are in no cache, half a minute each
def test_eight_devices_are_one(config):
  alone = dataclasses.replace(config, evals=())
  history, _ = test_step.run(alone, steps=2, of=STEPS)
  eight, _ = test_step.run(alone, steps=2, of=STEPS, mesh=test_step.make_mesh(devices=8))
  np.testing.assert_allclose(eight, history, rtol=1e-5)
