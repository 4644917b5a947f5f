"""Captioning: rows as the original assembles them, and scores of what was generated."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from ofa_jax.data import images
from ofa_jax.scoring import coco, java
from ofa_jax.tasks.base import normalized
from ofa_jax.tasks.caption import Caption
from tests.ofa_files import GOLDEN, write_bpe

FOLDER = GOLDEN / "caption"
CASES = ("train", "train_480", "train_imagenet_norm", "val", "scst")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return str(write_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.mark.parametrize("case", CASES)
def test_rows_are_the_originals(case, bpe, tmp_path):
  golden = json.loads((FOLDER / f"{case}.json").read_text())
  options = {}
  if case == "train_imagenet_norm":
    options = {"pixel_mean": images.IMAGENET_MEAN, "pixel_std": images.IMAGENET_STD}
  task = Caption(
    train=(str(shutil.copy(FOLDER / golden["tsv"], tmp_path)),),
    tokenizer=bpe,
    image_size=golden["kwargs"]["patch_image_size"],
    source_length=8,
    target_length=62,
    **options,
  )
  rows = task.examples("train")
  assert len(rows) == len(golden["items"])
  blank = rows.blank()
  # One caption, cut at 20 words, is learnt; all are kept for scoring and self-critical training.
  learns = golden["split"] == "train" and "scst" not in golden["kwargs"]
  with np.load(FOLDER / "images.npz") as stored:
    for i, item in enumerate(golden["items"]):
      example = rows.example(i, np.random.default_rng(0) if learns else None)
      assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
        k: (v.shape, v.dtype) for k, v in blank.items()
      }
      assert rows.row(i)["uniq_id"] == item["id"]
      expected = {
        "source": item["source"],
        "target": item["target"],
        "previous": item["prev_output_tokens"],
      }
      for name, found in expected.items():
        ids = found["ids"]
        assert example[name].tolist() == ids + [1] * (len(example[name]) - len(ids)), name
      image = np.asarray(
        normalized(example["image"][None], mean=task.pixel_mean, std=task.pixel_std)
      )[0].transpose(2, 0, 1)
      expected = item["patch_image"]
      assert list(image.shape) == expected["shape"]
      np.testing.assert_allclose(image.mean(dtype=np.float64), expected["mean"], atol=1e-7)
      np.testing.assert_allclose(image.std(dtype=np.float64, ddof=1), expected["std"], rtol=1e-6)
      # Validation and self-critical training read the images of the training file.
      pixels = stored[expected["npz_key"].replace("val", "train").replace("scst", "train")]
      part = image[:, ::16, ::16] if expected["stored"] != "full" else image
      np.testing.assert_allclose(part, pixels, atol=1e-6)


def test_scores_and_files_of_what_could_be_read(bpe, tmp_path, monkeypatch):
  path = shutil.copy(FOLDER / "caption_val.tsv", tmp_path)
  task = Caption(valid=(str(path),), tokenizer=bpe, image_size=16, target_length=62, page=2)
  streams = task.streams("valid")
  said = [" Second, ref", " second ref", " Third ref", " two dogs play", " x", " A JPEG image"]
  tokens = np.full((6, 12), 1, np.int32)
  for row, text in zip(tokens, said, strict=True):
    ids = [0, *task.encode(text), 2]
    row[: len(ids)] = ids
  valid = np.array([True, True, True, False, True, True])
  predictions = {"examples": {"tokens": tokens, "valid": valid}}
  scores = task.score(predictions, streams)
  assert set(scores) == {"cider", "bleu4", "rouge_l", "exact"}
  assert scores["exact"] == 3 / 5  # punctuation does not count, case does
  assert task.right(predictions, streams) == {0: 0.5, 1: 0, 2: 1, 4: 1, 5: 1}  # ROUGE-L
  monkeypatch.setattr(java, "missing", lambda: dict.fromkeys(("meteor", "spice"), "no java"))
  official = dataclasses.replace(task, coco=True)
  with pytest.warns(UserWarning, match=r"^not scored: METEOR \(no java\), SPICE \(no java\); see"):
    official.streams("valid")
  more = official.score(predictions, streams)
  assert more.keys() - scores.keys() == set(coco.METRICS) - {"coco_meteor", "coco_spice"}
  assert more.keys() <= set(task.metrics) and scores.items() <= more.items()
  files = task.results(predictions, streams)
  found = json.loads(files["predict.json"])
  assert [row["image_id"] for row in found] == ["img0", "img1", "img2", "img4", "img5"]
  assert [row["caption"] for row in found][:2] == ["Second ref", "second ref"]
  assert files["captions.png"].startswith(b"\x89PNG")
  assert dataclasses.replace(task, page=0).results(predictions, streams).keys() == {"predict.json"}
