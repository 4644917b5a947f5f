"""Image classification: rows, masks and noise as the original has them, out of TSV and tfds."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax.config import Config, Optim
from ofa_jax.data import answers, tfds
from ofa_jax.data.images import IMAGENET_MEAN, IMAGENET_STD
from ofa_jax.data.tsv import BadRow
from ofa_jax.tasks.base import normalized
from ofa_jax.tasks.image_classify import ImageClassify, erase
from ofa_jax.validation import validate
from tests import tiny_tfds
from tests.ofa_files import GOLDEN, check_rows, write_bpe
from tests.ofa_golden import micro_config

FOLDER = GOLDEN / "image_classify"
TRAINED = json.loads((FOLDER / "augmentation.json").read_text())["dataset_items"]
PAD = 1


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return str(write_bpe(tmp_path_factory.mktemp("bpe")))


def classes(folder, names):
  path = folder / "classes.json"
  path.write_text(json.dumps({name: i for i, name in enumerate(names)}))
  return str(path)


def check_masks(task, example, masks):
  batch = {"node": jnp.asarray(example["node"][None]), "trie": task.choices.trie}
  allowed = np.asarray(task.allowed(batch, vocab_size=59457))[0]
  assert [np.flatnonzero(row).tolist() for row in allowed[: len(masks)]] == masks
  assert not (example["node"][len(masks) :] != task.blank()["node"][-1]).any()


@pytest.mark.parametrize("case", ["imagenet", "half"])
def test_rows_are_the_originals(case, bpe, tmp_path):
  golden = json.loads((FOLDER / f"{case}.json").read_text())
  own = golden["kwargs"]["imagenet_default_mean_and_std"]
  colours = (IMAGENET_MEAN, IMAGENET_STD) if own else ((0.5,) * 3, (0.5,) * 3)
  task = ImageClassify(
    train=(str(shutil.copy(FOLDER / "image_classify.tsv", tmp_path)),),
    columns=tuple(map(int, golden["selected_cols"].split(","))),
    tokenizer=bpe,
    answers=classes(tmp_path, ["great white shark", "tench", "great grey owl"]),
    image_size=golden["kwargs"]["patch_image_size"],
    pixel_mean=colours[0],
    pixel_std=colours[1],
  )
  _, examples = check_rows(task, golden)
  for example, item in zip(examples, golden["items"], strict=True):
    check_masks(task, example, item["constraint_mask_true_ids_per_position"])


def test_training_rows_are_the_originals(bpe, tmp_path):
  """From the file's columns image and words to tokens and masks; only the picture is random."""
  names = [next(iter(item["ref_dict"])) for item in TRAINED]
  task = ImageClassify(
    train=(str(shutil.copy(FOLDER / "train.tsv", tmp_path)),),
    tokenizer=bpe,
    answers=classes(tmp_path, names),
    image_size=48,
  )
  rows = task.examples("train")
  for i, item in enumerate(TRAINED):
    example = rows.example(i, np.random.default_rng(i))
    for ours, theirs in (
      ("source", "source"), ("target", "target"), ("previous", "prev_output_tokens")
    ):  # fmt: skip
      assert [x for x in example[ours].tolist() if x != PAD] == item[theirs]
    check_masks(task, example, item["constraint_mask_true_ids"])
    again, other = (rows.example(i, np.random.default_rng(seed)) for seed in (i, 99))
    np.testing.assert_array_equal(again["image"], example["image"])
    assert (other["image"] != example["image"]).any()
    whole = rows.example(i, None)
    np.testing.assert_array_equal(whole["image"], rows.row(i).square(None))
    assert not whole["erased"].any()
  plain = dataclasses.replace(task, augment="none").examples("train")
  np.testing.assert_array_equal(
    plain.example(0, np.random.default_rng(0))["image"], rows.example(0, None)["image"]
  )


def test_noise_stands_where_it_was_drawn():
  pixels = jnp.zeros((3, 32, 32, 3))
  boxes = jnp.array([[0, 0, 0, 0], [2, 3, 20, 16], [31, 31, 1, 1]], jnp.int32)
  noisy = np.asarray(erase(pixels, boxes, rngs=jax.random.key(0)))
  assert not noisy[0].any()
  inside = noisy[1, 2:22, 3:19]
  assert (inside != 0).all() and abs(inside.mean()) < 0.1 and abs(inside.std() - 1) < 0.1
  assert (noisy[1] != 0).sum() == inside.size and (noisy[2] != 0).sum() == 3


def test_noise_comes_before_the_loss(bpe, tmp_path):
  task = ImageClassify(tokenizer=bpe, answers=classes(tmp_path, ["a", "b"]), image_size=8)
  batch = {
    "image": np.full((2, 8, 8, 3), 100, np.uint8),
    "erased": np.array([[0, 0, 4, 4], [0, 0, 0, 0]], np.int32),
  }
  batch = jax.tree.map(jnp.asarray, batch)
  key, trie = jax.random.key(0), object()
  ready = task.prepare(None, batch, rngs=key, step=0, frozen=trie)
  plain = normalized(batch["image"], mean=task.pixel_mean, std=task.pixel_std)
  np.testing.assert_array_equal(ready["image"][1], plain[1])
  changed = np.asarray(ready["image"][0] != plain[0])
  assert changed[:4, :4].all() and not changed[4:].any() and not changed[:, 4:].any()
  assert ready["trie"] is trie
  none = dataclasses.replace(task, augment="none")
  assert none.prepare(None, batch, rngs=key, step=0, frozen=trie)["image"].dtype == jnp.uint8


PICTURE = (FOLDER / "train.tsv").read_text().split("\t")[0]


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    ((PICTURE, "1"), "expected 3 columns separated by tabs, found 2"),
    ((PICTURE, "1", "lion"), "the answer 'lion' is not among those to choose from"),
    ((PICTURE, "1", "golden retriever"), "the answer 'golden retriever' is not among"),
    ((PICTURE, "1", " "), "there is no class to learn"),
    ((PICTURE, "1", "c\udcff"), "label is not UTF-8"),
    (("?" + PICTURE, "1", "tabby cat"), "broken base64"),
    ((PICTURE[:400], "1", "tabby cat"), "cannot be decoded"),
  ],
  ids=range(7),
)
def test_what_cannot_be_used_is_named(bpe, tmp_path, columns, message):
  names = [next(iter(item["ref_dict"])) for item in TRAINED]
  path = tmp_path / "rows.tsv"
  line = "\t".join(columns).encode(errors="surrogateescape")
  path.write_bytes((FOLDER / "train.tsv").read_bytes() + line + b"\n")
  task = ImageClassify(
    train=(str(path),),
    tokenizer=bpe,
    answers=classes(tmp_path, names),
    image_size=16,
  )
  rows = task.examples("train")
  with pytest.raises(BadRow, match=message) as raised:
    rows.example(len(rows) - 1, np.random.default_rng(0))
  assert raised.value.name.startswith(f"{path}:4")
  assert len(raised.value.name) < len(str(path)) + 100  # not the picture, which stands first


def test_scores_and_the_file(bpe, tmp_path):
  names = [next(iter(item["ref_dict"])) for item in TRAINED]
  lines = (FOLDER / "train.tsv").read_text().splitlines()
  path = tmp_path / "valid.tsv"
  path.write_text("\n".join([*lines, f"{PICTURE}\t\t"]) + "\n")
  task = ImageClassify(
    valid=(str(path),), tokenizer=bpe, answers=classes(tmp_path, names), image_size=16
  )
  streams = task.streams("valid")
  chosen = {"examples": {"answer": np.array([0, 2, 2, 1]), "valid": np.array([True] * 4)}}
  assert task.score(chosen, streams) == {"score": 2 / 3}
  assert json.loads(task.results(chosen, streams)["predict.json"]) == [
    {"uniq_id": i, "answer": names[k]} for i, k in enumerate((0, 2, 2, 1))
  ]
  assert streams["examples"].example(3, None)["target"].tolist()[:2] == [2, PAD]


def test_faults_of_a_config_are_told_at_once(bpe, tmp_path):
  task = ImageClassify(tokenizer="OFA-base", answers=classes(tmp_path, ["a", "b"]), image_size=64)
  config = Config(model=micro_config(), task=task, batch_size=8, steps=1, optim=Optim(lr=1e-3))
  validate(config, devices=8)
  wrong = dataclasses.replace(task, augment="some", answer_length=0)
  with pytest.raises(ValueError) as raised:
    validate(dataclasses.replace(config, task=wrong), devices=8)
  assert "task.augment: expected one of none, original, repaired, found 'some'" in str(raised.value)
  assert "task.answer_length: expected at least 1, found 0" in str(raised.value)


def test_tensorflow_datasets(bpe, tmp_path, monkeypatch):
  builder = tiny_tfds.build(tmp_path / "tfds")
  monkeypatch.setattr(tfds, "prepared", lambda name: builder)
  path = tmp_path / "classes.json"
  path.write_text(json.dumps({"tench": 1, "retriever": 3, "great white shark": 2}))
  task = ImageClassify(
    train=("tfds:pictures",),
    valid=("tfds:pictures",),
    test=("tfds:pictures:train[:4]",),
    tokenizer=bpe,
    answers=str(path),
    image_size=24,
    cache_dir=str(tmp_path / "cache"),
  )
  words = ("tench", "great white shark", "retriever")
  assert task.choices.texts == ("tench", "retriever", "great white shark")
  rows = task.examples("train")
  assert (len(rows), len(task.examples("valid")), len(task.examples("test"))) == (6, 3, 4)
  sizes = set()
  for i in range(6):
    example, row = rows.example(i, np.random.default_rng(0)), rows.row(i)
    number = row.size[1] - 20  # of the picture as it was written
    assert row["label"] == words[number % 3]
    expected = task.encode(f" {row['label']}")
    assert [x for x in example["target"].tolist() if x != PAD] == [*expected, 2]
    assert example["image"].shape == (24, 24, 3)
    sizes.add(number)
  assert sizes == set(range(6)) and not (tmp_path / "cache").exists()
  path.write_text(json.dumps(["tench", "shark"]))
  with pytest.raises(
    ValueError, match="words for the 3 classes of pictures, n01440764 to n0209960"
  ):
    dataclasses.replace(task, cache_dir=None).examples("train")
  with pytest.raises(ValueError, match="Expected one data set of TensorFlow Datasets and no file"):
    dataclasses.replace(task, train=("tfds:pictures", "b.tsv")).examples("train")


def test_numbers_of_classes(tmp_path):
  path = tmp_path / "classes.json"
  path.write_text(json.dumps({"b": 2, "a": 1, "c": 0}))
  assert answers.numbered(path) == ("c", "a", "b")
  assert answers.load(path) == ("b", "a", "c")
  path.write_text(json.dumps({"b": 2, "a": 2}))
  with pytest.raises(
    ValueError, match=r"the 2 answers .* numbers from 0 on, each once, found 2, 2"
  ):
    answers.numbered(path)
  path.write_text("b\na\n")
  assert answers.numbered(path) == ("b", "a")
