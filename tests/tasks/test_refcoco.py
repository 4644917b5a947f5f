"""Visual grounding: rows, boxes and accuracy as the original has them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.config import Config, Optim
from ofa_jax.data import boxes
from ofa_jax.data.tsv import BadRow
from ofa_jax.decode.beam import Hypotheses
from ofa_jax.tasks.refcoco import RefCOCO, read_box
from ofa_jax.validation import validate
from tests.ofa_directory import write_words
from tests.ofa_files import GOLDEN, check_rows, write_bpe, write_chinese
from tests.ofa_golden import micro_config

FOLDER = GOLDEN / "refcoco"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  root = tmp_path_factory.mktemp("words")
  return {
    "english": str(write_bpe(root / "english")),
    "chinese": str(write_chinese(root / "chinese")),
    "micro": str(write_words(root / "micro")),
  }


@pytest.mark.parametrize("case", ["128", "512", "chinese_64", "chinese_512"])
def test_rows_are_the_originals(case, words, tmp_path):
  golden = json.loads((FOLDER / f"{case}.json").read_text())
  language = "chinese" if case.startswith("chinese") else "english"
  file = {"chinese": "chinese.tsv", "english": "refcoco.tsv"}[language]
  task = RefCOCO(
    train=(str(shutil.copy(FOLDER / file, tmp_path)),),
    columns=tuple(map(int, golden["selected_cols"].split(","))),
    tokenizer=words[language],
    image_size=golden["kwargs"]["patch_image_size"],
    box_size=golden["kwargs"]["max_image_size"],
    max_words=golden["kwargs"]["max_src_length"],
    source_length=40,
  )
  rows, examples = check_rows(
    task, golden, rng=np.random.default_rng(0), ddof=int(language == "english")
  )
  assert len(rows) == len(examples) == 3
  for i, (example, item) in enumerate(zip(examples, golden["items"], strict=True)):
    assert rows.row(i)["id"] == item["id"]
    ratios = [item["w_resize_ratio"], item["h_resize_ratio"]]
    np.testing.assert_array_equal(np.float32(task.image_size) / example["size"], ratios)


def test_boxes_and_accuracy_are_the_originals():
  stored = json.loads((GOLDEN / "generation" / "refcoco_eval.json").read_text())
  ratios = np.stack([stored["w_resize_ratios"], stored["h_resize_ratios"]], axis=1)
  told = boxes.from_bins(np.array(stored["bins"]), num_bins=16, scale=1 / ratios)
  right = np.array(stored["region_coords"], np.float32)
  assert boxes.hits(told, right).tolist() == [bool(x) for x in stored["acc@0.5"]]


def test_overlaps_by_hand():
  one = np.float32([[0, 0, 10, 10]] * 6)
  others = np.float32(
    [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.9], [20, 20, 30, 30], [5, 5, 15, 15], [np.nan] * 4]
  )
  expected = [1, 0.5, 0.49, 0, 25 / 175, 0]
  np.testing.assert_allclose(boxes.overlaps(one, others), expected, atol=1e-6)
  assert boxes.hits(one, others).tolist() == [True, True, False, False, False, False]
  apart = np.float32([[10, 10, 0, 0]])  # both sides negative: their product is no area
  assert not boxes.hits(apart, apart).any()


def test_bins_and_boxes_there_and_back():
  drawn = np.random.default_rng(0).uniform(0, 1, (50, 4)).astype(np.float32)
  size = np.float32([640, 427])
  drawn *= np.tile(size, 2)
  bins = boxes.to_bins(drawn, num_bins=1000, scale=512 / size)
  again = boxes.from_bins(bins, num_bins=1000, scale=size / 512)
  assert np.abs(again - drawn).max() <= 640 / 999 / 2 * 1.001
  halves = np.float32([0.5, 1.5, 2.5, 3.5]) * 512 / 999
  assert boxes.to_bins(halves, num_bins=1000, scale=np.ones(2)).tolist() == [0, 2, 2, 4]


PICTURE = (FOLDER / "refcoco.tsv").read_text().split("\n")[0].split("\t")[1]  # 100 x 80 pixels


def read(task, line, folder, *, rng):
  """The example of one line that stands behind good ones."""
  path = folder / "rows.tsv"
  path.write_bytes((FOLDER / "refcoco.tsv").read_bytes() + line + b"\n")
  rows = dataclasses.replace(task, train=(str(path),)).examples("train")
  return rows.example(len(rows) - 1, rng)


@pytest.mark.parametrize(
  ("text", "box", "message"),
  [
    ("dog", "10,10,40", "expected a box x0,y0,x1,y1 of four numbers, found '10,10,40'"),
    ("dog", "10,10,40,x", "of four numbers, found '10,10,40,x'"),
    ("dog", "10,10,40,nan", "of four numbers, found '10,10,40,nan'"),
    ("dog", "10,10,40,1e999", "of four numbers"),
    ("dog", "10,10,100.2,40", "reaches outside of the picture of 100 x 80 pixels"),
    ("dog", "10,10,40,81", "reaches outside of the picture"),
    ("dog", "-1,10,40,40", "reaches outside of the picture"),
    ("dog", "10,10,10,40", "found '10,10,10,40', which has no area"),
    ("dog", "40,10,10,50", "which has no area"),
    ("dog", "200,10,300,50", "reaches outside"),
    ("dog", " ", "there is no box to learn"),
    (",!", "10,10,40,40", "the text is empty"),
    ("d\udcff", "10,10,40,40", "text is not UTF-8"),
    ("dog", "10,10,40,40\tmore", "expected 4 columns separated by tabs, found 5"),
  ],
)
def test_what_cannot_be_used_is_named(words, tmp_path, text, box, message):
  task = RefCOCO(columns=(0, 1, 2, 3), tokenizer=words["english"], image_size=16)
  line = "\t".join(("7", PICTURE, text, box)).encode(errors="surrogateescape")
  with pytest.raises(BadRow, match=message) as raised:
    read(task, line, tmp_path, rng=np.random.default_rng(0))
  assert raised.value.name == f"{tmp_path}/rows.tsv:4 7"


def test_boxes_may_be_clipped_and_rounded_ones_are_no_fault(words, tmp_path):
  task = RefCOCO(columns=(0, 1, 2, 3), tokenizer=words["english"])
  bins = {}
  for box in ("0,0,100,80", "0,-0.03,100.04,80.01"):
    line = "\t".join(("7", PICTURE, "dog", box)).encode()
    bins[box] = read(task, line, tmp_path, rng=np.random.default_rng(0))["target"].tolist()
  first = task.words.bin_id(0)
  assert set(map(tuple, bins.values())) == {(first, first, first + 999, first + 999, 2)}
  clipping = dataclasses.replace(task, clip=True)
  line = "\t".join(("7", PICTURE, "dog", "-20,40,150,90")).encode()
  target = read(clipping, line, tmp_path, rng=None)["target"]
  assert (target - first).tolist()[:4] == [0, 500, 999, 999]
  with pytest.raises(BadRow, match="which has no area"):
    outside = "\t".join(("7", PICTURE, "dog", "120,10,150,40")).encode()
    read(clipping, outside, tmp_path, rng=None)


def hypotheses(tokens, scores):
  tokens = jnp.asarray(tokens)
  lengths = jnp.sum(tokens != 1, axis=2)
  return Hypotheses(
    tokens=tokens,
    lengths=lengths,
    scores=jnp.asarray(scores, jnp.float32),
    positional_scores=jnp.zeros(tokens.shape),
  )


def test_the_best_hypothesis_counts_or_the_best_box_and_the_files_are_the_originals(
  words, tmp_path
):
  lines = (FOLDER / "refcoco.tsv").read_text().splitlines()
  rows = [line.split("\t") for line in lines] + [["9", PICTURE, "cat", ""]]
  rows[2][3] = "2.5,2.5,7.5,7.5"
  path = tmp_path / "valid.tsv"
  path.write_text("".join("\t".join(row) + "\n" for row in rows))
  task = RefCOCO(valid=(str(path),), columns=(0, 1, 2, 3), tokenizer=words["micro"], image_size=64)
  first = task.words.bin_id(0)
  assert (first, task.words.num_bins) == (96, 16)
  box = [[first + i for i in bins] + [2] for bins in ((0, 0, 2, 2), (0, 0, 1, 2), (0, 0, 0, 1))]
  said = [5, 6, 7, 8, 2]
  searched = hypotheses(
    [[said, box[0]], [box[1], box[0]], [said, said], [box[2], box[0]]],
    [[-1, -2], [-1, -3], [-1, -2], [-1, -2]],
  )
  first_ones = jax.device_get(task.best(searched))
  assert first_ones["tokens"].tolist() == [said, box[1], said, box[2]]
  assert first_ones["score"].tolist() == [-1, -1, -1, -1]
  found = jax.device_get(dataclasses.replace(task, any_box=True).best(searched))
  assert found["tokens"].tolist() == [box[0], box[1], said, box[2]]
  assert found["score"].tolist() == [-2, -1, -1, -1]
  sizes = np.float32([[100, 80], [64, 96], [64, 64], [100, 80]])
  predictions = {"examples": found | {"size": sizes, "valid": np.array([True] * 4)}}
  streams = task.streams("valid")
  told = json.loads(task.results(predictions, streams)["predict.json"])
  assert [line["uniq_id"] for line in told] == ["79_1", "80_2", "81_3", "9"]
  side = 512 / 15 * 2 / 64  # two bins, in pictures squashed to 64 pixels
  expected = [0, 0, side * 100, side * 80]
  np.testing.assert_allclose(told[0]["box"], expected, rtol=1e-6)
  assert told[2]["box"] is None
  # 79_1 is the whole picture and drawn as 49.5 x 74.75; 80_2 the left half, drawn whole.
  assert task.score(predictions, streams) == {"score": 1 / 3}
  original = {"examples": first_ones | {"size": sizes, "valid": np.array([True] * 4)}}
  told = json.loads(task.results(original, streams)["predict.json"])
  assert [line["box"] is None for line in told] == [True, False, True, False]
  assert task.score(original, streams) == {"score": 1 / 3}
  whole = read_box(np.array(box[0]), tokenizer=task.words, scale=sizes[0] / 64)
  np.testing.assert_allclose(whole, expected, rtol=1e-6)
  predictions["examples"]["valid"][:] = [False, False, False, True]
  assert task.score(predictions, streams) == {}


def test_faults_of_a_config_are_told_at_once(words):
  task = RefCOCO(train=("x.tsv",), tokenizer=words["micro"], image_size=64)
  config = Config(model=micro_config(), task=task, batch_size=8, steps=1, optim=Optim(lr=1e-3))
  validate(config, devices=8)
  wrong = dataclasses.replace(task, box_size=32, max_words=0, columns=(0, 1, 2))
  model = dataclasses.replace(micro_config(), num_bins=0)
  with pytest.raises(ValueError) as raised:
    validate(dataclasses.replace(config, task=wrong, model=model), devices=8)
  for text in (
    "task.box_size: expected at least task.image_size=64, as the bins do not reach further, found",
    "task.max_words: expected at least 1, found 0",
    "model.num_bins: expected bins that boxes are told in, found 0",
    "task.columns: expected one column for each of id, image, text, box",
  ):
    assert text in str(raised.value)
