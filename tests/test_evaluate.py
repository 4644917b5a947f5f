"""Evaluations: told apart from training only by what they predict, and the same on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import evaluate
from ofa_jax.config import Eval, MeshShape
from ofa_jax.data.pipeline import TooManyBadRows
from ofa_jax.decode.beam import Search
from ofa_jax.engine import sharding, step
from ofa_jax.tasks.caption import Caption
from ofa_jax.train import train
from tests import tiny
from tests.engine import test_step

pytestmark = pytest.mark.usefixtures("two_devices")
ROWS = 24
SPLIT = MeshShape(data=2, fsdp=2, tensor=2)  # on which weights are gathered to predict


@dataclasses.dataclass(kw_only=True)
class Kept(Caption):
  """Captions whose predictions are kept."""

  page: int = 0
  kept: list = dataclasses.field(default_factory=list, repr=False)

  def score(self, predictions, streams):
    self.kept.append(predictions["examples"])
    return {"rows": float(predictions["examples"]["valid"].sum())}


@pytest.fixture(scope="module")
def data(shapes, tmp_path_factory):
  """The first captions of the quickstart, the last of whose pictures is broken."""
  path = tmp_path_factory.mktemp("captions") / "valid.tsv"
  lines = (shapes / "valid.tsv").read_text().splitlines()[:ROWS]
  lines[-1] = lines[-1][:-300]
  path.write_text("\n".join(lines) + "\n")
  return shapes, path


def config(data, search, **changes):
  """A config that evaluates captions by a search, and its task."""
  shapes, path = data
  plain = tiny.caption_config(shapes)
  fields = {f.name: getattr(plain.task, f.name) for f in dataclasses.fields(plain.task)}
  task = Kept(**{**fields, "valid": (str(path),), "search": search, "page": 0})
  evals = (Eval(name="sixteen", task=task, batch_size=16),)
  return dataclasses.replace(plain, evals=evals, max_bad_rate=0.1, **changes), task


def weights(program):
  """Random numbers as parameters, statistics of one: no initialisation has to be compiled."""
  rng = np.random.default_rng(0)

  def drawn(x):
    noise = 0.1 * rng.normal(size=x.shape)
    return (noise if len(x.shape) > 1 else 1 + noise).astype(x.dtype)

  params = jax.tree.map(drawn, program.abstract.params)
  rest = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), program.abstract.rest)
  return jax.device_put((params, rest), (program.shardings.params, program.shardings.rest))


def predictions(data, search, *, shape=None, devices=1, batch_size=16):
  """What an evaluation predicts on a mesh."""
  shape = shape or MeshShape()
  run, task = config(data, search, mesh=shape)
  run.evals[0].batch_size = batch_size
  program = step.build(run, test_step.make_mesh(shape, devices), steps=1)
  (evaluator,) = evaluate.evaluators(program)
  assert evaluator(*weights(program)) == {"sixteen/rows": ROWS - 1}
  return task.kept[-1]


SAMPLED = Search(sample=True, num_beams=2, max_length=6, top_k=5)
BEAMS = Search(num_beams=3, max_length=6)


@pytest.mark.parametrize("search", [SAMPLED, BEAMS], ids=["sampled", "beams"])
def test_what_is_predicted_is_the_same_on_any_mesh_and_in_any_batches(data, search):
  one = predictions(data, search)
  assert not one["valid"][-1] and one["valid"][:-1].all()
  assert (one["tokens"][-1] == 1).all()
  assert len({str(row) for row in one["tokens"].tolist()}) > 1
  if search.sample:  # pictures apart, every row draws its own
    assert len({str(row) for row in one["tokens"].tolist()}) > ROWS // 2
  others = [{"shape": SPLIT, "devices": 8}]
  if search.sample:
    others += [{"devices": 8, "batch_size": 8}]
  for other in others:
    found = predictions(data, search, **other)
    np.testing.assert_array_equal(found["tokens"], one["tokens"], err_msg=str(other))
    np.testing.assert_allclose(found["score"], one["score"], rtol=1e-5, err_msg=str(other))


def test_unreadable_rows_are_named_counted_and_limited(data):
  run, _ = config(data, SAMPLED)
  program = step.build(run, test_step.make_mesh(MeshShape(), 1), steps=1)
  (evaluator,) = evaluate.evaluators(program)
  first, again = [], []
  for lines in (first, again):
    evaluator(*weights(program), log=lines.append)
  assert f"valid.tsv:{ROWS} " in first[0] and "cannot be decoded" in first[0]
  assert first[1:] == again  # named once, counted every time
  assert again == [
    f"sixteen: 1 of the {ROWS} rows of 'examples' are unreadable and left out of its scores"
  ]
  run.max_bad_rate = 0.01  # a small set is judged by its own size
  with pytest.raises(TooManyBadRows, match=rf"found 1 among all {ROWS}: .*valid\.tsv:{ROWS} "):
    evaluator(*weights(program), log=again.append)


def test_a_sampled_evaluation_runs_and_is_reproducible(data, tmp_path):
  run, task = config(data, SAMPLED, steps=1)
  run.evals[0].batch_size = 8
  assert train(run, str(tmp_path)) == {"sixteen/rows": ROWS - 1}
  assert evaluate.run(run, str(tmp_path)) == {"sixteen/rows": ROWS - 1}
  first, second = task.kept
  for name, values in first.items():
    np.testing.assert_array_equal(second[name], values, err_msg=name)
  run, task = config(data, SAMPLED, steps=1, seed=1)
  run.evals[0].batch_size = 8
  evaluate.run(run, str(tmp_path))
  assert (task.kept[0]["tokens"] != first["tokens"]).any()


def test_keys_are_of_seed_evaluation_and_stream():
  keys = [
    jax.random.key_data(step.prediction_key(seed, evaluation=evaluation, stream=stream)).tolist()
    for seed, evaluation, stream in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))
  ]
  assert keys[0] == keys[-1] and len({str(key) for key in keys}) == 4


@dataclasses.dataclass(kw_only=True)
class Helped(Kept):
  """Predictions by an array that nothing trains."""

  def frozen(self, mesh, *, precision, training=True, load=True):
    assert not training and precision == "fp32"
    spec = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    return jax.device_put(np.float32(7), spec.sharding) if load else spec

  def predict(self, model, batch, *, rngs, frozen):
    return {"score": jnp.broadcast_to(frozen, batch["weight"].shape)}


def test_evaluations_have_frozen_arrays(data):
  run, task = config(data, BEAMS)
  fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
  run.evals[0].task = Helped(**fields)
  program = step.build(run, test_step.make_mesh(devices=8), steps=1)
  (evaluator,) = evaluate.evaluators(program)
  evaluator(*weights(program))
  np.testing.assert_array_equal(task.kept[-1]["score"], np.full(ROWS, 7, np.float32))


@dataclasses.dataclass(kw_only=True)
class Faulty(Kept):
  """Predictions that cannot be made."""

  def predict(self, model, batch, *, rngs, frozen):
    raise self.kept[0]


def test_what_cannot_be_predicted_is_told_before_anything_is_compiled(data, tmp_path):
  too_many = Search(num_beams=1000, max_length=4)
  for run, message in (
    (config(data, too_many)[0], "found 1000 beams"),
    (config(data, Search(max_length=2000))[0], "at most 1025 decoder tokens"),
  ):
    with pytest.raises(ValueError, match=r"evals\[sixteen\]: Kept.predict of the stream") as e:
      train(run, str(tmp_path / "run"))
    assert message in str(e.value)
  run, task = config(data, BEAMS)
  fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
  faulty = Faulty(**{**fields, "kept": [TypeError("a fault of the program")]})
  run.evals[0].task = faulty
  with pytest.raises(TypeError, match="a fault of the program") as e:
    train(run, str(tmp_path / "run"))
  assert e.value.__notes__[-1:] == ["evals[sixteen]: Faulty.predict of the stream 'examples'"]
  missing = dataclasses.replace(task, frequencies=str(tmp_path / "none.p"))
  run.evals[0].task = missing
  with pytest.raises(ValueError, match=r"Expected document frequencies in .*none\.p"):
    train(run, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
