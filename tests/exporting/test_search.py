"""The search in NumPy that stands beside an exported OFA finds what the model's own search does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.decode import answers
from ofa_jax.decode.beam import Search
from ofa_jax.exporting.beside import search as exported
from ofa_jax.tokenizers.special import BOS, EOS, PAD

VOCAB, BATCH = 23, 3
RNG = np.random.default_rng(7)
TABLE = RNG.normal(size=(VOCAB, VOCAB)).astype(np.float32)
TABLE[:, EOS] += 1.5  # so that hypotheses end at different lengths
INPUTS = RNG.normal(size=(BATCH, 40, VOCAB)).astype(np.float32)


class Model:
  """Logits out of a table, of the last token, the position and all tokens that were read so far."""

  def start(self, encoded, *, max_length, hypotheses=1, code=False):
    del max_length, code
    return jnp.zeros((encoded.shape[0], hypotheses, VOCAB)), encoded

  def step(self, cache, tokens, position):
    seen, inputs = cache
    seen = seen * 0.7 + jax.nn.one_hot(tokens, VOCAB) @ TABLE
    return seen + inputs[:, position][:, None], (seen, inputs)

  def reorder(self, cache, parents):
    seen, inputs = cache
    return jnp.take_along_axis(seen, parents[..., None], axis=1), inputs


def step(seen, tokens, position):
  seen = np.float32(seen * np.float32(0.7) + TABLE[tokens])
  return seen + INPUTS[:, position][:, None], seen


def reorder(seen, parents):
  return seen[np.arange(BATCH)[:, None], parents]


PROMPTS = np.array([[5, 6, 7], [8, PAD, PAD], [9, 10, PAD]], np.int32)
CASES = {
  "captions": ({"max_length": 7, "no_repeat_ngram_size": 2}, None),
  "greedy": ({"num_beams": 1, "max_length": 6}, None),
  "rules": (
    {
      "num_beams": 3,
      "max_length": 5,
      "min_length": 3,
      "length_penalty": 0.6,
      "temperature": 1.4,
      "unk_penalty": 0.5,
      "no_repeat_ngram_size": 1,
    },
    None,
  ),
  "answers": ({"max_length": 4, "normalize_scores": False}, PROMPTS),
  "long answers": ({"max_length": 6, "normalize_scores": False, "min_length": 6}, PROMPTS),
}


@pytest.mark.parametrize("case", CASES)
def test_hypotheses_are_the_same(case):
  options, prompts = CASES[case]

  @jax.jit
  def ours(inputs):
    return answers.generate(
      [Model()], [inputs], search=Search(**options), batch=BATCH, prompts=prompts
    )

  expected = ours(INPUTS)
  options = exported.Search(**options)
  found = exported.generate(
    step,
    reorder,
    np.zeros((BATCH, options.num_beams, VOCAB), np.float32),
    batch=BATCH,
    search=options,
    prompts=prompts,
  )
  for row in range(BATCH):
    lengths = np.asarray(expected.lengths[row])
    assert len(found[row]) == (lengths > 0).sum() > 0
    for i, hypothesis in enumerate(found[row]):
      tokens = np.asarray(expected.tokens[row, i, : lengths[i]])
      np.testing.assert_array_equal(hypothesis["tokens"], tokens)
      assert tokens[-1] == EOS and BOS not in tokens
      positional = expected.positional_scores[row, i, : lengths[i]]
      np.testing.assert_allclose(hypothesis["positional_scores"], positional, atol=1e-5)
      assert hypothesis["score"] == pytest.approx(float(expected.scores[row, i]), abs=1e-5)


def test_an_answer_has_the_same_room_beside_longer_prompts():
  """Two that go on until they are cut: the wider batch has no more tokens for the shorter one."""
  search = Search(num_beams=2, max_length=4)
  never = np.where(np.arange(VOCAB) == EOS, -50, INPUTS).astype(np.float32)

  def lengths(prompts):
    found = answers.generate(
      [Model()], [never[: len(prompts)]], search=search, batch=len(prompts), prompts=prompts
    )
    return np.asarray(found.lengths)

  wide = jnp.pad(jnp.asarray(PROMPTS), ((0, 0), (0, 5)), constant_values=PAD)
  for prompts in (PROMPTS, wide, PROMPTS[1:2, :1]):
    assert (lengths(jnp.asarray(prompts)) == 4 + 1).all()
