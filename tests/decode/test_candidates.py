"""All-candidate scoring against scoring each answer alone."""

import jax
import numpy as np
import pytest

from ofa_jax.decode import candidates
from tests.decode import tables

EOS, VOCAB = 2, 40
TABLE = tables.table(batch=3, vocab_size=VOCAB)


def scores(answers, prompts):
  plan = candidates.plan(answers)
  step, reorder = tables.functions(TABLE)
  cache = tables.cache(batch=3, hypotheses=1, length=prompts.shape[1] + len(plan.levels))

  @jax.jit
  def run(cache, prompts, plan):
    return candidates.score(
      step, cache, prefill=tables.prefill(TABLE), reorder=reorder, prompts=prompts, plan=plan
    )

  padded = np.asarray(run(cache, prompts, plan))
  assert (padded[:, plan.num_answers :] == -np.inf).all()
  return padded[:, : plan.num_answers], plan


def alone(logits, prompt, answer, answers):
  """The original's sum over an answer's tokens and eos, among what the trie allows."""
  ended, total = [[*x, EOS] for x in answers], 0.0
  for i, token in enumerate([*answer, EOS]):
    allowed = sorted({x[i] for x in ended if x[:i] == answer[:i] and len(x) > i})
    total += tables.log_probs(np.asarray(logits), [*prompt, *answer[:i]], allowed=allowed)[token]
  return total


def test_scores_are_those_of_each_answer_alone():
  rng = np.random.default_rng(0)
  answers = [rng.integers(4, 10, rng.integers(1, 5)).tolist() for _ in range(70)]
  prompts = rng.integers(4, VOCAB, (3, 4))
  lengths = [1, 4, 3]
  prompts[:, 0] = 0
  prompts[np.arange(4) >= np.array(lengths)[:, None]] = 1
  found, plan = scores(answers, prompts)
  expected = [
    [alone(logits, prompt[:length].tolist(), x, answers) for x in answers]
    for logits, prompt, length in zip(TABLE, prompts, lengths, strict=True)
  ]
  np.testing.assert_allclose(found, expected, atol=1e-4)
  assert plan.num_steps < sum(len(x) for x in answers) / 2


def test_what_has_no_alternative_is_not_run():
  prompts = np.array([[0]] * 3)
  found, plan = scores([[4, 5, 6, 7]], prompts)
  assert plan.num_steps == 0 and not found.any()
  # One fork at the beginning, one after three tokens: the way there is run, what follows is not.
  answers = [[4, 5, 6, 7, 8], [4, 5, 6, 9, 8], [10, 11, 12, 13]]
  found, plan = scores(answers, prompts)
  assert plan.num_steps == 3
  np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=1e-5)
  for logits, row in zip(TABLE, found, strict=True):
    np.testing.assert_allclose(row, [alone(logits, [0], x, answers) for x in answers], atol=1e-5)


def test_an_answer_may_begin_another_and_come_twice():
  answers = [[4], [4, 5], [4]]
  found, plan = scores(answers, np.array([[0]] * 3))
  assert plan.num_steps == 1
  np.testing.assert_array_equal(found[:, 0], found[:, 2])
  np.testing.assert_allclose(np.exp(found[:, :2]).sum(1), 1, atol=1e-5)


def test_similar_sets_share_a_program():
  one, two = (candidates.plan([[i] for i in range(4, n)]) for n in (90, 98))
  assert jax.tree.structure(one) == jax.tree.structure(two)
  assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, two)


def test_candidates_need_answers():
  with pytest.raises(ValueError, match="at least one answer to choose from, found none"):
    candidates.plan([])
