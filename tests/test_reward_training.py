"""Learning from a reward through the front door: trained, validated, saved and gone on with."""

import dataclasses
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from ofa_jax import hub, trees
from ofa_jax.decode.beam import Search
from ofa_jax.engine import log
from ofa_jax.models.abstract import abstract
from ofa_jax.train import _Run, train
from tests import ofa_picture_files, rewarded, tiny
from tests.engine import test_step
from tests.rewarded import letters
from tests.test_lost_processes import free_port
from tests.test_processes import finish, start, start_cluster
from tests.test_train import assert_bit_equal, final_state

RECIPE = Path(__file__).parent.parent / "configs" / "ofa_caption.py"
STEPS = 3
pytestmark = pytest.mark.usefixtures("two_devices")


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
      recipe.task,
      reward=letters,
      sampling=search,
      kl=0.1,
      kl_model=str(folder / "other"),
      vocab_blocks=3,
      **fields,
    ),
    steps=STEPS,
    log_every=1,
    save_every=2,
    evals=(evaluation,),
  )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
  """The workdir of the run on two devices, and its last metrics; further runs compile nothing."""
  compiled, compile_step = [], _Run._compile

  def once(run, *args):  # such programs are not in the cache
    if not compiled:
      compiled.append(compile_step(run, *args))
    return compiled[0]

  workdir = tmp_path_factory.mktemp("trained") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_Run, "_compile", once)
    yield workdir, train(config, str(workdir))


def test_trained_validated_and_gone_on_with(config, trained, tmp_path):
  workdir, metrics = trained
  assert {"valid/cider", "valid/exact"} < metrics.keys()
  rows = [row for row in log.read_metrics(workdir) if "train/loss" in row]
  assert len(rows) == STEPS
  for name in ("reward", "kl", "grad_norm", "words", "scoring_s_per_row"):
    assert all(row[f"train/{name}"] > 0 for row in rows), name
  assert "| Scoring Time: 0.0" in (workdir / "log.txt").read_text()
  assert '"reward": "tests.rewarded.letters"' in (workdir / "config.json").read_text()
  shutil.copytree(workdir, tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "checkpoints" / str(STEPS))
  assert train(config, str(tmp_path / "broken")) == metrics
  assert_bit_equal(final_state(workdir), final_state(tmp_path / "broken"))


def test_one_device_with_whole_logits_is_two_with_blocks_of_them(config, trained):
  task = dataclasses.replace(config.task, vocab_blocks=1)
  history, _ = test_step.run(dataclasses.replace(config, task=task), steps=STEPS, of=STEPS)
  rows = [row for row in log.read_metrics(trained[0]) if "train/loss" in row]
  two = [[row["train/loss"], row["train/grad_norm"]] for row in rows]
  np.testing.assert_allclose(two, history, rtol=1e-5)


@pytest.mark.slow  # a program that is in no cache, half a minute
def test_eight_devices_are_two(config, trained):
  alone = dataclasses.replace(config, evals=())
  mesh = test_step.make_mesh(devices=8)
  eight, state = test_step.run(alone, steps=STEPS, of=STEPS, mesh=mesh)
  rows = [row for row in log.read_metrics(trained[0]) if "train/loss" in row]
  two = [[row["train/loss"], row["train/grad_norm"]] for row in rows]
  np.testing.assert_allclose(two, eight, rtol=1e-5)
  stored = final_state(trained[0])
  for path, x in trees.flatten(state.params).items():
    np.testing.assert_allclose(stored[f"model/params/{path}"], x, rtol=0, atol=1e-5, err_msg=path)


CONFIG = "tests/rewarded.py"


@pytest.mark.slow  # three processes compile a program that is in no cache
def test_two_processes_are_one(shapes, tmp_path):
  exact = ("--config.precision=fp64",)
  finish(start(shapes, tmp_path / "one", *exact, config=f"{CONFIG}:none"))
  both = start_cluster(
    shapes, tmp_path / "two", *exact, port=free_port(), num=2, config=f"{CONFIG}:none"
  )
  for process in both:
    finish(process)
  one, two = (log.read_metrics(tmp_path / name) for name in ("one", "two"))
  assert len(one) == len(two) == 5
  # The norm is a float32, by which gradients are clipped; the loss is what is left of terms of
  # both signs and of the order of one.
  near = {"loss": {"atol": 1e-8}, "grad_norm": {"rtol": 1e-6}}
  for name in ("loss", "grad_norm", "reward", "words", "distinct"):
    values = [[row[f"train/{name}"] for row in rows] for rows in (two, one)]
    np.testing.assert_allclose(*values, **{"rtol": 1e-9, **near.get(name, {})}, err_msg=name)
  assert len({row["train/reward"] for row in one}) > 1


@pytest.mark.slow  # two processes compile a program that is in no cache
@pytest.mark.parametrize("process", [1, 0])
def test_a_reward_that_raises_in_one_process_ends_both_with_its_message(shapes, tmp_path, process):
  both = start_cluster(
    shapes, tmp_path, "--config.steps=1000", port=free_port(), num=2, config=f"{CONFIG}:{process}"
  )
  outputs = [each.communicate(timeout=300)[0] for each in both]
  assert [each.returncode for each in both] == [1, 1], outputs
  told = f"task.reward Letters raised KeyError for 8 texts: '{rewarded.MESSAGE}'"
  for output in outputs:
    last = output[output.rindex("error: ") :]
    assert last.startswith(f"error: process {process} of 2: ") and told in last
  assert told in (tmp_path / "log.txt").read_text()
  rows = [row for row in log.read_metrics(tmp_path) if "train/loss" in row]
  assert len(rows) == rewarded.UPDATES and all(np.isfinite(row["train/loss"]) for row in rows)
