"""Texts with hidden words: what is asked in training, by the row's number, and by the API."""

import dataclasses
import json

import numpy as np
import pytest

from ofa_jax.config import Config
from ofa_jax.data import prompts
from ofa_jax.data.tsv import BadRow
from ofa_jax.inference import inputs
from ofa_jax.tasks import infilling
from ofa_jax.tasks.infilling import Infilling
from ofa_jax.tokenizers.ofa import OFATokenizer
from tests import tiny

TEXTS = ("the red dot is left of the blue bar", "The  blue bar is below the red dot", "")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  folder = tmp_path_factory.mktemp("infilling")
  texts = [prompts.whole_text(text.lower()) for text in TEXTS]
  OFATokenizer.train(texts * 3, vocab_size=400, num_bins=8).save(folder)
  table = folder / "texts.tsv"
  table.write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS)))
  return Infilling(
    train=(str(table),),
    valid=(str(table),),
    tokenizer=str(folder),
    source_length=32,
    target_length=16,
  )


def text_of(task, ids):
  """Ids with what is hidden, as a person reads them."""
  return task.words.decode(ids).strip()


def test_words_are_hidden_anew_in_training_and_by_the_row_in_evaluations(task):
  rows = task.examples("train")
  rngs = [None, None, *map(np.random.default_rng, range(20))]
  examples = [rows.example(0, rng) for rng in rngs]
  sources = [text_of(task, x["source"]) for x in examples]
  assert sources[0] == sources[1] and len(set(sources)) > 10
  hidden = []
  for source, example in zip(sources, examples, strict=True):
    assert source.startswith('what is the complete text of "') and source.endswith('"?')
    assert "<mask>" in source
    assert text_of(task, example["target"]) == TEXTS[0]
    left = source.split('"')[1].replace("<mask>", "").split()
    assert set(left) <= set(TEXTS[0].split())
    hidden.append(9 - len(left))
  assert set(hidden) <= {0, 1, 2, 3} and np.mean(hidden) > 2  # a third, where no spans meet


def test_a_mask_may_be_any_word_instead(task):
  other = dataclasses.replace(task, random=1.0)
  tokens = task.encode(f" {TEXTS[0]}")
  hidden = other.hide(tokens, np.random.default_rng(0))
  assert task.words.mask not in hidden and len(hidden) < len(tokens) + 3
  assert hidden != task.hide(tokens, np.random.default_rng(0))


def test_the_api_asks_as_training_does(task):
  source = task.examples("valid").example(1, None)["source"]
  text = text_of(task, source).split('"')[1].strip()
  assert "<mask>" in text
  asked = inputs.asked(
    infilling.ANSWERING,
    {"text": [text]},
    None,
    tokenizer=task.words,
    image_size=32,
    vocab_size=task.words.vocab_size,
    image_needed=False,
  )
  np.testing.assert_array_equal(asked["source"][0], source[: asked["source"].shape[1]])


def test_what_comes_back_is_compared_with_the_text(task):
  streams = task.streams("valid")
  tokens = np.ones((3, 16), np.int32)
  for i, text in enumerate((TEXTS[0], "the blue bar is above the red dot", "")):
    ids = [*task.encode(f" {text}"), 2]
    tokens[i, : len(ids)] = ids
  predictions = {"examples": {"tokens": tokens, "valid": np.array([True, True, False])}}
  scores = task.score(predictions, streams)
  assert scores["exact"] == 0.5 and 0.5 < scores["bleu4"] < 1
  assert sorted(task.right(predictions, streams).values()) == [0, 1]
  told = json.loads(task.results(predictions, streams)["predict.json"])
  assert [row["id"] for row in told] == ["0", "1"] and told[0]["text"] == TEXTS[0]
  assert "<mask>" in told[0]["asked"]


def test_faults_are_told(task):
  model = dataclasses.replace(tiny.OFA, vocab_size=task.words.vocab_size, num_bins=8)
  config = Config(model=model, task=task, batch_size=8, steps=1)
  assert task.check(config) == []
  broken = dataclasses.replace(task, ratio=1.5, mean=0.0, page=3)
  faults = "\n".join(broken.check(config))
  assert "task.ratio: expected a share, found 1.5" in faults and "found 0.0, 256" in faults
  assert "task.page: expected 0, as this task has no page, found 3" in faults


def test_an_empty_text_is_a_bad_row(task):
  rows = task.examples("train")
  with pytest.raises(BadRow, match="the text is empty"):
    rows.example(2, None)
