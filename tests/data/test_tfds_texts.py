"""GLUE by its name at TensorFlow Datasets, made of files as its server has them."""

import re

import numpy as np
import pytest

from ofa_jax.data.tfds_texts import TfdsTexts, is_tfds
from ofa_jax.tasks.glue import Glue
from tests import ofa_task_files

MNLI = """index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t\
sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label
"""
PAIRS = [
  ("A man sits.", "He is at rest.", "entailment"),
  ("A man sits.", "He eats.", "neutral"),
  ("Two dogs", "No dog is there.", "contradiction"),
]


@pytest.fixture
def tfds_glue(tmp_path, monkeypatch):
  """TensorFlow Datasets, which downloads GLUE from a folder."""
  tfds = pytest.importorskip("tensorflow_datasets")
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "prepared"))
  folder = tmp_path / "downloaded"
  cola, mnli = folder / "CoLA", folder / "MNLI"
  for path in (cola, mnli):
    path.mkdir(parents=True)
  for split, lines in {
    "train": 'gj04\t1\t\tThe dog sits.\ngj04\t0\t*\tDog the sit.\nbc81\t1\t\tIt "is" so.\n',
    "dev": "gj04\t0\t*\tMan a the.\n",
    "test": "index\tsentence\n0\tOne is here.\n1\tHere two.\n2\t \n",
  }.items():
    (cola / f"{split}.tsv").write_text(lines)
  rows = [f"{i}" + "\tx" * 7 + f"\t{a}\t{b}\tx\t{y}\n" for i, (a, b, y) in enumerate(PAIRS)]
  for name in ("train", "dev_matched", "dev_mismatched"):
    (mnli / f"{name}.tsv").write_text(MNLI + "".join(rows))
  header = MNLI.rsplit("\t", 2)[0] + "\n"
  for name in ("test_matched", "test_mismatched"):
    (mnli / f"{name}.tsv").write_text(header + "".join(x.rsplit("\t", 2)[0] + "\n" for x in rows))
  fake = lambda self, urls: str(folder)  # noqa: E731
  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fake)
  return tfds


def test_glue_by_name(tfds_glue, tmp_path):
  files = ofa_task_files.glue("cola", tmp_path) | dict.fromkeys(
    ("train", "valid", "test"), ("tfds:glue/cola",)
  )
  task = Glue(**files)
  rows = task.examples("train")
  told = {rows.row(i)["id"]: (rows.row(i)["sentence"], rows.row(i)["label"]) for i in range(3)}
  assert told == {
    "0": ("The dog sits.", "acceptable"),
    "1": ("Dog the sit.", "unacceptable"),
    "2": ('It "is" so.', "acceptable"),
  }
  good = next(i for i in range(3) if rows.row(i)["id"] == "1")
  example = rows.example(good, np.random.default_rng(0))
  assert task.words.decode(example["target"]).strip() == "no"
  assert "dog the sit." in task.words.decode(example["source"])
  assert len(task.examples("valid")) == 1

  streams = task.streams("test")
  tests = streams["examples"]
  order = [int(tests.row(i)["id"]) for i in range(3)]
  assert sorted(order) == [0, 1, 2] and {tests.row(i)["label"] for i in range(3)} == {""}
  # The server counts as the files do, whatever order the data set has stored.
  answers = np.array([("no", "yes").index("yes" if n == 1 else "no") for n in order])
  predictions = {"examples": {"answer": answers, "valid": np.ones(3, bool)}}
  assert task.choices.texts == ("no", "yes") and task.score(predictions, streams) == {}
  assert task.results(predictions, streams)["CoLA.tsv"] == b"index\tprediction\n0\t0\n1\t1\n2\t0\n"


def test_labels_go_by_their_names(tfds_glue, tmp_path):
  """TensorFlow Datasets counts MNLI's labels otherwise than the original's files."""
  files = ofa_task_files.glue("mnli", tmp_path)
  task = Glue(**files | {"valid": ("tfds:glue/mnli",), "train": ("tfds:glue/mnli:train[:2]",)})
  rows = task.examples("valid")
  expected = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}
  for i in range(3):
    row = rows.row(i)
    assert (row["premise"], row["hypothesis"], row["label"]) == PAIRS[int(row["id"])]
    target = rows.example(i, np.random.default_rng(0))["target"]
    assert task.words.decode(target).strip() == expected[row["label"]]
  assert len(task.examples("train")) == 2


def test_what_is_wrong_is_told(tfds_glue):
  assert is_tfds("tfds:glue/cola") and not is_tfds("data/tfds.tsv")
  with pytest.raises(ValueError, match="'gleu'"):
    TfdsTexts("gleu", split="train", columns={"text": "sentence"})
  with pytest.raises(ValueError, match=re.escape("found no text, but sentence, label, idx")):
    TfdsTexts("glue/cola", split="train", columns={"text": "text"})
  with pytest.raises(ValueError, match="Expected one data set of TensorFlow Datasets and no file"):
    TfdsTexts.of(("tfds:glue/cola", "a.tsv"), columns={}, split="train")
  rows = TfdsTexts.of(("tfds:glue/cola:validation",), columns={"text": "sentence"}, split="train")
  assert len(rows) == 1 and rows.text(0, "text") == "Man a the."
  assert rows.name(0) == "tfds:glue/cola/validation[0]"
