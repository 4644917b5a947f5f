"""Self-critical steps that nothing of the original's was recorded of, derived from its definition.

The search is written down here once more, one picture and one hypothesis at a time, from whole
forward passes; texts, rewards and the loss are computed from it in float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax import host_calls, trees
from ofa_jax.data.tsv import IMAGE
from ofa_jax.decode.beam import Search
from ofa_jax.scoring import rewards
from ofa_jax.tasks.reward import SelfCritical
from ofa_jax.tokenizers.special import BOS, EOS, PAD
from tests.ofa_files import GOLDEN
from tests.ofa_golden import micro_model
from tests.scoring.test_cider import plain_cider_d

pytestmark = pytest.mark.slow  # a search, a loss and two gradients to compile for each case

# Fields of the task, of its search, and whether BatchNorm has the statistics of the batch.
CASES = {
  "three beams": ({}, {"num_beams": 3, "max_length": 5}, True),
  "sentences": (
    {"sentence_avg": True, "allowed_range": (4, 40)},
    {"num_beams": 4, "max_length": 6, "min_length": 3, "no_repeat_ngram_size": 2,
     "temperature": 0.7, "length_penalty": 2.0, "allowed_range": (4, 40)},
    True,
  ),
  "prefix": (
    {"ignore_prefix": 1},
    {"num_beams": 2, "max_length": 8, "no_repeat_ngram_size": 3, "normalize_scores": False},
    False,
  ),
}  # fmt: skip


class Words:
  """Each id is a word."""

  chinese = False

  def decode(self, ids):
    return "".join(f" w{i}" for i in ids if i > 3)


@dataclasses.dataclass(kw_only=True)
class Spoken(SelfCritical):
  """The task with these words."""

  words = Words()


def plain_search(log_probs, search):
  """The hypotheses of one input, best first: `log_probs(beginnings) -> float64[N, V]`."""
  beams, finished = [((), 0.0)], []
  for step in range(search.max_length + 1):
    told = log_probs([begin for begin, _ in beams])
    candidates = []
    for (begin, score), values in zip(beams, told, strict=True):
      values = values.copy()
      values[PAD] = -np.inf
      if step < search.min_length:
        values[EOS] = -np.inf
      if step == search.max_length:
        values[np.arange(len(values)) != EOS] = -np.inf
      size, seen = search.no_repeat_ngram_size, (BOS, *begin)
      if size and len(seen) >= size:
        for i in range(len(seen) - size + 1):
          if seen[i : i + size - 1] == seen[len(seen) - size + 1 :]:
            values[seen[i + size - 1]] = -np.inf
      order = np.argsort(-values, kind="stable")[: 2 * search.num_beams]
      candidates += [((*begin, int(i)), score + values[i]) for i in order]
    candidates = sorted(candidates, key=lambda x: -x[1])[: 2 * search.num_beams]
    for tokens, score in candidates[: search.num_beams]:
      if tokens[-1] == EOS and score > -np.inf and len(finished) < search.num_beams:
        length = len(tokens) ** search.length_penalty if search.normalize_scores else 1
        finished.append((score / length, tokens))
    if len(finished) == search.num_beams:
      break
    beams = [x for x in candidates if x[0][-1] != EOS][: search.num_beams]
  return [tokens for _, tokens in sorted(finished, key=lambda x: -x[0])]


@pytest.fixture(scope="module")
def given():
  with np.load(GOLDEN / "losses" / "scst_full.npz") as arrays:
    return dict(arrays)


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_its_definition(given, case):
  fields, options, learns = CASES[case]
  search, rng = Search(**options), np.random.default_rng(0)
  said = [[Words().decode(rng.integers(4, 60, 5)).strip() for _ in range(n)] for n in (1, 3, 2)]
  reward = rewards.CiderD()
  task = Spoken(tokenizer="", image_size=64, reward=reward, sampling=search, **fields)
  source, image = jnp.asarray(given["src_tokens"], jnp.int32), given["patch_images"]
  image, mask = jnp.asarray(image.transpose(0, 2, 3, 1)), jnp.asarray(given["patch_masks"])
  model = micro_model(freeze_resnet=not learns)
  graph, params, rest = trees.split(model)
  room, rows, number = search.max_length + 1, len(source), search.num_beams

  @jax.jit
  def logits(row, previous):
    """In evaluation mode, of some beginnings of one picture."""
    again = lambda x: jnp.repeat(x[row][None], len(previous), axis=0)  # noqa: E731
    model = nnx.merge(graph, params, rest)
    return model(
      again(source), previous, image=again(image), image_mask=again(mask)
    )  # fmt: skip

  def of_row(row):
    def log_probs(begins):
      previous = np.full((number, room), PAD, np.int32)
      for i, begin in enumerate(begins):
        previous[i, : len(begin) + 1] = (BOS, *begin)
      values = np.asarray(logits(row, previous), np.float64)[: len(begins), len(begins[0])]
      return normalised(values / search.temperature, search.allowed_range)

    return log_probs

  with jax.default_matmul_precision("highest"):
    expected = [plain_search(of_row(row), search) for row in range(rows)]
    texts = [[Words().decode(tokens).strip() for tokens in group] for group in expected]
    said[0].append(texts[0][0])  # so that something is worth something
    said[1][0] = texts[1][-1]
    said[2][1] = texts[2][0]
    reward.learn([*said, ["w5 w8 w9 w10"], ["w11 w12"]])
    batch = {
      "source": source, IMAGE: image, "image_mask": mask, "weight": np.ones(rows, np.float32),
      "references": np.stack([task._stored(group) for group in said]),
    }  # fmt: skip
    prepare = jax.jit(lambda b: task.prepare(model, b, rngs=None, step=0, frozen=None))
    batch = prepare(batch)
    host_calls.reraise()
    found = [[tuple(x for x in ids if x != PAD) for ids in group.tolist()]
             for group in np.asarray(batch["samples"])]  # fmt: skip
    assert found == expected

    scores = np.array([
      [plain_cider_d(f"{text} <eos>", [f"{x} <eos>" for x in group], reward.counted)
       for text in mine]
      for mine, group in zip(texts, said, strict=True)
    ])  # fmt: skip
    worth = scores - (scores.sum(1, keepdims=True) - scores) / (number - 1)
    np.testing.assert_allclose(batch["advantage"], worth, atol=1e-5)
    assert scores.max() > 1

    tokens = np.asarray(batch["samples"]).reshape(rows * number, -1)
    keep = tokens != PAD
    sentences, keep = keep[:, 0].sum(), keep & (np.arange(tokens.shape[1]) >= task.ignore_prefix)
    size = sentences if task.sentence_avg else keep.sum()

    def original(params):
      """Each picture goes through the model with each of its texts."""
      model = nnx.merge(graph, params, rest)
      again = lambda x: jnp.repeat(x, number, axis=0)  # noqa: E731
      previous = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=BOS)
      logits = model(
        again(source), previous, image=again(image), image_mask=again(mask), rngs=jax.random.key(0)
      )  # fmt: skip
      if task.allowed_range is not None:
        low, high = task.allowed_range
        all_ids = np.arange(logits.shape[-1])
        logits = jnp.where((all_ids < 4) | ((all_ids >= low) & (all_ids < high)), logits, -jnp.inf)
      own = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
      total = -jnp.sum(jnp.where(keep, own * worth.reshape(-1, 1), 0.0))
      return total / size

    def ours(params):
      metrics = task.loss(nnx.merge(graph, params, rest), batch, rngs=jax.random.key(0))
      return metrics["loss"].value, metrics["loss"].count

    right, wanted = jax.jit(jax.value_and_grad(original))(params)
    (loss, count), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
  assert count == size
  assert float(loss) == pytest.approx(float(right), rel=1e-5)
  mine, wanted = trees.flatten(gradient), trees.flatten(wanted)
  largest = max(float(jnp.abs(x).max()) for x in wanted.values())
  for path, x in wanted.items():
    scale = max(float(jnp.abs(x).max()), 1e-2 * largest)  # some are nothing but rounding
    np.testing.assert_allclose(mine[path], x, rtol=0, atol=1e-5 * scale, err_msg=path)


def normalised(logits, allowed):
  """Log-probabilities of ids that are allowed."""
  if allowed is not None:
    ids = np.arange(logits.shape[-1])
    logits = np.where((ids < 4) | ((ids >= allowed[0]) & (ids < allowed[1])), logits, -np.inf)
  peak = logits.max(-1, keepdims=True)
  return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
