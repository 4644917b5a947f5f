"""Visual entailment: rows, masks and answers as the original has them."""

import dataclasses
import json

import numpy as np
import pytest

from ofa_jax.data.tsv import BadRow
from ofa_jax.tasks.base import normalized
from ofa_jax.tasks.snli_ve import SnliVE
from ofa_jax.validation import validate
from tests import ofa_task_files, tiny
from tests.ofa_files import GOLDEN, write_bpe
from tests.tasks import golden_rows

CASES = golden_rows.cases("snli_ve")
LINES = (GOLDEN / "snli_ve" / "snli_ve.tsv").read_text().splitlines()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return str(write_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_originals(name, bpe, tmp_path):
  case = CASES[name]
  options = case["kwargs"]
  task = SnliVE(
    train=(golden_rows.copied("snli_ve", case, tmp_path),),
    columns=golden_rows.columns(case),
    tokenizer=bpe,
    image_size=options["patch_image_size"],
    premise=options["add_caption"],
    prompt=options["prompt_type"],
    max_words=options["max_src_length"],
    source_length=40,
    target_length=48,
  )
  for example, item in zip(golden_rows.check(task, case, field="id"), case["items"], strict=True):
    image = np.asarray(normalized(example["image"][None], mean=task.pixel_mean, std=task.pixel_std))
    stored = item["patch_image"]
    np.testing.assert_allclose(np.mean(image, dtype=np.float64), stored["mean"], atol=1e-7)
    np.testing.assert_allclose(np.std(image, dtype=np.float64, ddof=1), stored["std"], rtol=1e-6)


def read(bpe, folder, changes, *, rng, **options):
  """The example of the first golden row, with other columns, behind the golden ones."""
  columns = LINES[0].split("\t")
  for place, text in changes.items():
    columns[place] = text
  path = folder / "rows.tsv"
  line = "\t".join(c for c in columns if c is not None).encode(errors="surrogateescape")
  path.write_bytes("\n".join(LINES).encode() + b"\n" + line + b"\n")
  task = SnliVE(train=(str(path),), tokenizer=bpe, image_size=16, **options)
  rows = task.examples("train")
  return rows.example(len(rows) - 1, rng)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({5: None}, "expected 6 columns separated by tabs, found 5"),
    ({5: "perhaps"}, "expected a label out of contradiction, entailment, neutral, found 'perhaps'"),
    ({5: "yes"}, "found 'yes'"),
    ({5: ""}, "found ''"),
    ({3: ",.! "}, "the hypothesis is empty"),
    ({4: ""}, "the premise is empty"),
    ({3: "m\udcff"}, "text is not UTF-8"),
    ({2: "!!"}, "broken base64"),
  ],
  ids=range(8),
)
def test_what_cannot_be_used_is_named(bpe, tmp_path, changes, message):
  with pytest.raises(BadRow, match=message) as raised:
    read(bpe, tmp_path, changes, rng=np.random.default_rng(0))
  assert raised.value.name == f"{tmp_path}/rows.tsv:4 252"


def test_evaluations_may_lack_labels_but_not_have_others(bpe, tmp_path):
  example = read(bpe, tmp_path, {5: ""}, rng=None)
  assert not np.any(example["node"])
  with pytest.raises(BadRow, match="found 'perhaps'"):
    read(bpe, tmp_path, {5: "perhaps"}, rng=None)
  assert np.any(read(bpe, tmp_path, {4: ""}, rng=None, premise=False)["node"])


def test_scores_and_the_file_of_results(bpe, tmp_path):
  path = tmp_path / "valid.tsv"
  path.write_text("\n".join(LINES) + "\n")
  task = SnliVE(valid=(str(path),), tokenizer=bpe, image_size=16)
  streams = task.streams("valid")
  assert task.choices.texts == ("no", "yes", "maybe")
  labels = [task.choices.texts.index(answer) for answer in ("no", "maybe", "maybe")]
  assert [line.split("\t")[5] for line in LINES] == ["contradiction", "entailment", "neutral"]
  chosen = {"examples": {"answer": np.array(labels), "valid": np.array([True, True, False])}}
  assert task.score(chosen, streams) == {"snli_score": 0.5}
  assert json.loads(task.results(chosen, streams)["predict.json"]) == [
    {"uniq_id": "252", "answer": "no", "label": "contradiction"},
    {"uniq_id": "253", "answer": "maybe", "label": "neutral"},
  ]


def test_faults_of_a_config_are_told_at_once(tmp_path, shapes):
  files = ofa_task_files.snli_ve(tmp_path, shapes)
  config = tiny.caption_config(shapes)
  changes = {"prompt": "source", "source_length": 128, "target_length": 100, "answer_length": 0}
  task = SnliVE(**files | changes)
  with pytest.raises(ValueError) as raised:
    validate(dataclasses.replace(config, task=task), devices=8)
  for text in (
    "task.prompt: expected one of none, src, prev_output, found 'source'",
    "task.target_length: expected at least",
    "task.answer_length, max_words: expected at least 1, found 0, 80",
  ):
    assert text in str(raised.value)
