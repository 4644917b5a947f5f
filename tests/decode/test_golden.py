"""The original's generator on the micro model: the same tokens, the same scores."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.decode import beam, candidates, trie
from ofa_jax.decode.beam import Search
from ofa_jax.tokenizers.special import PAD
from tests.ofa_golden import micro_model

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "ofa" / "generation"
CASES = json.loads((GOLDEN / "beam_search.json").read_text())
VQA = json.loads((GOLDEN / "vqa_allcand.json").read_text())
ANSWERS = json.loads((GOLDEN / "trie_answers.json").read_text())["answers"]
NAMES = {  # the original's option -> ours
  "beam": "num_beams",
  "min_len": "min_length",
  "lenpen": "length_penalty",
  "unkpen": "unk_penalty",
  "temperature": "temperature",
  "no_repeat_ngram_size": "no_repeat_ngram_size",
}


@pytest.fixture(scope="module", autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def model():
  return micro_model()


@functools.cache
def encoded(name):
  """(source tokens, the encoder's output) of one of the three inputs."""
  with np.load(GOLDEN / "inputs.npz") as arrays:
    tokens = jnp.asarray(arrays[f"{name}.src_tokens"], jnp.int32)
    image = {}
    if f"{name}.patch_images" in arrays:
      image["image"] = jnp.asarray(arrays[f"{name}.patch_images"].transpose(0, 2, 3, 1))
      image["image_mask"] = jnp.asarray(arrays[f"{name}.patch_masks"])
  return tokens, jax.jit(model().encode)(tokens, **image)


def search(case, tokens):
  """The options of a stored case."""
  options, allowed = case["args"], case["constraint_range"]
  length = options.get("max_len_a", 0) * tokens.shape[1] + options.get("max_len_b", 200)
  return Search(
    **{ours: options[name] for name, ours in NAMES.items() if name in options},
    max_length=int(length),
    normalize_scores=not options.get("unnormalized", False),
    allowed_range=allowed and tuple(map(int, allowed.split(","))),
    gen_code=case["gen_code"],
    mask_probs=case["zero_shot"],
  )


def generate(inputs, search, *, prefix=None, answers=None):
  @jax.jit
  def run(encoded, prefix):
    cache = model().start(
      encoded,
      max_length=search.max_length + 1,
      hypotheses=search.num_beams,
      code=search.gen_code,
    )
    return beam.generate(
      model().step,
      cache,
      reorder=model().reorder,
      search=search,
      batch=len(inputs[0]),
      prefix_tokens=prefix,
      trie=None if answers is None else trie.build(answers),
    )

  prefix = jnp.asarray(prefix, jnp.int32) if prefix and prefix[0] else None
  return jax.tree.map(np.asarray, run(inputs[1], prefix))


def check(found, expected):
  for lengths, tokens, scores, positional, hypotheses in zip(
    found.lengths, found.tokens, found.scores, found.positional_scores, expected, strict=True
  ):
    assert [x[:n].tolist() for x, n in zip(tokens, lengths, strict=True)] == [
      x["tokens"] for x in hypotheses
    ]
    np.testing.assert_allclose(scores, [x["score"] for x in hypotheses], atol=1e-4)
    for each, n, x in zip(positional, lengths, hypotheses, strict=True):
      np.testing.assert_allclose(each[:n], x["positional_scores"], atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_hypotheses_are_the_originals(name):
  case = CASES[name]
  inputs = encoded(case["inputs"])
  found = generate(
    inputs,
    search(case, inputs[0]),
    prefix=case["prefix_tokens"],
    answers=ANSWERS if case["constraint_trie"] else None,
  )
  check(found, case["hypos"])


def test_every_answers_score_is_the_originals():
  # All inputs with all three kinds of prompts in one batch: prompts of 1 to 9 tokens.
  tokens, _ = encoded("mm")
  rows = [(i, case, ids) for case in VQA.values() for i, ids in enumerate(case["decoder_prompts"])]
  assert len({len(ids) for _, _, ids in rows}) > 3 and len(rows) == 3 * len(tokens)
  prompts = np.full((len(rows), max(len(ids) for _, _, ids in rows)), PAD, np.int32)
  for row, (_, _, ids) in zip(prompts, rows, strict=True):
    row[: len(ids)] = ids
  answers = [case["answer_ids"] for case in VQA.values()]
  assert answers[0] == answers[1] == answers[2]
  plan = candidates.plan(answers[0])

  @jax.jit
  def score(encoded, places, prompts):
    encoded = jax.tree.map(lambda x: x[places] if len(x) > 1 else x, encoded)
    return candidates.score_answers(model(), encoded, prompts=prompts, plan=plan)

  scores = np.asarray(score(encoded("mm")[1], np.array([i for i, _, _ in rows]), prompts))
  for row, (i, case, _) in zip(scores[:, : plan.num_answers], rows, strict=True):
    np.testing.assert_allclose(row, case["allcand_scores"][i], rtol=1e-6, atol=1e-5)
    assert case["answers"][row.argmax()] == case["predicts"][i]


@pytest.mark.parametrize("prompt", VQA)
def test_the_search_for_answers_is_the_originals(prompt):
  case = VQA[prompt]
  options = Search(num_beams=5, max_length=20, normalize_scores=False)
  found = generate(encoded("mm"), options, prefix=case["prefix_tokens"], answers=case["answer_ids"])
  check(found, case["beam_hypos_prefix_tokens"])
