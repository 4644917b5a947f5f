"""Every kind of faulty row is told with its file and line, and counted by what is wrong."""

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from ofa_jax import evaluate, validate_data
from ofa_jax.config import Eval
from ofa_jax.configs import (
  ofa_caption,
  ofa_gigaword,
  ofa_glue,
  ofa_imagenet,
  ofa_muge,
  ofa_ocr,
  ofa_refcoco,
  ofa_snli_ve,
  ofa_vqa,
)
from ofa_jax.data.quickstart import digits as write_digits
from tests import tiny


def jpeg():
  file = io.BytesIO()
  noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
  Image.fromarray(noise).save(file, "JPEG", quality=95)
  return file.getvalue()


IMAGE = base64.b64encode(jpeg()).decode()
TRUNCATED = base64.b64encode(jpeg()[:-600]).decode()
TEXT = base64.b64encode(b"this is no picture").decode()

CAPTION = ["1", "1", "a cat", "", IMAGE]
QUESTION = ["1", "1", "what?", "1.0|!+yes", "", IMAGE]
REGION = ["1", "1", "cat", "1,2,3,4", IMAGE]
ENTAILMENT = ["1", "1", IMAGE, "a cat", "a cat .", "neutral"]
SENTENCE = ["1", "a cat", "1"]
CLASS = [IMAGE, "1", "yes"]
READ = ["1", IMAGE, "cat"]
ARTICLE = ["a red cat", "cat"]


def changed(row, at, value):
  return [*row[:at], value, *row[at + 1 :]]


@pytest.mark.parametrize(
  "recipe, row, bad, reason",
  [
    (ofa_caption, CAPTION, changed(CAPTION, 4, IMAGE[:-3]), "broken base64"),
    (ofa_caption, CAPTION, changed(CAPTION, 4, TEXT), "not a JPEG, PNG, WEBP, GIF, BMP file"),
    (ofa_caption, CAPTION, changed(CAPTION, 4, TRUNCATED), "cannot be decoded"),
    (ofa_caption, CAPTION, changed(CAPTION, 2, b"\xd6\xd0\xce\xc4"), "caption is not UTF-8"),
    (ofa_caption, CAPTION, changed(CAPTION, 2, " ! "), "the caption is empty"),
    (ofa_caption, CAPTION, CAPTION[1:], "expected 5 columns separated by tabs, found 4"),
    (ofa_vqa, QUESTION, changed(QUESTION, 3, "1.0|!+perhaps"), "perhaps"),
    (ofa_vqa, QUESTION, changed(QUESTION, 3, "yes"), "expected answers as confidence"),
    (ofa_vqa, QUESTION, changed(QUESTION, 3, ""), "there is no answer to learn"),
    (ofa_vqa, QUESTION, changed(QUESTION, 2, " "), "the question is empty"),
    (ofa_refcoco, REGION, changed(REGION, 3, "1,2,40,4"), "reaches outside of the picture"),
    (ofa_refcoco, REGION, changed(REGION, 3, "3,2,3,4"), "has no area"),
    (ofa_refcoco, REGION, changed(REGION, 3, "1,2,3"), "of four numbers"),
    (ofa_refcoco, REGION, changed(REGION, 2, ""), "the text is empty"),
    (ofa_snli_ve, ENTAILMENT, changed(ENTAILMENT, 5, "yes"), "expected a label out of"),
    (ofa_snli_ve, ENTAILMENT, changed(ENTAILMENT, 4, ""), "the premise is empty"),
    (ofa_glue, SENTENCE, changed(SENTENCE, 2, "2"), "expected a label out of"),
    (ofa_glue, SENTENCE, changed(SENTENCE, 1, ""), "the sentence is empty"),
    (ofa_imagenet, CLASS, changed(CLASS, 2, "cat"), "is not among those to choose from"),
    (ofa_imagenet, CLASS, changed(CLASS, 2, ""), "there is no class to learn"),
    (ofa_imagenet, CLASS, CLASS[:2], "expected 3 columns separated by tabs, found 2"),
    (ofa_imagenet, CLASS, changed(CLASS, 0, TEXT), "not a JPEG, PNG, WEBP, GIF, BMP file"),
    (ofa_ocr, READ, changed(READ, 2, " "), "there is no text to learn"),
    (ofa_ocr, READ, changed(READ, 2, b"\xce\xc4"), "text is not UTF-8"),
    (ofa_ocr, READ, changed(READ, 1, TRUNCATED), "cannot be decoded"),
    (ofa_muge, CAPTION, changed(CAPTION, 2, "&&"), "the caption is empty"),
    (ofa_muge, CAPTION, changed(CAPTION, 2, b"\xd6\xd0"), "caption is not UTF-8"),
    (ofa_gigaword, ARTICLE, ["", "cat"], "the article is empty"),
    (ofa_gigaword, ARTICLE, [b"\xd6\xd0", "cat"], "text is not UTF-8"),
    (ofa_gigaword, ARTICLE, ["a red cat"], "expected 2 columns separated by tabs, found 1"),
  ],
)
def test_a_faulty_row(recipe, row, bad, reason, tokenizer, tmp_path, capsys):
  good, faulty = tmp_path / "good.tsv", tmp_path / "faulty.tsv"
  good.write_bytes(_line(row))
  faulty.write_bytes(_line(row) + _line(bad) + _line(row))
  answers = tmp_path / "answers.txt"
  answers.write_text("yes\nno\n")
  config = recipe.get_config()
  evaluate.set_tokenizer(config, tokenizer)
  fields = {"train": (str(faulty),), "valid": (str(good),), "test": (), "image_size": 32}
  listed = {"answers": str(answers)}
  fields |= {ofa_caption: {"frequencies": None}, ofa_vqa: listed, ofa_imagenet: listed}.get(
    recipe, {}
  )
  fields |= {"image_size": 64} if recipe is ofa_ocr else {}
  for task in (config.task, *(evaluation.task for evaluation in config.evals)):
    for name, value in fields.items():
      setattr(task, name, value)

  assert validate_data.validate_data(config) == 1

  told = capsys.readouterr()
  first, kind, last = told.out.splitlines()
  assert re.match(rf"{re.escape(str(faulty))}:2[ :]", first) and reason in first
  assert kind.startswith("1 x ") and last == "4 rows checked, 1 faults"
  assert "train: 3 rows checked, 1 faulty" in told.err
  assert "valid: 1 rows checked, 0 faulty" in told.err


def _line(columns):
  return b"\t".join(c if isinstance(c, bytes) else c.encode() for c in columns) + b"\n"


@pytest.fixture
def regions(tokenizer, tmp_path):
  """A config whose three splits are 200 rows each; every 50th box is empty."""
  config = ofa_refcoco.get_config()
  for split in ("train", "valid", "test"):
    rows = [
      changed(changed(REGION, 0, str(i)), 3, f"1,1,{1 if i % 50 == 49 else 9},{9 + i % 5}")
      for i in range(200)
    ]
    (tmp_path / f"{split}.tsv").write_bytes(b"".join(map(_line, rows)))
    setattr(config.task, split, (str(tmp_path / f"{split}.tsv"),))
  config.task.tokenizer, config.task.image_size = tokenizer, 16
  return config


def test_a_number_of_threads_that_no_machine_has_is_told_at_once(regions, capsys):
  with pytest.raises(ValueError, match="1 to 1,024, found 1000000"):
    validate_data.validate_data(dataclasses.replace(regions, workers=1_000_000))
  assert capsys.readouterr().out == ""


def test_faults_come_in_order_and_by_kind(regions, capsys):
  """Also those of a split that nothing reads, which is there."""
  assert validate_data.validate_data(dataclasses.replace(regions, workers=3)) == 12
  told = capsys.readouterr().out.splitlines()
  folder = regions.task.train[0].rpartition("/")[0]
  assert [line.partition(" ")[0] for line in told[:12]] == [
    f"{folder}/{split}.tsv:{line}"
    for split in ("train", "valid", "test")
    for line in (50, 100, 150, 200)
  ]
  assert told[12:] == [
    "12 x expected a box with xN < xN and yN < yN",
    "600 rows checked, 12 faults",
  ]


def test_faults_go_to_the_standard_output_beside_a_bar(regions, monkeypatch, capsys):
  """Where the error output is a terminal and the faults are sent to a file."""
  monkeypatch.setenv("FORCE_COLOR", "1")
  assert validate_data.validate_data(regions) == 12
  told = capsys.readouterr()
  assert len(told.out.splitlines()) == 14 and "Checking train" in told.err


def test_the_number_of_threads_changes_nothing(regions):
  (part,) = [part for part in validate_data.parts(regions) if part.name == "train"]
  faults = [list(validate_data.faults(part, workers=workers)) for workers in (1, 4)]
  assert faults[0] == faults[1] and len(faults[0]) == 200


def test_missing_files(regions, capsys):
  """One that is read is a fault, and the others are still checked; one that is not read is none."""
  regions.task.train = ("/nowhere/train.tsv",)
  regions.task.test = ("/nowhere/test.tsv",)
  assert validate_data.validate_data(regions) == 5
  told = capsys.readouterr().out.splitlines()
  assert told[0].startswith("train: Expected data files, found 1 of 1 missing: /nowhere/train.tsv")
  assert told[-1] == "200 rows checked, 5 faults"


def test_a_row_at_which_a_run_would_end_is_a_fault_too(regions, capsys):
  class Fragile(type(regions.task)):
    def example(self, row, rng):
      if row["id"] == "7" and rng is not None:
        raise OverflowError("too much")
      return super().example(row, rng)

  fields = {f.name: getattr(regions.task, f.name) for f in dataclasses.fields(regions.task)}
  config = dataclasses.replace(regions, task=Fragile(**fields), evals=())
  config.task.test = config.task.valid = ()
  assert validate_data.validate_data(config) == 5
  assert "row 7 of train: OverflowError: too much" in capsys.readouterr().out.splitlines()


@pytest.fixture
def pairs(tmp_path):
  """Chinese-CLIP's files of the digits, few of them, to be broken."""
  data = write_digits(tmp_path / "digits")
  for split in ("train", "valid"):
    lines = (data / f"{split}_imgs.tsv").read_text().splitlines(True)[:20]
    (data / f"{split}_imgs.tsv").write_text("".join(lines))
    ids = {line.partition("\t")[0] for line in lines}
    texts = [json.loads(x) for x in (data / f"{split}_texts.jsonl").read_text("utf-8").splitlines()]
    for text in texts:
      text["image_ids"] = [i for i in text["image_ids"] if str(i) in ids]
    kept = "".join(json.dumps(text) + "\n" for text in texts if text["image_ids"])
    (data / f"{split}_texts.jsonl").write_text(kept)
  return data


def test_pairs(pairs, capsys):
  """A picture that several captions have is told once."""
  config = tiny.config(pairs)
  config = dataclasses.replace(config, evals=(Eval(name="valid", task=config.task),))
  assert validate_data.validate_data(config) == 0
  assert "valid/text" in capsys.readouterr().err

  path = pairs / "train_imgs.tsv"
  lines = path.read_text().splitlines()
  number = lines[3].partition("\t")[0]
  lines[3] = f"{number}\t{TEXT}"
  path.write_text("\n".join(lines) + "\n")
  texts = pairs / "train_texts.jsonl"
  more = json.dumps({"text_id": 10**6, "text": "同一张", "image_ids": [int(number)]})
  texts.write_text(texts.read_text() + more + "\n")
  lost = [f'{{"text_id": {i}, "text": "x", "image_ids": [-{i}]}}\n' for i in range(1, 8)]
  (pairs / "valid_texts.jsonl").write_text("".join(lost))

  assert validate_data.validate_data(config) == 8
  told = capsys.readouterr().out.splitlines()
  assert told[0].startswith(f"{path}:4 {number}: not a JPEG")
  valid = pairs / "valid_texts.jsonl"
  assert told[1:8] == [
    f"{valid}:{i} {i}: names the image '-{i}', which is missing" for i in range(1, 8)
  ]

  valid.write_text('{"text_id": 1}\n[]\n')
  assert validate_data.validate_data(config) == 3
  told = capsys.readouterr().out.splitlines()
  assert told[1:3] == [f"{valid}:1: has no field 'text'", f"{valid}:2: is list, not an object"]


def test_rows_of_a_table(pairs, tmp_path, capsys):
  rows = "".join(f"{i}.jpg,一\n" for i in range(7))
  (tmp_path / "bad.csv").write_text(f"filepath,title\n{rows}a,b,c\n", encoding="utf-8")
  config = tiny.config(pairs)
  config.task.train = (str(tmp_path / "bad.csv"),)
  assert validate_data.validate_data(config) == 8
  told = capsys.readouterr().out.splitlines()
  assert told[0].startswith(f"{tmp_path}/bad.csv:9 (3 columns instead of 2): a row not like")
  assert told[7].startswith(
    f"{tmp_path}/bad.csv:8 ({tmp_path}/6.jpg): a row whose image is missing"
  )
