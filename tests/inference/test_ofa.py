"""An OFA from Python, on the micro model: its arrays are the original's, its texts make sense."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

import ofa_jax
from ofa_jax.decode import trie
from ofa_jax.inference import runner as ofa_runner
from tests.ofa_directory import save_micro
from tests.ofa_files import GOLDEN
from tests.ofa_golden import error, golden, inputs

CASES = json.loads((GOLDEN / "generation" / "beam_search.json").read_text())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return save_micro(tmp_path_factory.mktemp("ofa"))


@pytest.fixture(scope="module")
def model(directory):
  return ofa_jax.load_from_name(directory)[0]


@pytest.fixture(scope="module")
def arrays():
  """The stored inputs of the generator: token ids, images, which of them are there."""
  with np.load(GOLDEN / "generation" / "inputs.npz") as found:
    image = found["mm.patch_images"].transpose(0, 2, 3, 1)
    return found["mm.src_tokens"], image, found["mm.patch_masks"]


@pytest.fixture(scope="module")
def pictures():
  rng = np.random.default_rng(0)
  return [Image.fromarray(rng.integers(0, 256, (40, 80, 3), np.uint8)) for _ in range(3)]


def test_a_model_says_in_a_line_what_it_is(model, directory):
  size = f"image_size={model.image_size}, vocab_size={model.config.vocab_size}, precision='fp32'"
  assert repr(model) == f"OFAModel(num_params={model.num_params:_}, {size})"
  ensemble = ofa_jax.load_from_name([directory, directory])[0]
  assert repr(ensemble) == f"OFAModel(num_params={ensemble.num_params:_}, {size}, models=2)"


def test_logits_are_the_originals(model):
  for name in ("mm_batch", "code_mixed"):
    stored = golden("micro", name)
    given = inputs(stored)
    found = model.forward(
      *(np.asarray(given[name]) for name in ("tokens", "decoder_tokens")),
      images=np.asarray(given["image"]),
      image_mask=np.asarray(given["image_mask"]),
      code_mask=np.asarray(given["code_mask"]) if "code_mask" in given else None,
    )
    assert error(found, stored["logits"]) < 1e-4


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("caption_beam5_ngram3", {"no_repeat_ngram_size": 3}),
    ("beam5_prefix", {"no_repeat_ngram_size": 3, "prefix_tokens": [[10, 20, 30], [11, 21], [12]]}),
    (
      "beam4_range_bins",
      {"num_beams": 4, "min_length": 4, "max_length": 4, "allowed_range": (96, 112)},
    ),
  ],
)
def test_generated_tokens_are_the_originals(model, arrays, name, options):
  found = model.generate_tokens(*arrays, **options)
  for hypotheses, expected in zip(found, CASES[name]["hypos"], strict=True):
    assert [x["tokens"].tolist() for x in hypotheses] == [x["tokens"] for x in expected]
    for x, y in zip(hypotheses, expected, strict=True):
      assert x["score"] == pytest.approx(y["score"], abs=1e-4)
      np.testing.assert_allclose(x["positional_scores"], y["positional_scores"], atol=1e-4)


def test_float64_gives_the_originals_tokens_too(directory, arrays):
  with jax.enable_x64(True):
    model, _ = ofa_jax.load_from_name(directory, precision="fp64")
    stored = golden("micro", "mm_batch")
    given = {k: np.asarray(v) for k, v in inputs(stored).items()}
    logits = model.forward(
      given["tokens"],
      given["decoder_tokens"],
      images=given["image"],
      image_mask=given["image_mask"],
    )
    found = model.generate_tokens(*arrays, no_repeat_ngram_size=3)
  assert logits.dtype == np.float64
  assert error(logits, stored["logits"]) < 1e-6
  for hypotheses, expected in zip(found, CASES["caption_beam5_ngram3"]["hypos"], strict=True):
    assert [x["tokens"].tolist() for x in hypotheses] == [x["tokens"] for x in expected]


def test_any_number_of_inputs_gives_the_same(model, arrays, monkeypatch):
  monkeypatch.setattr(ofa_runner, "MAX_BATCH", 1)  # on 8 devices: batches of 8
  tokens, image, mask = arrays
  whole = model.generate_tokens(tokens, image, mask, max_length=4)
  many = [np.tile(x, (4, *[1] * (x.ndim - 1))) for x in arrays]
  for rows in (0, 1, 12):
    found = model.generate_tokens(*(x[:rows] for x in many), max_length=4)
    assert len(found) == rows
    for i, hypotheses in enumerate(found):
      for x, y in zip(hypotheses, whole[i % 3], strict=True):
        np.testing.assert_array_equal(x["tokens"], y["tokens"])


def test_samples_depend_on_the_seed(model, arrays):
  def sample(seed):
    found = model.generate_tokens(
      np.tile(arrays[0][:1], (9, 1)), max_length=4, num_beams=4, sample=True, top_k=20, seed=seed
    )
    return [x["tokens"].tolist() for hypotheses in found for x in hypotheses]

  assert sample(0) == sample(0) != sample(1)
  assert len({str(x) for x in sample(0)}) > 4  # devices and rows draw their own


def test_tries_restrict_what_is_generated(model, arrays):
  found = model.generate_tokens(*arrays, trie=trie.build([[5, 6], [7]]), max_length=4)
  assert {tuple(x["tokens"].tolist()) for row in found for x in row} == {(5, 6, 2), (7, 2)}


def test_lists_give_lists_with_scores(model, pictures):
  captions, scores = model.caption(pictures, return_scores=True)
  assert [type(x) for x in captions] == [str] * 3
  assert scores.shape == (3,) and (scores < 0).all()
  assert model.caption(pictures) == captions
  ready = np.stack([model.preprocess(x) for x in pictures])
  assert model.caption(ready) == model.caption([np.asarray(x) for x in pictures]) == captions
  assert model.caption([]) == []
  texts = model.generate([None, pictures[0]], ["the dog", "what does the image describe?"])
  assert texts[1] == captions[0]
  assert model.generate(None, ["the dog"]) == texts[:1]


def test_answers_are_free_or_chosen(model, pictures):
  questions = ["what is it", "does the text describe the image?", "the dog?"]
  free, scores = model.answer(pictures, questions, return_scores=True)
  assert len(free) == 3 and (scores < 0).all()
  # The first answer is what the decoder says after the question, of which nothing is left.
  ids = [0, *model.tokenizer.encode(" what is it?"), 2]
  image = np.asarray(pictures[0].resize((64, 64), Image.Resampling.BICUBIC))[None]
  (hypotheses,) = model.generate_tokens(
    [ids],
    image,
    np.array([True]),
    prefix_tokens=[ids[1:-1]],
    max_length=16 + 30,
    normalize_scores=False,
  )
  best = hypotheses[0]
  assert free[0] == model.tokenizer.decode(best["tokens"][len(ids) - 2 :]).strip()
  assert scores[0] == pytest.approx(best["positional_scores"][len(ids) - 2 :].sum(), abs=1e-4)
  choices = ["the dog", "a dog", "the image", "what"]
  chosen, scores = model.answer(pictures, questions, choices, return_scores=True)
  assert set(chosen) <= set(choices) and (scores <= 0).all()
  # Alone, in another order, or without the prompt for the decoder.
  assert model.answer(pictures[2:], questions[2:], choices[::-1]) == chosen[2:]
  assert set(model.answer(pictures, questions, choices, prompt_decoder=False)) <= set(choices)
  # Objects stand behind the question.
  seen = [["the dog", "man"], [], ["image"]]
  with_objects = model.answer(pictures, questions, choices, objects=seen, return_scores=True)[1]
  assert np.all(with_objects != scores)
  with pytest.raises(ValueError, match="Expected 3 objects, found 1"):
    model.answer(pictures, questions, choices, objects=seen[:1])


def test_labels_and_classes(model, pictures):
  labels, scores = model.entail(pictures, ["the dog", "a", "what"], return_scores=True)
  assert set(labels) <= {"entailment", "neutral", "contradiction"} and scores.shape == (3,)
  assert len(model.entail(pictures[:1], ["the dog"], ["the image"])) == 1
  names, scores = model.classify(pictures, ["a dog", "the image"], return_scores=True)
  assert set(names) <= {"a dog", "the image"}
  assert (np.exp(scores) >= 0.5).all()  # the better one of two


def test_boxes_are_in_pixels_of_the_given_image(model, pictures, monkeypatch):
  def search(rows, search, **_):
    assert (search.min_length, search.max_length) == (4, 4)
    bins = [96 + np.array([0, 3, 15, 9]), np.array([96, 3, 96, 96])]
    return [
      [
        {"tokens": np.append(x, 2), "score": -i, "positional_scores": np.full(5, -0.1)}
        for i, x in enumerate(order)
      ]
      for order in (bins, bins[::-1], bins[1:])
    ]

  monkeypatch.setattr(model, "_search", search)
  first, firsts = model.ground(pictures, ["the dog"] * 3, return_scores=True)
  assert [np.isnan(box).all() for box in first] == [False, True, True]
  assert firsts.tolist() == [0, -np.inf, -np.inf]
  boxes, scores = model.ground(pictures, ["the dog"] * 3, any_box=True, return_scores=True)
  np.testing.assert_array_equal(first[0], boxes[0])
  # 64 of the 512 pixels that the 16 bins divide are the image, 80 wide and 40 high before.
  expected = np.array([0, 3 / 15 * 512 / 64 * 40, 512 / 64 * 80, 9 / 15 * 512 / 64 * 40])
  np.testing.assert_allclose(boxes[0], expected, rtol=1e-6)
  np.testing.assert_allclose(boxes[1], expected, rtol=1e-6)
  assert np.isnan(boxes[2]).all()
  assert scores.tolist() == [0, -1, -np.inf]


def test_several_models_are_an_ensemble(directory, model, arrays):
  both, _ = ofa_jax.load_from_name([directory, directory])
  assert both.num_params == 2 * model.num_params
  for found, expected in zip(
    both.generate_tokens(*arrays, max_length=4),
    model.generate_tokens(*arrays, max_length=4),
    strict=True,
  ):
    for x, y in zip(found, expected, strict=True):
      np.testing.assert_array_equal(x["tokens"], y["tokens"])
      assert x["score"] == pytest.approx(y["score"], abs=1e-5)
  with pytest.raises(ValueError, match="one model to score answers with, found 2"):
    both.classify([np.zeros((4, 4, 3), np.uint8)], ["a", "the"])


def test_bf16_is_close(directory, model, arrays):
  half, _ = ofa_jax.load_from_name(directory, precision="bf16")
  target = np.array([[0, 5, 6]] * 3)
  found, expected = (x.forward(arrays[0], target, *arrays[1:]) for x in (half, model))
  assert found.dtype == np.float32
  assert 1e-4 < error(found, expected) < 0.1


def test_long_texts_are_cut_with_a_warning(model, pictures):
  text = " ".join(["the dog"] * 41)
  with pytest.warns(UserWarning, match="Cut a text of 82 words to the first 80"):
    cut = model.entail(pictures[:1], [text], return_scores=True)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    whole = model.entail(pictures[:1], [text[: -len(" the dog")]], return_scores=True)
  assert cut[0] == whole[0]
  with pytest.warns(UserWarning, match="Cut a text of 2000 tokens to 1022"):
    model.generate(None, [" the dog" * 1000], max_length=2)


def test_what_is_missing_is_an_error(model, pictures):
  with pytest.raises(ValueError, match="found 2 without: numbers 0, 2"):
    model.caption([None, pictures[0], None])
  with pytest.raises(ValueError, match="a list of images, found none"):
    model.answer(None, ["what?"])
  with pytest.raises(ValueError, match="questions with words in them, found 1 empty: numbers 1"):
    model.answer(pictures[:2], ["what?", " "])
  with pytest.raises(ValueError, match="at least one answer to choose from, found none"):
    model.answer(pictures[:1], ["what?"], [])
  with pytest.raises(ValueError, match="2 images, one for each text, found 1"):
    model.ground(pictures[:1], ["a", "b"])
  with pytest.raises(ValueError, match="a list of questions, found one str"):
    model.answer(pictures[:1], "what?")
  with pytest.raises(ValueError, match="a list of images, found one Image"):
    model.caption(pictures[0])
  with pytest.raises(ValueError, match="a list of images, found none"):
    model.caption(None)


def test_wrong_arrays_are_errors(model, arrays):
  tokens, image, mask = arrays
  for bad in (
    tokens[0],
    tokens.astype(np.float32),
    np.zeros((1, 1025), int),
    np.zeros((1, 0), int),
  ):
    with pytest.raises(ValueError, match="Expected source_tokens"):
      model.generate_tokens(bad)
  with pytest.raises(ValueError, match="Expected ids 0 to 111 in source_tokens, found 5, 112"):
    model.generate_tokens([[5, 112]])
  with pytest.raises(ValueError, match="Expected images uint8 or float32"):
    model.generate_tokens(tokens, image[:2])
  with pytest.raises(ValueError, match=r"Expected image_mask bool\[3\]"):
    model.generate_tokens(tokens, image, mask[:2])
  with pytest.raises(ValueError, match="Expected decoder_tokens of 3 inputs, found 1"):
    model.forward(tokens, [[0]])
  with pytest.raises(ValueError, match="found 112 beams and 112 tokens"):
    model.generate_tokens(tokens, num_beams=112, max_length=2)


def test_a_damaged_model_is_an_error(directory, tmp_path):
  with pytest.raises(ValueError, match="image_size 4"):
    ofa_jax.load_from_name([], image_size=4)
  (tmp_path / "ofa.pt").write_bytes(b"PK\x03\x04 and no more")
  pytest.importorskip("torch")
  with pytest.raises(ValueError, match=r"ofa\.pt"):
    ofa_jax.load_from_name(tmp_path / "ofa.pt")
  described = json.loads((directory / "config.json").read_text())
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text(json.dumps(described | {"width": 64}))
  with pytest.raises(ValueError, match="expected the parameters, found no checkpoint"):
    ofa_jax.load_from_name(tmp_path / "model")
  shutil.copytree(directory / "params", tmp_path / "model" / "params")
  with pytest.raises(ValueError, match="expected the parameters of config"):
    ofa_jax.load_from_name(tmp_path / "model")
