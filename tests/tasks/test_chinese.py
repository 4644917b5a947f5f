"""Captions in Chinese: rows and references as the original has them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from ofa_jax.tasks.caption import Caption
from tests.ofa_files import GOLDEN, check_rows, write_chinese

FOLDER = GOLDEN / "chinese"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  return str(write_chinese(tmp_path_factory.mktemp("words")))


@pytest.fixture
def task(words, tmp_path):
  file = str(shutil.copy(FOLDER / "caption.tsv", tmp_path))
  return Caption(
    train=(file,),
    valid=(file,),
    columns=(0, 1, 4, 2),
    tokenizer=words,
    image_size=48,
    source_length=16,
    target_length=64,
  )


@pytest.mark.parametrize("case", ["train", "val", "scst"])
def test_rows_are_the_originals(case, task):
  golden = json.loads((FOLDER / f"caption_{case}.json").read_text())
  task = dataclasses.replace(task, max_words=golden["kwargs"]["max_tgt_length"])
  rng = np.random.default_rng(0) if case == "train" else None
  rows, examples = check_rows(task, golden, rng=rng, ddof=0)
  assert len(rows) == len(examples) == 6


def test_captions_are_compared_as_in_the_original(task):
  golden = json.loads((FOLDER / "caption_validation.json").read_text())
  joined = dataclasses.replace(task, joined=True)
  streams = joined.streams("valid")
  tokens = np.full((6, 20), 1, np.int32)
  for row, ids in zip(tokens, golden["hyp_tokens"], strict=True):
    row[: len(ids)] = ids
  predictions = {"examples": {"tokens": tokens, "valid": np.ones(6, bool)}}
  captions = joined._captions(predictions, streams)
  assert [caption for _, caption, _ in captions] == golden["hyps"]
  assert [references for _, _, references in captions] == golden["refs"]
  several = task._captions(predictions, streams)[2][2]
  assert several == [
    "ａｂｃ 商 店 2023 年 sale",
    "第 二 句 ： 价 格 999 元",
    "third ref with english",
  ]
  alone = [x for x in task._captions(predictions, streams) if len(x[2]) == 1]
  assert alone == [x for x in captions if x[0] != 2]
  scores = task.score(predictions, streams)
  assert 0 < scores["rouge_l"] < 1 and 0 < scores["cider"] < 10


def test_an_exact_caption_is_exact(task):
  streams, tokens = task.streams("valid"), np.full((6, 64), 1, np.int32)
  for i, row in enumerate(tokens):
    target = streams["examples"].example(i, None)["target"]
    row[:] = target
  valid = np.array([True, True, False, True, True, True])  # the third has three captions
  scores = task.score({"examples": {"tokens": tokens, "valid": valid}}, streams)
  assert scores["exact"] == 1 and scores["rouge_l"] == pytest.approx(1)


def test_results_are_told_as_the_original_tells_them(task):
  golden = json.loads((FOLDER / "caption_decoding.json").read_text())
  tokens = np.full((4, 20), 1, np.int32)
  for row, ids in zip(tokens, golden["tokens"], strict=True):
    row[: len(ids)] = ids
  told = task.told({"examples": {"tokens": tokens, "valid": np.ones(4, bool)}})
  assert list(told.values()) == [line["caption"] for line in golden["caption_task"]]
