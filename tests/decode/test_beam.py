"""The search against enumeration, and what it promises beside the original's results."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.decode import trie
from ofa_jax.decode.beam import Search
from ofa_jax.tokenizers.special import BOS, EOS, PAD
from tests.decode.tables import generate, log_probs, table

TABLE = table()
KEYS = jax.random.split(jax.random.key(0), 2)
PLAIN = Search(num_beams=3, max_length=6)


def same(found, expected, rows=slice(None)):
  np.testing.assert_array_equal(found.tokens, expected.tokens[rows])
  np.testing.assert_allclose(found.scores, expected.scores[rows], atol=1e-5)


def check_scores(found, logits, search):
  """Scores are those of the tokens, one by one and together."""
  for row, tokens, lengths, scores, positional in zip(np.asarray(logits), *found, strict=True):
    assert (np.diff(scores[lengths > 0]) <= 0).all()
    for x, length, score, each in zip(tokens, lengths, scores, positional, strict=True):
      x = x[:length].tolist()
      expected = [log_probs(row, [BOS, *x[:i]])[token] for i, token in enumerate(x)]
      np.testing.assert_allclose(each[:length], expected, atol=1e-5)
      assert not each[length:].any()
      assert score == pytest.approx(sum(expected) / length**search.length_penalty, abs=1e-5)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"length_penalty": 0.3, "min_length": 2},
    {"normalize_scores": False, "no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "temperature": 0.7},
  ],
  ids=lambda options: ",".join(options) or "plain",
)
def test_enough_beams_find_the_best_of_all_sequences(options):
  logits, allowed = table(1, batch=1, vocab_size=400), range(8)
  words = [x for x in allowed if x not in (PAD, EOS)]
  search = Search(num_beams=300, max_length=3, allowed_range=(4, 8), **options)
  found = generate(logits, search)
  row, power = np.asarray(logits[0]), search.length_penalty * search.normalize_scores
  expected, size = [], search.no_repeat_ngram_size
  for length in range(search.min_length, 4):
    for x in itertools.product(words, repeat=length):
      grams = [(BOS, *x)[i : i + size] for i in range(length + 2 - size)]
      if size and len(set(grams)) < len(grams):
        continue
      steps = [
        log_probs(row / search.temperature, [BOS, *x[:i]], allowed=allowed)[token]
        for i, token in enumerate((*x, EOS))
      ]
      expected.append((sum(steps) / (length + 1) ** power, [*x, EOS]))
  expected.sort(reverse=True)
  assert (found.lengths > 0).sum() == len(expected)
  for (score, x), tokens, value in zip(expected, found.tokens[0], found.scores[0], strict=False):
    assert tokens[: len(x)].tolist() == x
    assert (tokens[len(x) :] == PAD).all()
    assert value == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_scores_are_those_of_the_tokens(length_penalty):
  search = dataclasses.replace(PLAIN, num_beams=5, length_penalty=length_penalty)
  check_scores(generate(TABLE, search), TABLE, search)


def test_an_input_finds_the_same_alone_and_in_a_batch():
  whole = generate(TABLE, PLAIN)
  for i in range(2):
    same(generate(TABLE[i : i + 1], PLAIN), whole, slice(i, i + 1))
  active = jnp.array([False, True])
  found = generate(TABLE, PLAIN, active=active)
  assert not found.lengths[0].any() and (found.scores[0] == -np.inf).all()
  np.testing.assert_array_equal(found.tokens[1], whole.tokens[1])


def test_one_beam_takes_the_likeliest_token():
  found = generate(TABLE, Search(num_beams=1, max_length=8))
  for logits, tokens, length in zip(np.asarray(TABLE), found.tokens, found.lengths, strict=True):
    history = [BOS]
    for token in tokens[0, : length[0]]:
      likely = log_probs(logits, history)
      likely[PAD] = -np.inf
      likely[EOS] = -np.inf if len(history) == 1 else likely[EOS]  # min_length
      assert token == (EOS if len(history) > 8 else likely.argmax())
      history.append(int(token))


def test_prefixes_of_different_lengths():
  prefix = jnp.array([[5, 6, 7], [4, PAD, PAD]])
  found = generate(TABLE, PLAIN, prefix_tokens=prefix)
  assert (found.tokens[0, :, :3] == [5, 6, 7]).all()
  assert (found.tokens[1, :, 0] == 4).all()
  assert len({tuple(x) for x in found.tokens[1].tolist()}) == 3
  check_scores(found, TABLE, PLAIN)
  # The shorter one's search does not depend on the other's length, but for min_length.
  same(generate(TABLE[1:], PLAIN, prefix_tokens=prefix[1:, :1]), found, slice(1, 2))


def test_a_prefix_with_eos_ends_all_hypotheses_with_it():
  found = generate(TABLE, PLAIN, prefix_tokens=jnp.array([[5, EOS], [4, PAD]]))
  assert (found.tokens[0, :, :2] == [5, EOS]).all()
  assert (found.lengths[0] == 2).all()
  check_scores(found, TABLE, PLAIN)


def test_tries_allow_their_answers_only():
  answers = [[4], [4, 5], [6, 7, 8], [6, 7, 5], [3]]
  search = Search(num_beams=5, max_length=6, normalize_scores=False)
  prefix = jnp.array([[8, 8], [7, PAD]])
  for arguments, start in (({}, ([], [])), ({"prefix_tokens": prefix}, ([8, 8], [7]))):
    found = generate(TABLE, search, trie=trie.build(answers), **arguments)
    for tokens, begin in zip(found.tokens.tolist(), start, strict=True):
      expected = [(*begin, *answer, EOS) for answer in answers]
      assert sorted(tuple(x[: x.index(EOS) + 1]) for x in tokens) == sorted(expected)


def test_the_search_ends_when_a_trie_has_no_more_answers():
  search = Search(num_beams=4, max_length=100)
  found = generate(TABLE, search, trie=trie.build([[4], [5, 6]]))
  assert (found.lengths > 0).sum(axis=1).tolist() == [2, 2]
  assert (found.tokens[:, 2:] == PAD).all()


def test_masks_after_the_softmax_leave_probabilities_as_they_are():
  search = Search(num_beams=2, max_length=4, allowed_range=(5, 8), mask_probs=True)
  check_scores(generate(TABLE, search), TABLE, search)


def test_image_codes_end_with_the_last_one_only():
  search = Search(num_beams=2, max_length=5, min_length=5, allowed_range=(5, 8), gen_code=True)
  found = generate(TABLE, search)
  assert (found.tokens[:, :, :5] >= 5).all() and (found.tokens[:, :, :5] < 8).all()
  assert (found.tokens[:, :, 5] == EOS).all()


def test_groups_of_beams_avoid_each_others_tokens():
  # With a penalty this high no group starts as another did.
  search = dataclasses.replace(PLAIN, num_beams=4, diverse_groups=2, diversity_strength=100.0)
  found = generate(TABLE, search)
  for tokens in found.tokens:
    assert len(set(tokens[:, 0].tolist())) >= 2
  # Without one, every group finds what a search with its beams finds.
  search = dataclasses.replace(search, diversity_strength=0.0)
  alone = generate(TABLE, dataclasses.replace(PLAIN, num_beams=2))
  found = generate(TABLE, search)
  for both, one in zip(found.tokens.tolist(), alone.tokens.tolist(), strict=True):
    assert both == [one[0], one[0], one[1], one[1]]


def test_ensembles_average_probabilities():
  search = dataclasses.replace(PLAIN, temperature=0.8)
  one = generate(TABLE, search)
  same(generate((TABLE, TABLE), search), one)
  other = table(1)
  found = generate((TABLE, other), PLAIN)
  for i, (tokens, positional) in enumerate(zip(found.tokens, found.positional_scores, strict=True)):
    for x, scores in zip(tokens.tolist(), positional, strict=True):
      history = [BOS]
      for token, score in zip(x[: x.index(EOS) + 1], scores, strict=False):
        each = [log_probs(np.asarray(model[i]), history)[token] for model in (TABLE, other)]
        assert score == pytest.approx(np.log(np.mean(np.exp(each))), abs=1e-5)
        history.append(token)


def test_samples_of_an_input_do_not_depend_on_the_others():
  search = Search(num_beams=3, max_length=4, sample=True)
  both = generate(TABLE, search, rngs=KEYS)
  for i in range(2):
    one = generate(TABLE[i : i + 1], search, rngs=KEYS[i : i + 1])
    same(one, jax.tree.map(lambda x, i=i: x[i : i + 1], both))
  with pytest.raises(ValueError, match=r"for each of 2 inputs to sample, found shape \(1,\)"):
    generate(TABLE, search, rngs=KEYS[:1])


def test_samples_are_drawn_from_the_model():
  # Every hypothesis is its own draw: the first tokens are distributed as the model says.
  search = Search(num_beams=1000, max_length=2, min_length=0, sample=True)
  found = generate(TABLE, search, rngs=KEYS)
  for logits, tokens in zip(np.asarray(TABLE), found.tokens, strict=True):
    expected = np.exp(log_probs(logits, [BOS]))
    expected[PAD] = 0
    counts = np.bincount(tokens[:, 0], minlength=9)
    assert np.abs(counts / 1000 - expected / expected.sum()).max() < 0.05
  check_scores(found, TABLE, search)


def test_samples_of_the_likeliest_token_are_the_greedy_search():
  greedy = generate(TABLE, Search(num_beams=1, max_length=8))
  for filters in ({"top_k": 1}, {"top_p": 0.01}):
    search = Search(num_beams=3, max_length=8, sample=True, **filters)
    found = generate(TABLE, search, rngs=KEYS)
    for i in range(3):
      np.testing.assert_array_equal(found.tokens[:, i], greedy.tokens[:, 0])
      np.testing.assert_allclose(found.scores[:, i], greedy.scores[:, 0], atol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_beams": 0}, "num_beams >= 1, found 0"),
    ({"min_length": 7, "max_length": 6}, "min_length <= max_length, found 7 > 6"),
    ({"temperature": 0.0}, "temperature > 0, found 0.0"),
    ({"allowed_range": (2, 9)}, "allowed_range"),
    ({"num_beams": 4, "diverse_groups": 3}, "diverse_groups that divide the 4 beams, found 3"),
    ({"top_k": 5}, "sample=True with top_k"),
    ({"sample": True, "diverse_groups": 5}, "sample or diverse_groups, found both"),
  ],
)
def test_contradictions_are_errors(options, message):
  with pytest.raises(ValueError, match=message):
    Search(**options)


def test_what_the_model_cannot_do_is_an_error():
  with pytest.raises(ValueError, match="found 9 beams and 9 tokens"):
    generate(TABLE, Search(num_beams=9, max_length=2))
  with pytest.raises(ValueError, match="allowed_range within the vocabulary of 9"):
    generate(TABLE, Search(num_beams=2, max_length=2, allowed_range=(4, 10)))
  with pytest.raises(ValueError, match="PRNG key"):
    generate(TABLE, Search(num_beams=2, max_length=2, sample=True))
