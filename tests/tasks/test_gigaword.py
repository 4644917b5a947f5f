"""Summaries: rows as the original has them, noise, scores and the file of results."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from ofa_jax.data.tsv import BadRow
from ofa_jax.tasks.gigaword import Gigaword
from ofa_jax.validation import validate
from tests import ofa_task_files, tiny
from tests.ofa_files import write_bpe, write_chinese
from tests.tasks import golden_rows

CASES = golden_rows.cases("gigaword")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return str(write_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def chinese(tmp_path_factory):
  return str(write_chinese(tmp_path_factory.mktemp("chinese")))


def of(name, bpe, folder, **changes):
  """The task of a golden setting, with room for its rows."""
  case = CASES[name]
  options = case["kwargs"]
  most = options["max_src_length"]
  return Gigaword(
    train=(golden_rows.copied("gigaword", case, folder),),
    columns=golden_rows.columns(case),
    tokenizer=bpe,
    max_words=most,
    max_target_words=options["max_tgt_length"],
    source_length=min(most + 2, 40),
    target_length=16,
    **changes,
  )


@pytest.mark.parametrize("name", ["gigaword", "gigaword.trunc"])
def test_rows_are_the_originals(name, bpe, tmp_path):
  task = of(name, bpe, tmp_path)
  golden_rows.check(task, CASES[name])
  rows = task.examples("train")
  assert [rows.row(i)["summary"].lower() for i in range(2)] == [
    item["target_str"] for item in CASES[name]["items"]
  ]


def test_chinese_rows_are_the_originals(chinese, tmp_path):
  """The article comes first: of a long one what is asked is lost."""
  task = dataclasses.replace(of("chinese", chinese, tmp_path), source_length=66)
  golden_rows.check(task, CASES["chinese"])
  asked = "请用一个句子简单总结上文："
  whole = [item["source"][:-1] for item in CASES["chinese"]["items"]]
  ends = [source[-13:] == task.encode(asked) for source in whole]
  assert ends == [True, True, False] and len(whole[2]) == 65


def test_noise_is_in_what_the_decoder_sees_alone(bpe, tmp_path):
  """The original's draws are torch's: what they may be is the same, not what they are."""
  case = CASES["gigaword.noise"]
  task = of("gigaword.noise", bpe, tmp_path, noise=case["kwargs"]["noise_ratio"])
  rows = task.examples("train")
  changed, drawn, total = 0, set(), 0
  for seed in range(60):
    for i, item in enumerate(case["items"]):
      example = rows.example(i, np.random.default_rng(seed))
      assert example["source"].tolist() == golden_rows.filled(item["source"], 40)
      assert example["target"].tolist() == golden_rows.filled(item["target"], 16)
      seen, clean = example["previous"].tolist(), [0, *item["target"][:-1]]
      assert seen[0] == 0 and not set(seen[len(clean) :]) - {1}
      others = {token for token, known in zip(seen, clean, strict=False) if token != known}
      changed, total, drawn = changed + len(others), total + len(clean) - 1, drawn | others
      assert len(item["prev_output_tokens"]) == len(clean)
  assert 0.4 < changed / total < 0.6
  assert min(drawn) >= 4 and max(drawn) < 50265 and max(drawn) > 49000
  again = rows.example(0, np.random.default_rng(3))["previous"]
  np.testing.assert_array_equal(again, rows.example(0, np.random.default_rng(3))["previous"])
  # Nothing is drawn in evaluations, where answers are generated.
  assert rows.example(0, None)["previous"].tolist()[1:] == golden_rows.filled(
    case["items"][0]["target"][:-1], 15
  )


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("an article", "expected 2 columns separated by tabs, found 1"),
    (" - \ta summary", "the article is empty"),
    ("an article\t", "the summary is empty"),
    ("an \udcff article\ta summary", "text is not UTF-8"),
  ],
)
def test_what_cannot_be_used_is_named(bpe, tmp_path, line, message):
  path = tmp_path / "rows.tsv"
  good = "a b\tc\nd e\tf\n"
  path.write_bytes((good + line + "\n").encode(errors="surrogateescape"))
  rows = Gigaword(train=(str(path),), tokenizer=bpe).examples("train")
  with pytest.raises(BadRow, match=message) as raised:
    rows.example(2, np.random.default_rng(0))
  assert raised.value.name.startswith(f"{path}:3")


def test_scores_and_the_file_of_results(bpe, tmp_path):
  path = tmp_path / "valid.tsv"
  path.write_text("x y\tThe Dog Sits\nz\tlost\nx\t\nz\tthe cats\n")
  task = Gigaword(valid=(str(path),), tokenizer=bpe, bootstrap=True)
  streams = task.streams("valid")
  tokens = np.full((4, 8), 1, np.int32)
  for row, text in zip(tokens, ("the dog", "lost", "x", 'the " cat'), strict=True):
    ids = [*task.encode(text), 2]
    row[: len(ids)] = ids
  valid = np.array([True, False, True, True])
  scores = task.score({"examples": {"tokens": tokens, "valid": valid}}, streams)
  assert set(scores) == set(task.metrics)
  assert scores["rouge1_recall"] == pytest.approx(100 * (2 / 3 + 1) / 2)
  assert json.loads(
    task.results({"examples": {"tokens": tokens, "valid": valid}}, streams)["predict.json"]
  ) == [
    {"id": 0, "hyp": "the dog", "ref": "the dog sits"},
    {"id": 2, "hyp": "x", "ref": ""},
    {"id": 3, "hyp": "the `` cat", "ref": "the cats"},
  ]


def test_the_missing_package_is_told_before_anything_is_compiled(bpe, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "rouge_score", None)
  with pytest.raises(ValueError, match="pip install rouge-score"):
    Gigaword(valid=("x.tsv",), tokenizer=bpe).streams("valid")


def test_faults_of_a_config_are_told_at_once(tmp_path, shapes):
  task = Gigaword(**ofa_task_files.gigaword(tmp_path), noise=1.5, max_words=0)
  with pytest.raises(ValueError) as raised:
    validate(dataclasses.replace(tiny.caption_config(shapes), task=task), devices=8)
  assert "task.noise: expected 0 <= share < 1, found 1.5" in str(raised.value)
  assert "max_target_words: expected at least 1, found 0, 64" in str(raised.value)
