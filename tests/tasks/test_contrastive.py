"""What the contrastive tasks do beyond the engine's tests: parts, positives, scores, streams."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ofa_jax.models.layers import BatchNorm
from ofa_jax.tasks import contrastive, in_batch, zeroshot
from tests import tiny


class Towers(nnx.Module):
  """Two towers of one layer each; the image tower has running statistics."""

  def __init__(self):
    self.norm = BatchNorm(3)
    self.words = nnx.Param(jnp.sin(jnp.arange(400.0)).reshape(100, 4))
    self.kernel = nnx.Param(jnp.cos(jnp.arange(12.0)).reshape(3, 4))
    self.logit_scale = nnx.Param(jnp.float32(2.0))
    self.logit_bias = None

  def encode_image(self, image, *, mask_ratio=0.0, rngs=None):
    return self.norm(image, rngs=rngs).mean((1, 2)) @ self.kernel[...]

  def encode_text(self, tokens, *, rngs=None):
    return self.words[...][tokens].mean(1)


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return {
    "image": jnp.asarray(rng.integers(0, 256, (8, 2, 2, 3)), jnp.uint8),
    "tokens": jnp.asarray(rng.integers(1, 100, (8, 5)), jnp.int32),
    "image_index": jnp.arange(8, dtype=jnp.int32),
    "caption_index": jnp.array([0, 1, 2, 0, 4, 5, 6, 7], jnp.int32),
    "weight": jnp.ones(8, jnp.float32),
  }


def test_running_statistics_move_through_all_parts(batch):
  task = contrastive.Contrastive(image_size=2)
  model = Towers()
  task.loss(model, batch, rngs=jax.random.key(0), chunks=4)
  expected = Towers()
  pixels = contrastive.to_float(batch["image"])
  for part in range(4):
    expected.norm(pixels[part::4], rngs=jax.random.key(0))
  np.testing.assert_allclose(model.norm.mean[...], expected.norm.mean[...], rtol=1e-5)
  np.testing.assert_allclose(model.norm.var[...], expected.norm.var[...], rtol=1e-5)
  assert np.any(model.norm.mean[...] != 0)


def test_equal_captions_are_positives_on_demand(batch):
  plain = contrastive.Contrastive(image_size=2).loss(Towers(), batch, rngs=None)
  both = contrastive.Contrastive(image_size=2, multi_positive=True).loss(Towers(), batch, rngs=None)
  unique = {**batch, "caption_index": batch["image_index"]}
  same = contrastive.Contrastive(image_size=2, multi_positive=True).loss(
    Towers(), unique, rngs=None
  )
  assert both["loss"].value != plain["loss"].value
  np.testing.assert_allclose(same["loss"].value, plain["loss"].value, rtol=1e-6)


def test_chance_counts_only_real_rows(batch):
  weight = batch["weight"].at[:3].set(0)
  found = contrastive.Contrastive(image_size=2).loss(
    Towers(), batch | {"weight": weight}, rngs=None
  )
  np.testing.assert_allclose(found["chance_loss"].value, np.log(5), rtol=1e-6)


def test_log_line_has_the_originals_fields():
  line = contrastive.Contrastive().log_line(
    {
      "step": 1, "steps": 735, "epoch": 1, "seen": 1024, "rows": 250880, "percent": 0.408,
      "loss": 2.37102, "i2t_acc": 0.499, "t2i_acc": 0.4873, "data_time": 7.4871,
      "batch_time": 14.0491, "lr": 5e-7, "logit_scale": 4.6052, "batch_size": 1024,
    }
  )  # fmt: skip
  assert line == (
    "Global Steps: 1/735 | Train Epoch: 1 [1024/250880 (0%)] | Loss: 2.371020 | "
    "Image2Text Acc: 49.90 | Text2Image Acc: 48.73 | Data Time: 7.487s | Batch Time: 14.049s | "
    "LR: 0.000000 | logit_scale: 4.605 | Global Batch Size: 1024"
  )


def test_an_unreadable_image_is_not_found(digits):
  task = tiny.config(digits).task
  streams = task.streams("valid")
  classes = np.array([images[0] for images in streams["text"].images_of])
  image = np.eye(len(streams["image"]), dtype=np.float32)
  predictions = {
    "image": {"features": image, "valid": np.ones(len(image), bool)},
    "text": {
      "features": image[classes],
      "valid": np.ones(len(classes), bool),
      "logit_scale": np.full(len(classes), 2.0, np.float32),
    },
  }
  assert task.score(predictions, streams)["t2i_r1"] == 1.0
  predictions["image"]["valid"] = ~np.isin(np.arange(len(image)), classes[:6])
  assert task.score(predictions, streams)["t2i_r1"] == pytest.approx(0.9)
  assert task.score(predictions, streams).keys() == {*task.metrics}
  # Nor is it compared with others of its batch; where no other has a text there is no batch.
  predictions["image"]["valid"] = np.arange(len(image)) >= len(image) - 1
  streams["text"].images_of = [images[:1] for images in streams["text"].images_of]
  values = task.score(predictions, streams)
  assert values["t2i_r1"] == 0.0 and "loss" not in values
  assert task.eval_line(values) is None


def test_in_batch_scores_are_those_of_the_loss():
  """Twelve pairs in three batches of five: the last is filled up from the front."""
  rng = np.random.default_rng(0)
  image, text = (rng.standard_normal((n, 8)).astype(np.float32) for n in (7, 12))
  image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
  edges = [(i % 7, i) for i in range(12)]
  places = in_batch.order(12, batch_size=5)
  assert sorted(places) == sorted([*range(12), 0, 1, 2])
  two = in_batch.order(12, batch_size=5, gpus=2)
  assert sorted(two) == sorted([*range(12), *range(8)])
  found = in_batch.scores(
    image, text, edges=edges, logit_scale=1.5, logit_bias=None, batch_size=5, gpus=1,
    kind="softmax",
  )  # fmt: skip
  losses, hits = [], []
  for batch in places.reshape(3, 5):
    logits = np.exp(1.5) * image[batch % 7].astype(np.float64) @ text[batch].T
    own = np.diag(logits)
    losses += [np.log(np.exp(logits).sum(axis)) - own for axis in (0, 1)]
    hits.append((logits.argmax(1) == np.arange(5), logits.argmax(0) == np.arange(5)))
  expected = {"loss": np.mean(losses)}
  expected |= dict(zip(("i2t_acc", "t2i_acc"), np.mean(hits, axis=(0, 2)), strict=True))
  assert found == pytest.approx(expected, abs=1e-6)


def test_a_page_shows_what_is_found(digits, monkeypatch):
  """Every text finds its first image at once; that of the first text cannot be read."""
  pages = []
  monkeypatch.setattr(contrastive.pictures, "retrieval", lambda *page: pages.append(page) or {})
  task = tiny.config(digits).task
  streams = task.streams("valid")
  texts, rows = streams["text"], streams["image"]
  first = np.array([images[0] for images in texts.images_of])
  image = np.eye(len(rows), dtype=np.float32)
  predictions = {
    "image": {"features": image, "valid": np.arange(len(image)) != first[0]},
    "text": {"features": image[first], "valid": np.ones(len(first), bool)},
  }
  assert task.results(predictions, streams) == {}
  ((name, queries, images, right),) = pages
  assert name == "retrieval"
  assert (queries[0], queries[-1], len(queries)) == (texts.texts[0], texts.texts[-1], 8)
  assert {len(ranked) for ranked in images} == {6}
  expected = rows.example(int(first[-1]), None)["image"]
  np.testing.assert_array_equal(images[-1][0], expected)
  assert [bool(good[0]) for good in right[1:]] == [True] * 7
  unreadable = rows.example(int(first[0]), None)["image"]
  assert not any(np.array_equal(image, unreadable) for image in images[0])


def test_zero_shot_takes_the_nearest_class(digits):
  task = zeroshot.ZeroShot(
    directory=str(digits / "zeroshot"), templates=("{}", "数字{}"), image_size=16
  )
  streams = task.streams("test")
  assert len(streams["text"]) == 20 and len(streams["image"]) == 360
  eye = np.eye(10, dtype=np.float32)
  labels = streams["image"].labels
  predictions = {
    "image": {"features": eye[labels], "valid": np.ones(360, bool)},
    "text": {"features": np.repeat(eye, 2, axis=0), "valid": np.ones(20, bool)},
  }
  assert task.score(predictions, streams) == {"zeroshot_top1": 1.0, "zeroshot_top5": 1.0}
  predictions["image"]["valid"] = np.arange(360) >= 36
  values = task.score(predictions, streams)
  assert values["zeroshot_top1"] == values["zeroshot_top5"] == pytest.approx(0.9)


def test_the_fifth_class_counts_among_many_only(digits):
  task = zeroshot.ZeroShot(directory=str(digits / "zeroshot"), templates=("{}",), image_size=16)
  streams = task.streams("test")
  labels = streams["image"].labels
  image = np.stack([np.roll(10.0 - np.arange(10.0), label - 4) for label in labels])
  predictions = {
    "image": {"features": image, "valid": np.ones(360, bool)},
    "text": {"features": np.eye(10), "valid": np.ones(10, bool)},
  }
  assert task.score(predictions, streams) == {"zeroshot_top1": 0.0, "zeroshot_top5": 1.0}
  streams["image"].labels = labels % 9
  few = {**predictions, "text": {"features": np.eye(9, 10), "valid": np.ones(9, bool)}}
  assert task.score(few, streams).keys() == {"zeroshot_top1"}


def test_class_names_must_match_the_folders(digits, tmp_path):
  shutil.copytree(digits / "zeroshot", tmp_path / "zeroshot")
  (tmp_path / "zeroshot" / "label_cn.txt").write_text("零\n一\n")
  task = zeroshot.ZeroShot(directory=str(tmp_path / "zeroshot"), templates=("{}",), image_size=16)
  with pytest.raises(ValueError, match=r"found 2 names in label_cn.txt and 10 folders"):
    task.streams("test")


def test_a_split_without_data_is_told(digits):
  task = tiny.config(digits).task
  with pytest.raises(ValueError, match=r"split 'test' in task.test, found none"):
    task.streams("test")
  twice = dataclasses.replace(task, valid=task.valid * 2)
  with pytest.raises(ValueError, match="Expected 1 source"):
    twice.streams("valid")


def test_several_sources_are_mixed(digits):
  task = tiny.config(digits).task
  task = dataclasses.replace(task, train=(task.train[0], task.valid[0]))
  rows = task.examples("train")
  assert len(rows) == 1437 * 6 + 360 * 6
  assert rows.example(0, np.random.default_rng(0))["tokens"].shape == (12,)
