"""The loss of sequences in blocks of the vocabulary: what whole logits give, in less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import losses
from ofa_jax.config import Config
from ofa_jax.engine import sharding
from ofa_jax.losses_policy import token_log_probs
from ofa_jax.losses_vocabulary import InBlocks
from ofa_jax.tasks.mixture import Mixture
from ofa_jax.tasks.seq2seq import Seq2Seq
from tests import test_losses_of_sequences as whole
from tests import tiny
from tests.compiling import AS_USERS

ROWS, LENGTH, WIDTH, WORDS = 4, 6, 32, 1000
RANGE = (200, 700)


def inputs(dtype=np.float32):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype)
  table = jnp.asarray(rng.normal(size=(WORDS, WIDTH)), dtype)
  targets = rng.integers(RANGE[0], RANGE[1], (ROWS, LENGTH)).astype(np.int32)
  targets[:, 4:] = 1
  # Some are nearly sure: their losses are small differences of large numbers.
  hidden = hidden.at[0].add(table[targets[0]] * 2)
  return hidden, table, targets


def options(*names):
  rng = np.random.default_rng(1)
  _, _, targets = inputs()
  mask = rng.random((ROWS, LENGTH, WORDS)) < 0.1
  np.put_along_axis(mask, targets[..., None], True, axis=2)
  mask[0, 0] = np.arange(WORDS) == targets[0, 0]  # the only one
  mask[targets == 1] = False  # as a trie has it where nothing is learnt
  known = {
    "smoothing": 0.1,
    "mask": mask,
    "allowed_range": RANGE,
    "conf": np.array([1, 0.5, 2, 0.1], np.float32),
    "drop_worst": 0.3,
    "drop_best": 0.2,
    "ignore": 2,
    "ignore_prefix": 1,
  }
  return {name: known[name] for name in names}


def cost(blocks, given, *, dtype=np.float32, frozen=False):
  """Metrics of the loss, and its gradients by states and table."""
  hidden, table, targets = inputs(dtype)

  @jax.jit
  def run(hidden, table):
    if frozen:
      table = jax.lax.stop_gradient(table)
    if blocks:
      logits = InBlocks(hidden, table, blocks)
    else:
      logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    metrics = losses.label_smoothed(logits, targets, **given)
    return metrics["loss"].total, {name: (m.total, m.count) for name, m in metrics.items()}

  with jax.default_matmul_precision("highest"):
    gradients, metrics = jax.grad(run, argnums=(0, 1), has_aux=True)(hidden, table)
  return metrics, gradients


def assert_same(found, expected, *, rtol):
  """Metrics to 1e-6; gradients by their norms, for rounding may fall to either side."""
  for name, mean in expected[0].items():
    np.testing.assert_allclose(found[0][name], mean, rtol=1e-6, err_msg=name)
  for mine, theirs in zip(found[1], expected[1], strict=True):
    mine, theirs = (np.asarray(x, np.float64) for x in (mine, theirs))
    assert np.linalg.norm(mine - theirs) <= rtol * np.linalg.norm(theirs)


@pytest.mark.parametrize(
  ("blocks", "names"),
  [
    (3, ()),
    (7, ("smoothing", "conf", "drop_worst", "drop_best")),
    (4, ("smoothing", "mask", "ignore", "ignore_prefix")),
    (5, ("smoothing", "allowed_range", "mask", "conf")),
  ],
)
def test_they_are_the_whole(blocks, names):
  given = options(*names)
  assert_same(cost(blocks, given), cost(0, given), rtol=1e-6)


def test_in_bfloat16_gradients_are_those_before_they_are_rounded():
  """A difference of 1e-7 turns few of them to the other side, where they are one digit off."""
  given = options("smoothing")
  found, expected = (cost(blocks, given, dtype=jnp.bfloat16) for blocks in (3, 0))
  assert_same(found, expected, rtol=1e-3)
  for mine, theirs in zip(found[1], expected[1], strict=True):
    assert mine.dtype == jnp.bfloat16
    assert np.mean(np.asarray(mine != theirs)) < 2e-3
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (mine, theirs)), rtol=2**-7)


def test_a_table_that_is_not_trained_has_no_gradient_to_compute():
  given = options("smoothing")
  _, (states, table) = cost(3, given, frozen=True)
  assert not table.any()
  np.testing.assert_array_equal(states, cost(3, given)[1][0])
  hidden, table, targets = inputs()

  def products(argnums):
    def total(hidden, table):
      return losses.label_smoothed(InBlocks(hidden, table, 3), targets)["loss"].total

    return str(jax.make_jaxpr(jax.grad(total, argnums))(hidden, table)).count("dot_general")

  assert products((0, 1)) == 4 and products(0) == 3 and products(1) == 3


@pytest.mark.parametrize("name", [*whole.cases(whole.FUNCTION)])
def test_the_originals_function(name, monkeypatch):
  """Logits as states, with the unit matrix as the table."""
  case = whole.FUNCTION[name]
  if "reg_alpha" in case["kwargs"]:
    return  # R-Drop needs whole logits
  cost = losses.label_smoothed

  def in_blocks(logits, targets, **options):
    return cost(InBlocks(logits, jnp.eye(logits.shape[-1]), 3), targets, **options)

  monkeypatch.setattr(losses, "label_smoothed", in_blocks)
  whole.test_the_originals_function(name)


def test_log_probabilities_of_tokens():
  hidden, table, targets = inputs()
  logits = hidden @ table.T
  for allowed in (None, RANGE):
    found = token_log_probs(InBlocks(hidden, table, 3), targets, allowed_range=allowed)
    expected = token_log_probs(logits, targets, allowed_range=allowed)
    keep = targets != 1
    np.testing.assert_allclose(found[keep], expected[keep], rtol=1e-5, atol=1e-6)


def test_rows_on_several_devices_with_a_table_split_over_them():
  hidden, table, targets = inputs()

  def total(hidden, table):
    return losses.label_smoothed(InBlocks(hidden, table, 3), targets)["loss"].total

  gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
  expected = gradient(hidden, table)
  mesh = sharding.make_mesh((1, 2, 2), devices=jax.devices()[:4])
  rows = jax.device_put(hidden, sharding.batch_sharding(mesh))
  places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", "fsdp"))
  found = gradient(rows, jax.device_put(table, places))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_the_logits_of_a_batch_never_exist():
  rows, words, width = 512, 59457, 16
  targets = jnp.zeros((8, rows // 8), jnp.int32) + 5
  shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((8, rows // 8, width), (words, width))]

  def temporary(blocks):
    def total(hidden, table):
      logits = InBlocks(hidden, table, blocks) if blocks else hidden @ table.T
      return losses.label_smoothed(logits, targets, smoothing=0.1)["loss"].total

    lowered = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes)
    return lowered.compile(AS_USERS).memory_analysis().temp_size_in_bytes

  whole_bytes, of_blocks = temporary(0), temporary(16)
  assert whole_bytes > rows * words * 4 > 4 * of_blocks


@dataclasses.dataclass(kw_only=True)
class Texts(Seq2Seq):
  """A task with all options of the loss."""

  fields = ("text",)
  columns: tuple[int, ...] = (0,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StandIn:
  """A model that compiles at once; tests/test_reward_training.py has an OFA."""

  table: jax.Array

  def states(self, *, tokens, decoder_tokens, num_patches, rngs):
    return self.table[tokens] + self.table[decoder_tokens]

  def __call__(self, **inputs):
    return self.states(**inputs) @ self.table.T


def test_a_task_in_blocks_has_the_same_loss():
  """The field of a config, alone and in a mixture, whose logits are all in blocks then."""
  rng = np.random.default_rng(0)
  batch = {
    name: rng.integers(4, 60, (4, 6)).astype(np.int32) for name in ("source", "previous", "target")
  }
  batch |= {"weight": np.ones(4, np.float32), "dropping": np.bool_(True)}
  model = StandIn(jnp.asarray(rng.normal(size=(64, 8)), jnp.float32))

  @jax.jit
  def metrics(model):
    tasks = [Texts(tokenizer="", smoothing=0.1, drop_worst=0.2, vocab_blocks=n) for n in (1, 3)]
    mixed = Mixture(tasks=dict(zip("ab", tasks, strict=True)), weights={"a": 0.0, "b": 1.0})
    both = mixed.loss(model, {"a": batch, "b": batch}, rngs=None)
    return tuple(task.loss(model, batch, rngs=None) for task in tasks), both

  with jax.default_matmul_precision("highest"):
    (whole, blocks), both = metrics(model)
  for name, mean in whole.items():
    np.testing.assert_allclose(blocks[name], mean, rtol=1e-6, err_msg=name)
    for task in "ab":
      np.testing.assert_allclose(both[f"{task}/{name}"], mean, rtol=1e-5, err_msg=name)
  assert whole["loss"].count == 19


def test_what_needs_whole_logits_says_so():
  task = Texts(tokenizer="", vocab_blocks=4, rdrop=1.0)
  found = task.check(Config(model=tiny.OFA, task=task, batch_size=8, steps=1))
  assert any(
    fault.startswith("task.vocab_blocks: expected at least 1, and 1 with") for fault in found
  )
  hidden, table, targets = inputs()
  with pytest.raises(ValueError, match="Expected whole logits with log_end or rdrop"):
    losses.label_smoothed(InBlocks(hidden, table, 3), targets, log_end=0.75)
