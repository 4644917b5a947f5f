"""Image codes: the original's probabilities, and draws that nothing beside them changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.decode import beam, codes, sample
from ofa_jax.decode.beam import Search
from ofa_jax.losses_policy import token_log_probs
from ofa_jax.tokenizers.special import BOS, EOS
from tests import image_gen_golden
from tests.ofa_golden import micro_model

SEARCH = Search(
  num_beams=3, max_length=16, min_length=16, gen_code=True, sample=True, top_k=8, temperature=0.9
)
SOURCE = np.array([[0, 5, 8, 25, 2], [0, 28, 2, 1, 1]], np.int32)
UNTOLD = np.array([0, 5, 2, 1, 1], np.int32)


@pytest.fixture(scope="module", autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def compiled(*, pieces=1, guidance=1.0, **changes):
  """What draws with the micro model, of sources and keys; with guidance away from `UNTOLD`."""
  search = dataclasses.replace(SEARCH, **changes)

  @jax.jit
  def run(source, keys):
    model = micro_model()
    if guidance != 1:
      source = jnp.concatenate([source, jnp.broadcast_to(UNTOLD, source.shape)])
    encoded = model.encode(source)
    return codes.generate(
      model, encoded, search=search, rngs=keys, pieces=pieces, guidance=guidance
    )

  return run


def drawn(source=SOURCE, *, keys=None, **changes):
  """What the micro model draws for some sources."""
  keys = jax.random.split(jax.random.key(0), len(source)) if keys is None else keys
  return jax.tree.map(np.asarray, compiled(**changes)(jnp.asarray(source), keys))


def test_probabilities_are_the_originals():
  """Those of all sampling steps, along the tokens that the original drew."""
  given = image_gen_golden.arrays("clip_scst")
  tokens = given["sampling:drawn"]  # [3, 5, 17], the end last

  @jax.jit
  def replayed(source, tokens):
    model = image_gen_golden.model()
    cache = model.start(model.encode(source), max_length=17, hypotheses=5, code=True)

    def step(state, now):
      token, cache = state
      position, following = now
      logits, cache = model.code_step(cache, token, position)
      found = codes.log_probs(logits, temperature=1.0, ends=position >= 16)
      values, places = sample.largest(found, 16)
      return (following, cache), (jnp.exp(values), model.code_ids(places), found[..., EOS])

    begin = (jnp.full(tokens.shape[:2], BOS, jnp.int32), cache)
    _, steps = jax.lax.scan(step, begin, (jnp.arange(17), jnp.moveaxis(tokens, 2, 0)))
    return [jnp.moveaxis(x, 0, 2) for x in steps]

  probs, ids, ends = map(np.asarray, replayed(given["src_tokens"].astype(np.int32), tokens))
  np.testing.assert_array_equal(ids[:, :, :16], given["sampling:topk_ids"])
  np.testing.assert_allclose(probs[:, :, :16], given["sampling:topk_probs"], rtol=2e-5, atol=1e-7)
  np.testing.assert_allclose(ends[:, :, 16], given["sampling:eos_logprob_last_step"], atol=2e-5)


def test_scores_are_those_of_the_model():
  """Of what was drawn, by the whole vocabulary in one pass; and of the filtered eight."""
  found = drawn(pieces=3)
  np.testing.assert_array_equal(found.tokens, drawn().tokens)  # of a cache that grows or not
  model, flat = micro_model(), found.tokens.reshape(6, 17)
  assert (flat[:, -1] == EOS).all() and (found.lengths == 17).all()
  assert ((flat[:, :-1] >= 64) & (flat[:, :-1] < 96)).all()
  previous = np.concatenate([np.zeros((6, 1), np.int32), flat[:, :-1]], axis=1)
  encoded = model.encode(jnp.repeat(jnp.asarray(SOURCE), 3, axis=0))
  logits = model.decode(encoded, previous, code_mask=True) / SEARCH.temperature
  expected = token_log_probs(logits, flat, allowed_range=(64, 96)).reshape(2, 3, 17)
  np.testing.assert_allclose(found.positional_scores, expected, atol=2e-5)
  np.testing.assert_allclose(found.scores, np.mean(expected, axis=2), atol=2e-5)
  assert (np.diff(found.scores, axis=1) <= 0).all()
  inside = logits.reshape(2, 3, 17, -1)[..., 64:96]
  rank = (inside > np.take_along_axis(inside, found.tokens[..., None] - 64, axis=-1)).sum(-1)
  assert 3 < rank[..., :-1].max() < 8  # of the eight likeliest, and not the likeliest alone


def test_they_are_what_the_search_would_draw_from():
  """The search of every other task, with the same model, range and filter, has the same scores."""
  search = dataclasses.replace(SEARCH, allowed_range=(64, 96), num_beams=1, top_k=1)
  model = micro_model()

  @jax.jit
  def searched(source):
    cache = model.start(model.encode(source), max_length=17, hypotheses=1, code=True)
    keys = jax.random.split(jax.random.key(0), 2)
    arguments = {"reorder": model.reorder, "search": search, "batch": 2, "rngs": keys}
    return beam.generate(model.step, cache, **arguments)

  expected, found = searched(jnp.asarray(SOURCE)), drawn(num_beams=1, top_k=1)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_a_picture_depends_on_nothing_beside_it():
  keys = jax.random.split(jax.random.key(0), 2)
  whole = drawn()
  alone = drawn(SOURCE[1:], keys=keys[1:])
  np.testing.assert_array_equal(alone.tokens[0], whole.tokens[1])
  few = drawn(num_beams=2)
  sequences = [{tuple(x) for x in row} for row in whole.tokens.tolist()]
  assert all(set(map(tuple, row)) < sequences[i] for i, row in enumerate(few.tokens.tolist()))
  assert len(set.union(*sequences)) == 6


def test_guidance_goes_away_from_no_caption():
  """Without any weight on the captions all are drawn alike, as without one."""
  keys = jnp.stack([jax.random.key(0)] * 2)
  none = drawn(keys=keys, guidance=0.0)
  np.testing.assert_array_equal(none.tokens[0], none.tokens[1])
  own, untold = drawn(keys=keys), drawn(np.stack([UNTOLD, UNTOLD]), keys=keys)
  assert (own.tokens[0] != own.tokens[1]).any()
  np.testing.assert_array_equal(none.tokens, untold.tokens)


def test_a_forward_of_1024_codes_is_the_originals():
  given = image_gen_golden.arrays("long_code_forward")
  source, previous = (given[name].astype(np.int32) for name in ("src_tokens", "prev_output_tokens"))
  assert previous.shape == (1, 1025)

  @jax.jit
  def forward(source, previous):
    model = image_gen_golden.model(long=True)
    hidden = model.hidden(model.encode(source), previous, code_mask=True)
    few = model.logits(hidden[:, given["positions"]])[0, :, given["columns"]]
    return few, jnp.max(model.logits(hidden), axis=-1)[0], model.code_logits(hidden)

  few, largest, of_codes = forward(source, previous)
  np.testing.assert_allclose(few.T, given["logits_sub"], atol=2e-5)
  np.testing.assert_allclose(largest, given["logits_max"], atol=2e-5)
  targets = jnp.pad(jnp.asarray(previous[:, 1:]), ((0, 0), (0, 1)), constant_values=EOS)
  places = jnp.where(targets < 4, targets, targets - image_gen_golden.FIRST_CODE + 4)
  found = token_log_probs(of_codes, places)[0]
  np.testing.assert_allclose(found, given["target_logprob_constrained"], atol=2e-5)
