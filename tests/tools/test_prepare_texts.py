"""Tiny data sets of texts alone in the layouts of their makers become OFA's files."""

import pytest

from ofa_jax.prepare_data import prepare_data
from tests import forked
from tests.tools.layouts import read

GLUE = {
  "cola": (
    "CoLA",
    {
      "train": "gj04\t1\t\tA \"red cat.\ngj04\t0\t*\tcat A.\n",
      "test": "index\tsentence\n0\ta cat\n",
    },
    [["gj04", 'A "red cat.', "1"], ["gj04", "cat A.", "0"]],
    [["0", "a cat", ""]],
  ),
  "mnli": (
    "MNLI",
    {
      "train": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tcontradiction\n",
      "dev": "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tentailment\n1\ta\tb\t-\n",
      "test": "index\tsentence1\tsentence2\n0\ta\tb\n",
    },
    [["a", "b", "2"]],
    [["a", "b", ""]],
  ),
  "mrpc": (
    "MRPC",
    {
      "train": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta cat\tthe \"cat\n",
      "test": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\ta cat\tthe cat\n",
    },
    [["a cat", 'the "cat', "1"]],
    [["a cat", "the cat", ""]],
  ),
  "qnli": (
    "QNLI",
    {
      "train": "index\tquestion\tsentence\tlabel\n0\twhat?\ta cat\tnot_entailment\n",
      "test": "index\tquestion\tsentence\n0\twhat?\ta cat\n",
    },
    [["0", "what?", "a cat", "not_entailment"]],
    [["0", "what?", "a cat", ""]],
  ),
  "qqp": (
    "QQP",
    {
      "train": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n5\t1\t2\ta?\tb?\t0\nbroken\n",
      "test": "id\tquestion1\tquestion2\n0\ta?\tb?\n",
    },
    [["5", "1", "2", "a?", "b?", "0"]],
    [["0", "", "", "a?", "b?", ""]],
  ),
  "rte": (
    "RTE",
    {
      "train": "index\tsentence1\tsentence2\tlabel\n0\ta cat\tcat\tentailment\n",
      "test": "index\tsentence1\tsentence2\n0\ta cat\tcat\n",
    },
    [["0", "a cat", "cat", "entailment"]],
    [["0", "a cat", "cat", ""]],
  ),
  "sst2": (
    "SST-2",
    {"train": "sentence\tlabel\na cat \t1\n", "test": "index\tsentence\n0\ta cat\n"},
    [["a cat", "1"]],
    [["a cat", ""]],
  ),
}  # fmt: skip


@pytest.mark.parametrize("part", GLUE)
def test_glue(part, tmp_path, check):
  folder, files, learnt, asked = GLUE[part]
  source, out = tmp_path / "glue", tmp_path / "out"
  (source / folder).mkdir(parents=True)
  matched = "_matched" if part == "mnli" else ""
  named = {"train": "train", "dev": f"dev{matched}", "test": f"test{matched}"}
  for split, name in named.items():
    (source / folder / f"{name}.tsv").write_text(files.get(split, files["train"]))

  prepare_data("glue", source, out)

  assert read(out / f"{part}_data/{part}_train.tsv") == learnt
  assert len(read(out / f"{part}_data/{part}_dev.tsv")) == len(learnt)
  assert read(out / f"{part}_data/{part}_test.tsv") == asked
  assert check("ofa_glue", f"{part},base") == 0


def test_a_test_row_of_glue_is_never_left_out(tmp_path):
  (tmp_path / "RTE").mkdir()
  (tmp_path / "RTE/test.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n1\ta\t\n")
  with pytest.raises(ValueError, match=r"test\.tsv, whose number .* line 3 a row with an empty"):
    prepare_data("glue", tmp_path, tmp_path / "out")
  assert not list((tmp_path / "out").rglob("*.tsv"))


@pytest.mark.parametrize("check", ["learnt"], indirect=True)
def test_gigaword(tmp_path, check):
  source, out = tmp_path / "gigaword", tmp_path / "out"
  source.mkdir()
  for split in ("train", "dev", "test"):
    (source / f"{split}.src.txt").write_text("a red cat <unk>\n\nthe box ,\n")
    (source / f"{split}.tgt.txt").write_text("cat\nnone\nbox #\n")

  rows = prepare_data("gigaword", source, out, limit=2)

  assert rows == {f"gigaword_data/gigaword_{split}.tsv": 2 for split in ("train", "dev", "test")}
  assert read(out / "gigaword_data/gigaword_dev.tsv") == [
    ["a red cat <unk>", "cat"], ["the box ,", "box #"]
  ]  # fmt: skip
  assert check("ofa_gigaword", "base") == 0

  (source / "train.tgt.txt").write_text("cat\n")
  with pytest.raises(ValueError, match=r"tgt\.txt ends before line 2"):
    prepare_data("gigaword", source, out)


def test_commands(tmp_path, tokenizer):
  """Both commands as a person gives them, a good data set and then one with a fault."""
  source, out = tmp_path / "gigaword", tmp_path / "out"
  source.mkdir()
  for split in ("train", "dev"):
    (source / f"{split}.src").write_text("a red cat\n")
    (source / f"{split}.tgt").write_text("cat\n")
  config = ["--config=configs/ofa_gigaword.py:base", f"--config.task.tokenizer={tokenizer}"]
  environment = {"OFA_JAX_DATA": str(out)}
  prepare = ["tools/prepare_data.py", "--layout=gigaword", f"--source={source}", f"--output={out}"]
  bad = tmp_path / "bad.tsv"
  bad.write_text("a cat\t\n")
  cases = [
    {"command": prepare},
    {"command": ["tools/validate_data.py", *config], "environment": environment},
    {
      "command": ["validate_data", *config, f"--config.task.train=('{bad}',)"],
      "environment": environment,
    },
  ]
  (prepared, _), (good, said), (faulty, told) = forked.run(cases)
  assert (prepared, good, faulty) == (0, 0, 1), told
  assert "2 rows checked, 0 faults" in said
  assert f"{bad}:1 a cat: the summary is empty" in told and "2 rows checked, 1 faults" in told
