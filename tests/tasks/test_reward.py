"""Learning from rewards: the original's samples, scores, loss and gradient; and what is told."""

import dataclasses
import gzip
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import host_calls, train
from ofa_jax.config import Config
from ofa_jax.data.text import REFERENCES
from ofa_jax.data.tsv import IMAGE, BadRow
from ofa_jax.decode.beam import Search
from ofa_jax.losses_policy import policy_gradient, token_log_probs
from ofa_jax.scoring import rewards, rouge
from ofa_jax.tasks.reward import SelfCritical
from ofa_jax.tokenizers.special import EOS, PAD
from tests.ofa_files import GOLDEN, write_bpe
from tests.ofa_golden import micro_config, micro_model
from tests.scoring.test_cider import plain_cider_d

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def test_the_originals_function():
  with np.load(GOLDEN / "losses" / "scst_function.npz") as arrays:
    given = dict(arrays)
  targets = given["target"].astype(np.int32)

  @jax.jit
  def loss(logits):
    log_probs = token_log_probs(logits, targets)
    mean = policy_gradient(log_probs, targets, given["reward"])["loss"]
    return mean.total, mean.count

  (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(given["logits"]))
  np.testing.assert_allclose(total, given["loss"], rtol=1e-5)
  assert count == given["ntokens"]
  np.testing.assert_allclose(gradient, given["grad"], atol=1e-5 * np.abs(given["grad"]).max())


WORDS = {5: " the", 8: " and", 25: " as", 28: " be"}


class Words:
  """The golden's: each id is a word, with the space before it."""

  chinese = False

  def decode(self, ids):
    return "".join(WORDS[int(i)] for i in ids if i > 3)


@dataclasses.dataclass(kw_only=True)
class Spoken(SelfCritical):
  """The task with the golden's words."""

  words = Words()


def test_samples_rewards_and_losses_are_the_originals(tmp_path):
  """The beam's own samples; then the loss with BatchNorm's statistics, and with the batch's."""
  with np.load(GOLDEN / "losses" / "scst_full.npz") as arrays:
    given = dict(arrays)
  texts = json.loads((GOLDEN / "losses" / "scst_full.json").read_text())
  frequencies = tmp_path / "df.json"
  frequencies.write_bytes(gzip.decompress((GOLDEN / "scoring" / "cider_df.json.gz").read_bytes()))
  reward = rewards.CiderD(frequencies=str(frequencies))
  reward.learn(())
  task = Spoken(
    tokenizer="",
    image_size=64,
    reward=reward,
    allowed_range=(4, 55),
    sampling=Search(num_beams=5, max_length=7, no_repeat_ngram_size=3, allowed_range=(4, 55)),
  )
  spoken = [REFERENCES.join(group).encode() for group in texts["ref_strings"]]
  batch = {
    "source": given["src_tokens"].astype(np.int32),
    IMAGE: given["patch_images"].transpose(0, 2, 3, 1),
    "image_mask": given["patch_masks"],
    "references": np.stack([np.frombuffer(x.ljust(256, b"\0"), np.uint8) for x in spoken]),
    "weight": np.ones(3, np.float32),
  }
  frozen = micro_model(freeze_resnet=True)
  with jax.default_matmul_precision("highest"):
    batch = jax.jit(lambda b: task.prepare(frozen, b, rngs=None, step=0, frozen=None))(batch)
    host_calls.reraise()
    flat = given["gen_target"].reshape(3, 5, -1)
    np.testing.assert_array_equal(batch["samples"], flat)
    assert [task.words.decode(row).strip() for row in flat.reshape(15, -1)] == texts["gen_strings"]
    np.testing.assert_allclose(batch["score"].ravel(), given["scores"], atol=1e-5)
    np.testing.assert_allclose(batch["advantage"].ravel(), given["reward"], atol=1e-5)
    for name in ("eval", "train"):

      @jax.jit
      def computed(batch, name=name):
        model, key = micro_model(freeze_resnet=name == "eval"), jax.random.key(0)
        metrics = task.loss(model, batch, rngs=key)
        return metrics, task._log_probs(model, batch, rngs=key)

      metrics, log_probs = computed(batch)
      np.testing.assert_allclose(metrics["loss"].total, given[f"loss_{name}"], rtol=1e-5)
      assert metrics["loss"].count == 66
      tokens = jnp.asarray(given["gen_target"], jnp.int32)
      right = token_log_probs(given[f"logits_{name}"], tokens, allowed_range=(4, 55))
      keep = given["gen_target"] != 1
      np.testing.assert_allclose(log_probs[keep], right[keep], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(metrics["reward"].value, given["scores"].mean(), rtol=1e-5)
  assert metrics["distinct"].value == 1 and metrics["punctuated"].value == 0
  assert metrics["scoring_s_per_row"].value > 0


@dataclasses.dataclass(kw_only=True)
class Given(Spoken):
  """The task whose model is the logits of its samples, float[B * M, T, V]."""

  def _log_probs(self, model, batch, *, rngs):
    tokens = batch["samples"]
    tokens = tokens.reshape(-1, tokens.shape[2])
    return token_log_probs(model, tokens, allowed_range=self.allowed_range)


def drawn(rng, *, rows, samples, length, vocab_size):
  """(logits, samples, captions of each row), of all lengths and some alike."""
  logits = rng.normal(size=(rows * samples, length, vocab_size)) * 2
  tokens = rng.choice(list(WORDS), (rows, samples, length)).astype(np.int32)
  tokens[:, 1] = tokens[:, 0]
  ends = rng.integers(1, length, (rows, samples))
  tokens[np.arange(length) == ends[..., None]] = EOS
  tokens[np.arange(length) > ends[..., None]] = PAD
  words = [word.strip() for word in WORDS.values()]
  said = [
    [" ".join(rng.choice(words, rng.integers(0, 6))) for _ in range(rng.integers(1, 4))]
    for _ in range(rows)
  ]
  return logits, tokens, said


OPTIONS = {
  "plain": {},
  "ranges": {"allowed_range": (4, 30)},
  "sentences": {"sentence_avg": True},
  "prefix": {"ignore_prefix": 2},
  "all": {"allowed_range": (4, 30), "sentence_avg": True, "ignore_prefix": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_every_option_is_its_definition(options, kl):
  """In float64, from texts to the gradient; a row that could not be read changes nothing."""
  logits, tokens, said = drawn(np.random.default_rng(3), rows=4, samples=3, length=6, vocab_size=40)
  reward, others = rewards.CiderD(), [["as the and be"], ["be and"], ["the as"]]
  reward.learn([*said, *others])
  task = Given(tokenizer="", reward=reward, kl=kl, kl_model="a", **options)
  references = np.stack([task._stored(group) for group in said])
  references[3] = 0
  weight = np.array([1, 1, 1, 0], np.float32)
  told = task._judge(tokens, references)
  before = np.log(np.full(tokens.reshape(12, 6).shape, 0.1))
  batch = {"samples": tokens, "references": references, "weight": weight, "before": before, **told}

  def loss(logits):
    metrics = task.loss(logits, batch, rngs=None)
    return metrics["loss"].value, metrics

  (found, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))

  low, high = options.get("allowed_range", (4, 40))
  inside = (np.arange(40) < 4) | ((np.arange(40) >= low) & (np.arange(40) < high))
  total, number, expected, scores = 0.0, 0, np.zeros_like(logits), []
  for row in range(3):
    texts = ["".join(WORDS.get(i, "") for i in ids).strip() for ids in tokens[row].tolist()]
    groups = [f"{text} <eos>" for text in said[row]]
    own = [plain_cider_d(f"{text} <eos>", groups, reward.counted) for text in texts]
    scores += own
    for i, score in enumerate(own):
      worth = score - (sum(own) - score) / 2
      np.testing.assert_allclose(told["advantage"][row, i], worth, atol=1e-9)
      at = 3 * row + i
      for place, token in enumerate(tokens[row, i]):
        if token == PAD or place < options.get("ignore_prefix", 0):
          continue
        shares = np.where(inside, np.exp(logits[at, place]), 0)
        shares /= shares.sum()
        cost, slope, ratio = -np.log(shares[token]), worth, 0.1 / shares[token]
        total += worth * cost + kl * (ratio - 1 - np.log(ratio))
        slope += kl * (ratio - 1)
        expected[at, place] = slope * (shares - (np.arange(40) == token))
        number += not options.get("sentence_avg")
    number += 3 * options.get("sentence_avg", False)
  assert metrics["loss"].count == number
  np.testing.assert_allclose(found, total / number, rtol=1e-5)
  expected /= number
  np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())
  np.testing.assert_allclose(metrics["reward"].value, np.mean(scores), rtol=1e-5)


def test_staying_near_the_start_costs_where_it_is_left():
  tokens = np.array([[5, 6, 2], [7, 2, 1]])
  log_probs = jnp.log(jnp.full((2, 3), 0.5))
  options = {"kl": 0.1, "before": jnp.log(jnp.full((2, 3), 0.25))}
  metrics = policy_gradient(log_probs, tokens, np.zeros(2), **options)
  divergence = 0.5 - 1 - np.log(0.5)
  np.testing.assert_allclose(metrics["kl"].value, divergence, rtol=1e-6)
  np.testing.assert_allclose(metrics["loss"].value, 0.1 * divergence, rtol=1e-6)
  same = policy_gradient(log_probs, tokens, np.ones(2), kl=0.1, before=log_probs)
  np.testing.assert_allclose(same["loss"].value, np.log(2), rtol=1e-6)


def test_what_a_reward_raises_ends_the_run_and_not_the_program():
  def judge(x):
    if x[0] > 0:
      raise KeyError("no such word")
    return {"y": -x}

  shapes = {"y": jax.ShapeDtypeStruct((2,), jnp.float32)}
  run = jax.jit(lambda x: host_calls.call(judge, shapes, x)["y"])
  assert run(jnp.array([-1.0, 2.0])).tolist() == [1.0, -2.0]
  host_calls.reraise()
  bad = {"bad": np.zeros(2, np.int32)}
  assert np.isnan(run(jnp.ones(2))).all()
  with pytest.raises(KeyError, match="no such word"):
    train._stop_if_diverged(Config.__new__(Config), bad)
  host_calls.reraise()  # it is told once
  with host_calls.left_out():
    assert "callback" not in jax.jit(lambda x: host_calls.call(judge, shapes, x)).lower(
      jax.ShapeDtypeStruct((2,), jnp.float32)
    ).as_text()  # fmt: skip


def test_rewards_are_functions_of_texts():
  texts, references = (
    ["a red box", "two boxes", ""],
    [["a red box."], ["one box", "two boxes"], ["a"]],
  )
  counted = rewards.CiderD()
  with pytest.raises(ValueError, match="expected document frequencies, found none"):
    counted(texts, references)
  corpus = [*references, ["a green box"], ["a ball"]]
  counted.learn(corpus)
  scores = counted(texts, references)
  assert scores[0] == pytest.approx(10) and scores[2] == 0
  cut, whole = counted(["a red", "a red box"], [["a red box"]] * 2)
  assert cut < whole
  assert rewards.length_gap(texts, references).tolist() == [0, 0, -1]
  assert rewards.bleu4(["a b c d", "a"], [["a b c d"], ["a"]]) == pytest.approx([1, 0], abs=1e-3)
  both = rewards.Weighted(parts=((1.0, rewards.CiderD()), (0.5, rewards.length_gap)))
  both.learn(iter(corpus))
  np.testing.assert_allclose(both(texts, references), scores + [0, 0, -0.5])


def test_each_is_compared_with_the_others_of_its_row():
  scores = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 9.0], [5.0, 7.0, 8.0]])
  there = np.array([[True, True, True], [True, True, False], [True, False, False]])
  found = rewards.leave_one_out(scores, there)
  np.testing.assert_allclose(found, [[-3, -1.5, 4.5], [-1, 1, 0], [0, 0, 0]])


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return str(write_bpe(tmp_path_factory.mktemp("bpe")))


def test_rows_have_all_captions(bpe, tmp_path):
  golden = json.loads((GOLDEN / "caption" / "scst.json").read_text())
  path = tmp_path / golden["tsv"]
  path.write_bytes((GOLDEN / "caption" / golden["tsv"]).read_bytes())
  options = {"tokenizer": bpe, "image_size": 16, "source_length": 8, "target_length": 62}
  task = SelfCritical(train=(str(path),), reference_bytes=600, **options)
  rows = task.examples("train")
  assert task.reward.counted.images == len(rows)
  for i, item in enumerate(golden["items"]):
    example = rows.example(i, np.random.default_rng(0))
    assert example["source"].tolist() == item["source"]["ids"]
    text = bytes(example["references"]).rstrip(b"\0").decode()
    whole = item["target"]["text"][0].strip().split(REFERENCES)
    assert [x.split() for x in text.split(REFERENCES)] == [x.split() for x in whole]
    evaluated = rows.example(i, None)
    assert evaluated["target"].tolist()[: len(item["target"]["ids"])] == item["target"]["ids"]
    assert example.keys() == evaluated.keys() == rows.blank().keys()
  # One that is nothing but punctuation counts among them, as in the original.
  assert bytes(task._stored(["", "a", ""])).rstrip(b"\0") == b"&&a&&"
  small = dataclasses.replace(task, reference_bytes=50).examples("train")
  with pytest.warns(UserWarning, match="Left captions out: task.reference_bytes is 50"):
    example = small.example(0, np.random.default_rng(0))
  assert b"&&" not in bytes(example["references"]) or b"Third" not in bytes(example["references"])
  tiny = dataclasses.replace(task, reference_bytes=4).examples("train")
  with pytest.raises(BadRow, match="the first caption has"):
    tiny.example(0, np.random.default_rng(0))


def judged(reward, texts):
  """What the task makes of a reward's scores of texts."""
  task = SelfCritical(tokenizer="", reward=reward)
  return task._scores(texts, [["a"]] * len(texts))


def test_a_faulty_reward_is_named():
  def short(texts, references):
    return [1.0]

  def broken(texts, references):
    return {}[texts[0]]

  assert judged(rouge.rouge_l, ["a", "b"]).tolist() == [1, 0]
  with pytest.raises(ValueError, match=r"reward short: expected 2 finite numbers.*shape \(1,\)"):
    judged(short, ["a", "b"])
  with pytest.raises(ValueError, match=r"reward <lambda>: expected 1 finite numbers"):
    judged(lambda texts, references: [np.nan], ["a"])
  with pytest.raises(RuntimeError, match=r"reward broken raised KeyError for 1 texts: 'a'"):
    judged(broken, ["a"])
  with pytest.raises(ValueError, match=r"reward CiderD: CiderD: expected document frequencies"):
    judged(rewards.CiderD(), ["a"])


def test_a_collapse_is_told():
  task = SelfCritical(tokenizer="")
  well = {"train/distinct": 1.0, "train/words": 10.0, "train/punctuated": 0.5}
  start = [{"step": i, **well} for i in range(3)]
  assert task.advise(start + [{"valid/cider": 1.0}] + start) is None
  assert task.advise(start + start[:2]) is None  # too few to say

  def told(**now):
    return task.advise(start + [{**well, **{f"train/{k}": v for k, v in now.items()}}] * 3)

  assert "of 5 texts of a row 1.2 differ" in told(distinct=0.24)
  assert "a text has 4.0 words, 10.0 at the start" in told(words=4.0)
  assert "a text has 20.0 words" in told(words=20.0)
  assert "0% of the texts have punctuation, 50% at the start" in told(punctuated=0.0)
  assert told(distinct=0.9, words=8.0, punctuated=0.3) is None


def test_faults_show_before_anything_is_read():
  task = SelfCritical(
    tokenizer="",
    smoothing=0.1,
    ignore_eos=True,
    sampling=Search(num_beams=1, max_length=16),
    kl=0.1,
  )
  found = "\n".join(task.check(Config(model=micro_config(), task=task, batch_size=8, steps=1)))
  assert "task.smoothing: expected 0.0, as rewards take the place of right answers" in found
  assert "task.ignore_eos: expected False" in found
  assert "task.sampling.num_beams: expected at least 2" in found
  assert "task.kl_model: expected the model to stay near to, found None" in found


def test_the_recipe_is_the_originals(monkeypatch):
  get_config = runpy.run_path(str(CONFIGS / "ofa_caption.py"))["get_config"]
  base, large = get_config("base,scst"), get_config("large,scst")
  for config in (base, large):
    assert (config.batch_size, config.epochs, config.optim.lr) == (64, 3, 1e-5)
    assert (
      config.model.dropout == config.model.encoder_drop_path == 0 and config.model.freeze_resnet
    )
    search = config.task.sampling
    assert (search.num_beams, search.max_length, search.no_repeat_ngram_size) == (5, 16, 3)
    assert config.task.reward.frequencies.endswith("coco-train-words.p")
    assert config.evals[0].task.frequencies.endswith("coco-valid-words.p")
    assert config.task.check(config) == [] or "tokenizer" in "".join(config.task.check(config))
  assert (base.optim.end_lr, large.optim.end_lr) == (0.0, 2e-7)
