"""Starting from weights that were made for another image size or text length."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ofa_jax import evaluate, hub, trees
from ofa_jax.config import to_dict
from ofa_jax.convert.cnclip import huggingface
from ofa_jax.convert.cnclip.positions import resize_positions
from ofa_jax.engine import sharding, step
from ofa_jax.engine.checkpoint import Checkpoints
from ofa_jax.models.abstract import abstract
from ofa_jax.train import train
from ofa_jax.weights import fitted
from tests import cnclip_files, ofa_golden, tiny
from tests.cnclip_golden import micro_config, micro_state_dict
from tests.test_hub import assert_same, weights

IMAGE, TEXT = "visual/positional_embedding", "bert/position/embedding"
POOL = "visual/attnpool/positional_embedding"


def larger(config, *, factor=2, max_positions=None):
  """The same model for images of another size and texts of another length."""
  longest = max_positions or config.text.max_positions
  vision = dataclasses.replace(config.vision, image_size=config.vision.image_size * factor)
  text = dataclasses.replace(config.text, max_positions=longest)
  return dataclasses.replace(config, vision=vision, text=text)


def store(path, form):
  """A micro model in one of the forms that models are stored in."""
  config = micro_config("micro_rn50" if form == "resnet" else "micro_vit")
  if form == "torch":
    return hub.open_model(
      cnclip_files.save(path / "x.pt", micro_state_dict("micro_vit")), config=config
    )
  if form == "huggingface":
    huggingface.save(path / "hf", config, weights()[0], context_length=52)
    return hub.open_model(path / "hf")
  hub.save_directory(
    path / "m", config, *weights("micro_rn50" if form == "resnet" else "micro_vit")
  )
  return hub.open_model(path / "m")


@pytest.mark.parametrize("form", ["directory", "torch", "huggingface", "resnet"])
def test_positions_are_interpolated_whatever_the_form(tmp_path, form):
  if form == "torch":
    pytest.importorskip("torch")
  source = store(tmp_path, form)
  wanted = larger(source.config, max_positions=source.config.text.max_positions // 2)
  found, lines = fitted(source, wanted)
  path = POOL if form == "resnet" else IMAGE
  assert found.config == wanted and found.form == source.form
  assert [line.split()[0] for line in lines] == sorted([TEXT, path])

  expected = trees.flatten(jax.device_get(source.load()[0]))
  grid = round((len(expected[path]) - 1) ** 0.5)
  expected[path] = resize_positions(expected[path], 2 * grid)
  expected[TEXT] = expected[TEXT][: wanted.text.max_positions]
  params, rest = found.load()
  assert_same(trees.flatten(params), expected)
  assert_same(rest, source.load()[1])

  mesh = sharding.make_mesh((2, 4, 1))
  _, *shapes = abstract(wanted)
  places = sharding.params_shardings(shapes[0], wanted.sharding, mesh)
  whole = jax.tree.map(lambda _: sharding.replicated(mesh), shapes[1])
  split, _ = found.load((places, whole))
  assert_same(trees.flatten(split), expected)
  assert trees.flatten(split)[TEXT].sharding.spec == P(None, "fsdp")


def test_a_model_of_this_size_is_left_alone(tmp_path):
  source = store(tmp_path, "directory")
  longer = larger(source.config, factor=1, max_positions=4 * source.config.text.max_positions)
  for config in (source.config, longer, micro_config("micro_rn50"), ofa_golden.micro_config()):
    assert fitted(source, config) == (source, [])


@pytest.fixture
def small(digits, tmp_path):
  """A run of a model for 16 pixels and texts of up to 16 tokens, as training leaves it."""
  config = tiny.config(digits)
  workdir = tmp_path / "small"
  workdir.mkdir()
  (workdir / "config.json").write_text(json.dumps(to_dict(config)))
  state = step.init(step.build(config, sharding.make_mesh((8, 1, 1)), steps=1))
  with Checkpoints(str(workdir)) as checkpoints:
    checkpoints.save(state)
  return workdir


def test_a_run_starts_from_another_size(digits, small, tmp_path, capsys):
  model = larger(tiny.MODEL, max_positions=10)
  size = {"image_size": 32, "context_length": 10}
  config = tiny.config(digits, model=model, init=str(small), steps=1)
  config.task = dataclasses.replace(config.task, **size)
  config.optim = dataclasses.replace(config.optim, lr=1e-12)
  config.evals = (dataclasses.replace(tiny.config(digits, evals=True).evals[0], task=config.task),)
  results = train(config, str(tmp_path / "run"))
  said = f"{IMAGE} resized from 5 to 17 positions"
  line = f"Weights: of {small}; {TEXT} resized from 16 to 10 positions; {said}; fresh"
  assert line in (tmp_path / "run" / "log.txt").read_text()

  stored = trees.flatten(jax.device_get(hub.open_model(small).load()[0]))
  found = trees.flatten(jax.device_get(hub.open_model(tmp_path / "run").load()[0]))
  np.testing.assert_allclose(found[IMAGE], resize_positions(stored[IMAGE], 4), atol=1e-7)
  np.testing.assert_allclose(found[TEXT], stored[TEXT][:10], atol=1e-7)

  capsys.readouterr()
  again = evaluate.run(config, str(small))
  assert f"{small}: {said}\n" in capsys.readouterr().err
  assert again.keys() == results.keys()
  assert again["valid/t2i_r10"] == pytest.approx(results["valid/t2i_r10"], abs=0.01)


def test_positions_that_were_never_learnt_are_refused(digits, small, tmp_path):
  config = tiny.config(digits, model=larger(tiny.MODEL, factor=1, max_positions=20))
  config.init = str(small)
  with pytest.raises(ValueError, match=rf"{TEXT}: expected \(20, 32\).* found .*\(16, 32\)"):
    train(config, str(tmp_path / "run"))
