"""Optical character recognition: rows, pictures and metrics as the original has them."""

import dataclasses
import functools
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from ofa_jax.config import Config, Optim
from ofa_jax.data import ocr as data
from ofa_jax.data.tsv import BadRow
from ofa_jax.scoring import ocr as scoring
from ofa_jax.tasks.ocr import OCR
from ofa_jax.validation import validate
from tests.ofa_files import GOLDEN, check_rows, write_bpe, write_chinese
from tests.ofa_golden import micro_config

FOLDER = GOLDEN / "ocr"
EVALUATION = json.loads((FOLDER / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  root = tmp_path_factory.mktemp("words")
  return {"bert": str(write_chinese(root / "zh")), "gpt2": str(write_bpe(root / "en"))}


class Replay:
  """A generator that gives the places that the original drew."""

  def __init__(self, draws):
    self._draws = list(draws)

  def integers(self, end):
    draw = next(x for x in self._draws if x["high"] == end - 1)
    return draw["value"]


@pytest.mark.parametrize("case", ["zh", "zh_len6", "en", "zh_document"])
def test_rows_are_the_originals(case, words, tmp_path):
  golden = json.loads((FOLDER / f"{case}.json").read_text())
  options = golden["kwargs"]
  colours = {}
  if options.get("imagenet_default_mean_and_std"):
    colours = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
  task = OCR(
    train=(str(shutil.copy(FOLDER / "ocr.tsv", tmp_path)),),
    tokenizer=words[golden["bpe"]],
    image_size=options["patch_image_size"],
    max_words=options["max_tgt_length"],
    document=bool(options.get("is_document")),
    **colours,
  )
  for i, item in enumerate(golden["items"]):
    one = golden | {"items": [item]}
    rows, _ = check_rows(task, one, rng=Replay(item["random_draws"]), first=i, ddof=0)
    assert rows.row(i)["id"] == item["id"]
  assert len(golden["items"]) == len(rows) == 5


def test_texts_are_the_originals():
  for case in EVALUATION["normalisation"]:
    assert data.simplified(case["text"]) == case["simplified"]
    assert data.learnt(case["text"], chinese=True, most=99) == case["nfkc"].lower()
  assert data.learnt("ＡＢＣ 「½」 漢字", chinese=True, most=9) == "abc “1⁄2”"
  assert data.learnt("The  QUICK brown fox", chinese=False, most=3) == "the quick brown"


def test_metrics_are_the_originals(words, tmp_path):
  lines = (FOLDER / "ocr.tsv").read_text().split("\n")
  picture, cases = lines[0].split("\t")[1], EVALUATION["cases"]
  path = tmp_path / "valid.tsv"
  path.write_text("".join(f"{i}\t{picture}\tx\n" for i in range(len(cases))), encoding="utf-8")
  task = OCR(valid=(str(path),), tokenizer=words["bert"], image_size=64)
  tokens = np.full((len(cases), 10), 1, np.int32)
  references = []
  for row, case in zip(tokens, cases, strict=True):
    row[: len(case["hyp_tokens"])] = case["hyp_tokens"]
    references.append(task.words.decode(case["ref_tokens"]).replace(" ", ""))
  told = task.told({"examples": {"tokens": tokens, "valid": np.ones(len(cases), bool)}})
  expected = EVALUATION["evaluate.py"]["without_target_results"]
  assert list(told.values()) == [line["ocr"] for line in expected]

  class Known(OCR):
    def _reference(self, row):
      return references[row.index]

  known = Known(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
  predictions = {"examples": {"tokens": tokens, "valid": np.ones(len(cases), bool)}}
  streams = known.streams("valid")
  scores = known.score(predictions, streams)
  assert round(scores["acc"], 4) == EVALUATION["valid_step"]["acc_rounded_4"]
  assert round(scores["ned"], 4) == EVALUATION["valid_step"]["ned_rounded_4"]
  assert json.loads(known.results(predictions, streams)["predict.json"]) == [
    {"image_id": line["image_id"], "ocr": line["ocr"]} for line in expected
  ]
  for case in cases:
    assert scoring.edit_distance(case["hyp"], case["ref"]) == case["levenshtein"]


def test_references_are_what_the_model_can_say(words, tmp_path):
  task = OCR(
    valid=(str(shutil.copy(FOLDER / "ocr.tsv", tmp_path)),), tokenizer=words["bert"], image_size=64
  )
  tokens = np.full((5, 20), 1, np.int32)
  said = ["图片上的文字,abc123", "hello word", "", "2023年12月31日¥99.5", "x"]
  for row, text in zip(tokens, said, strict=True):
    ids = [*task.encode(text), 2]
    row[: len(ids)] = ids
  valid = np.array([True, True, True, True, False])
  scores = task.score({"examples": {"tokens": tokens, "valid": valid}}, task.streams("valid"))
  assert scores["acc"] == 2 / 4
  assert scores["ned"] == pytest.approx(1 - (0 + 1 / 10 + 1 + 0) / 4)


def test_edit_distances_by_hand():
  @functools.cache
  def slow(a, b):
    if not a or not b:
      return len(a) + len(b)
    return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

  rng = np.random.default_rng(0)
  for _ in range(200):
    one, other = ("".join(rng.choice(list("ab字"), rng.integers(7))) for _ in range(2))
    assert scoring.edit_distance(one, other) == slow(one, other), (one, other)
  assert scoring.normalized_similarity([""], [""]) == 1
  assert scoring.normalized_similarity(["ab", ""], ["ab", "c"]) == 0.5


def test_pictures_stand_in_the_middle_of_an_evaluation():
  pixels = np.random.default_rng(0).integers(0, 256, (20, 100, 3), dtype=np.uint8)
  square = data.placed(Image.fromarray(pixels), 128)
  line = np.asarray(Image.fromarray(pixels).resize((128, 64), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(square[32:96], line)
  assert (square[:32] == line[0]).all() and (square[96:] == line[-1]).all()
  tall = data.placed(Image.fromarray(pixels.transpose(1, 0, 2)), 128)
  assert (tall[:, :32] == tall[:, 32:33]).all() and tall.shape == (128, 128, 3)
  page = data.placed_document(Image.fromarray(pixels), 480)
  whole = np.asarray(Image.fromarray(pixels).resize((1920, 64), Image.Resampling.BICUBIC))
  for k in range(4):
    part = page[112 + 64 * k : 176 + 64 * k]
    np.testing.assert_array_equal(part, whole[:, 480 * k : 480 * (k + 1)])


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    (("7", "{picture}"), "expected 3 columns separated by tabs, found 2"),
    (("7", "{picture}", " "), "there is no text to learn"),
    (("7", "{picture}", "字\udcff"), "text is not UTF-8"),
    (("7", "xx", "字"), "broken base64|not a"),
  ],
  ids=range(4),
)
def test_what_cannot_be_used_is_named(words, tmp_path, columns, message):
  good = (FOLDER / "ocr.tsv").read_bytes()
  picture = good.split(b"\t")[1].decode()
  line = "\t".join(columns).replace("{picture}", picture).encode(errors="surrogateescape")
  path = tmp_path / "rows.tsv"
  path.write_bytes(good.rstrip(b"\n") + b"\n" + line + b"\n")
  rows = OCR(train=(str(path),), tokenizer=words["bert"], image_size=64).examples("train")
  with pytest.raises(BadRow, match=message) as raised:
    rows.example(len(rows) - 1, np.random.default_rng(0))
  assert raised.value.name == f"{path}:6 7"


def test_faults_of_a_config_are_told_at_once(words, tmp_path, monkeypatch):
  task = OCR(train=("x.tsv",), tokenizer="OFA-base", image_size=64)
  config = Config(model=micro_config(), task=task, batch_size=8, steps=1, optim=Optim(lr=1e-3))
  validate(config, devices=8)
  wrong = dataclasses.replace(task, document=True, image_size=48, max_words=0)
  with pytest.raises(ValueError) as raised:
    validate(dataclasses.replace(config, task=wrong), devices=8)
  for text in (
    "task.image_size: expected 480 with task.document",
    "task.image_size: expected at least 64",
    "task.max_words: expected at least 1, found 0",
  ):
    assert text in str(raised.value)
  data._converter.cache_clear()
  monkeypatch.setitem(sys.modules, "opencc", None)
  with pytest.raises(ValueError, match=r"Expected OpenCC.*pip install opencc-python"):
    task.examples("train")
  data._converter.cache_clear()
