"""Several tasks on one model: their rows, their losses, and that they are what each is alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ofa_jax import losses
from ofa_jax.config import Config, MeshShape, Optim
from ofa_jax.engine import sharding
from ofa_jax.tasks import taught
from ofa_jax.tasks.base import Task, spec_of
from ofa_jax.tasks.caption import Caption
from ofa_jax.tasks.contrastive import Contrastive
from ofa_jax.tasks.mixture import Mixture
from ofa_jax.tasks.taught import Taught
from ofa_jax.tokenizers.special import PAD
from ofa_jax.train import train
from ofa_jax.validation import validate
from tests import tiny, two_streams, vqa_files
from tests.test_streams import run
from tests.test_train import assert_bit_equal, final_state


@dataclasses.dataclass(kw_only=True)
class Numbers(Task):
  """One number of one vector; or `words`, up to three of one vector each."""

  words: bool = False

  def examples(self, split):
    return two_streams.Texts() if self.words else two_streams.Pairs()

  def batch_spec(self, batch_size):
    return spec_of(self.examples("").blank(), batch_size)

  def loss(self, model, batch, *, rngs, chunks=1):
    if not self.words:
      return {"loss": losses.mean(jnp.square(model(batch["x"]) - batch["y"]), batch["weight"])}
    keep = (jnp.arange(3) < batch["length"][:, None]) & (batch["weight"][:, None] > 0)
    squares = jnp.square(model(batch["words"]) - 1)
    return {"loss": losses.mean(squares, keep), "words": losses.mean(jnp.ones(keep.shape), keep)}


def numbers(**changes) -> Config:
  """A linear model that learns two tasks which do not go through it together."""
  base = two_streams.get_config()
  tasks = {"pairs": Numbers(), "words": Numbers(words=True)}
  return dataclasses.replace(
    base, task=Mixture(tasks=tasks, shares={"pairs": 2, "words": 1}), **changes
  )


def assert_equal(found, expected):
  for mine, others in zip(found[0], expected[0], strict=True):
    assert mine.keys() == others.keys()
    np.testing.assert_allclose(list(mine.values()), list(others.values()), rtol=1e-9)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), found[1], expected[1])


@pytest.fixture(scope="module")
def whole():
  return run(numbers())


def test_every_row_costs_alike_and_each_task_is_logged_by_its_name(whole):
  first = whole[0][0]
  assert first.keys() == {"loss", "pairs/loss", "words/loss", "words/words", "grad_norm", "lr"}
  assert first["loss"] == pytest.approx((2 * first["pairs/loss"] + first["words/loss"]) / 3)


def test_weights_are_factors_of_the_mean_losses():
  task = dataclasses.replace(numbers().task, weights={"pairs": 0.0, "words": 5.0})
  (metrics,), *_ = run(dataclasses.replace(numbers(), task=task), steps=1)
  assert metrics["loss"] == pytest.approx(5 * metrics["words/loss"])


def test_accumulated_parts_on_eight_devices_are_the_whole_batch(whole):
  shape = MeshShape(data=2, fsdp=2, tensor=2)
  assert_equal(run(numbers(accum=2, mesh=shape), devices=8), whole)


def test_a_run_goes_on_bit_for_bit(tmp_path):
  config = numbers(log_every=2)
  train(config, str(tmp_path / "straight"))
  train(dataclasses.replace(config, steps=4), str(tmp_path / "stopped"))
  train(config, str(tmp_path / "stopped"))
  assert_bit_equal(final_state(tmp_path / "straight"), final_state(tmp_path / "stopped"))
  lines = (tmp_path / "straight" / "log.txt").read_text()
  assert "| pairs " in lines and "| words " in lines


def test_rows_by_shares_or_by_the_rows_that_there_are():
  task = numbers().task
  assert task.batch_sizes(16) == {"pairs": 16, "words": 8}
  assert task.batch_sizes(64) == {"pairs": 64, "words": 32}
  rare = dataclasses.replace(task, shares={"pairs": 1000, "words": 1})
  assert rare.batch_sizes(16) == {"pairs": 16, "words": 8}  # at least once the multiple
  by_rows = dataclasses.replace(task, shares=None, multiple=1)
  assert by_rows.batch_sizes(40) == {"pairs": 40, "words": 28}


def test_numbers_that_do_not_fit_are_told():
  def fault(**changes):
    task = dataclasses.replace(numbers().task, **changes)
    with pytest.raises(ValueError) as error:
      validate(dataclasses.replace(numbers(), task=task), devices=1)
    return str(error.value)

  text = fault(shares={"pairs": 1, "word": 1})
  assert "task.shares: expected a number of at least 1e-09 for each of pairs, words" in text
  assert "task.shares" in fault(shares={"pairs": 1, "words": 0})
  assert "task.weights: expected a number of at least 0" in fault(weights={"pairs": 1})
  assert "task.multiple: expected at least 1, found 0" in fault(multiple=0)
  assert "task.tasks: expected some, found none" in fault(tasks={})
  assert "names of letters, digits and _, found 'a/b'" in fault(
    tasks={"a/b": Numbers()}, shares={"a/b": 1}
  )


@pytest.fixture(scope="module")
def tasks(shapes, tmp_path_factory):
  """Captions and questions of tiny files, with a model for both."""
  folder = vqa_files.write(tmp_path_factory.mktemp("questions"), shapes)
  config = tiny.vqa_config(folder)
  caption = tiny.caption_config(shapes).task
  caption = dataclasses.replace(caption, tokenizer=config.task.tokenizer)
  return {"caption": caption, "vqa": config.task}, config.model


def test_faults_of_a_task_are_told_by_its_name(tasks):
  parts, model = tasks
  broken = dataclasses.replace(parts["vqa"], least=0)
  other = Contrastive(train=("x",))
  task = Mixture(
    tasks={**parts, "vqa": broken, "pairs": other},
    shares=dict.fromkeys(("caption", "vqa", "pairs"), 1),
  )
  config = Config(model=model, task=task, batch_size=8, steps=1)
  text = "\n".join(dataclasses.replace(task, tasks={**parts, "vqa": broken}).check(config))
  assert "task.tasks.vqa.answer_length, max_words, least: expected at least 1" in text
  assert "found Contrastive; train it by itself" in "\n".join(task._check_tasks())
  parts = {**parts, "vqa": dataclasses.replace(parts["vqa"], tokenizer="elsewhere")}
  faults = Mixture(tasks=parts)._check_tasks()
  assert "expected one tokenizer for all" in faults[0] and "elsewhere of vqa" in faults[0]


def test_what_the_command_line_makes_none_is_told_by_its_task(tasks):
  parts, model = tasks
  parts = {**parts, "caption": dataclasses.replace(parts["caption"], smoothing=float("nan"))}
  task = Mixture(tasks=parts, shares={"caption": 1, "vqa": 1})
  config = Config(model=model, task=task, batch_size=8, steps=1, optim=Optim())
  with pytest.raises(ValueError, match=r"task.tasks.caption.smoothing: expected a finite number"):
    validate(config, devices=1)
  parts["caption"].max_words = None
  with pytest.raises(ValueError, match=r"config.task.tasks.caption.max_words: expected int"):
    validate(config, devices=1)


def stand_in(size):
  """A model whose logits are of what a row holds, filled up or not, and that compiles at once."""
  table = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
  table[PAD] = 0
  table = jnp.asarray(table)

  def model(*, tokens, decoder_tokens, image, places=None, image_mask=None, num_patches, rngs):
    del num_patches, rngs, image_mask
    seen = table[tokens].sum(1) + image.mean((1, 2, 3))[:, None]
    logits = table[decoder_tokens] + seen[:, None] + jnp.arange(decoder_tokens.shape[1])[:, None]
    if places is not None:
      logits = jnp.take_along_axis(logits, places[..., None], axis=1)
    return logits * jnp.linspace(0.1, 1, size)

  return model


def real(config):
  return config.build(rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  "make",
  [
    lambda config: stand_in(config.vocab_size),
    pytest.param(real, marks=pytest.mark.slow),  # four passes of an OFA to compile
  ],
  ids=["stand-in", "OFA"],
)
def test_tasks_that_go_through_the_model_together_cost_what_each_costs_alone(tasks, make):
  parts, model_config = tasks
  rdrop = dataclasses.replace(parts["vqa"], rdrop=0.5)
  parts = {"caption": parts["caption"], "vqa": parts["vqa"], "twice": rdrop}
  mixture = Mixture(tasks=parts, shares=dict.fromkeys(parts, 1))
  assert mixture.joined() == [["caption", "vqa", "twice"]]
  large = dataclasses.replace(parts["caption"], image_size=64)
  assert dataclasses.replace(mixture, tasks={**parts, "caption": large}).joined() == [
    ["caption"],
    ["vqa", "twice"],
  ]
  model = make(model_config)
  rows = {name: task.examples("train") for name, task in parts.items()}
  sizes = {"caption": 8, "vqa": 4, "twice": 4}
  batch = {
    name: jax.tree.map(
      lambda *x: np.stack(x),
      *(
        {**rows[name].example(i, np.random.default_rng(i)), "weight": np.float32(i != 2)}
        for i in range(n)
      ),
    )
    for name, n in sizes.items()
  }

  @jax.jit
  def both(batch):
    batch = {
      name: each if name == "caption" else {**each, "trie": parts[name].choices.trie}
      for name, each in batch.items()
    }
    alone = {
      name: {k: m.value for k, m in task.loss(model, batch[name], rngs=None).items()}
      for name, task in parts.items()
    }
    return {k: m.value for k, m in mixture.loss(model, batch, rngs=None).items()}, alone

  joint, alone = both(batch)
  for name, metrics in alone.items():
    for key, value in metrics.items():
      np.testing.assert_allclose(joint[f"{name}/{key}"], value, rtol=2e-5, err_msg=f"{name} {key}")
  expected = sum(n / 16 * alone[name]["loss"] for name, n in sizes.items())
  np.testing.assert_allclose(joint["loss"], expected, rtol=1e-5)


def test_rows_are_dealt_out_and_every_device_keeps_its_own():
  one, two = np.arange(16)[:, None], 100 + np.arange(8)[:, None]
  whole = taught.deal([one, two])
  np.testing.assert_array_equal(whole[:6, 0], [0, 1, 100, 2, 3, 101])
  batches = [Taught({}, np.zeros((16, 1))), Taught({}, np.zeros((8, 1)))]
  for part, rows in zip(taught.part(whole, batches), (one, two), strict=True):
    np.testing.assert_array_equal(part, rows)
  mesh = sharding.make_mesh((8, 1, 1))
  split = NamedSharding(mesh, PartitionSpec("data"))

  def round_trip(x, y):
    return taught.part(taught.deal([x, y]) * 2, batches)

  program = jax.jit(round_trip, in_shardings=split, out_shardings=split).lower(one, two).compile()
  assert not any(kind in program.as_text() for kind in ("all-gather", "all-to-all", "permute"))


def test_lengths_masks_and_places_are_made_common():
  short = Taught(
    {"tokens": jnp.ones((2, 3), int), "decoder_tokens": jnp.ones((2, 4), int)},
    jnp.ones((2, 4), int),
  )
  long = Taught(
    {
      "tokens": jnp.full((2, 5), 7),
      "decoder_tokens": jnp.full((2, 6), 7),
      "places": jnp.array([[4, 5], [2, 3]]),
      "image_mask": jnp.array([True, False]),
    },
    jnp.ones((2, 2), int),
  )
  joined = taught.join([short, long])
  assert joined["tokens"].shape == (4, 5) and joined["decoder_tokens"].shape == (4, 6)
  np.testing.assert_array_equal(joined["places"][0], [0, 1, 2, 3])
  np.testing.assert_array_equal(joined["places"][1], [4, 5, 0, 0])
  np.testing.assert_array_equal(joined["image_mask"], [True, True, True, False])


def test_a_mixture_has_one_tokenizer_and_its_files(tasks):
  parts, _ = tasks
  mixture = Mixture(tasks={name: dataclasses.replace(task) for name, task in parts.items()})
  assert mixture.tokenizer == parts["vqa"].tokenizer
  assert mixture.model_files() == parts["vqa"].model_files()
  mixture.tokenizer = "elsewhere"
  assert {task.tokenizer for task in mixture.tasks.values()} == {"elsewhere"}
  assert isinstance(mixture.tasks["caption"], Caption)
