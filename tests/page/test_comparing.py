"""The tabs of a Chinese-CLIP: what is found, how alike it is, and what the image tower looks at."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from ofa_jax import api, extract_features, hub
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.page import comparing, given, library, shown
from ofa_jax.page.words import ENGLISH
from tests.cnclip_golden import error, golden, images, micro_config, micro_state_dict

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models") / "micro_vit"
  config = micro_config("micro_vit")
  hub.save_directory(directory, config, *convert.from_torch(micro_state_dict("micro_vit"), config))
  return api.load_clip(str(directory), precision="fp32")


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "ofa_jax" / "page"


@pytest.fixture
def photos(tmp_path):
  """Pictures of noise in two folders, one that is none, and links inside and out."""
  folder = tmp_path / "photos"
  (folder / "more").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for name in ("a.png", "b.jpg", "more/c.png", "more/d.webp"):
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / name)
  (folder / "broken.png").write_bytes(b"no picture")
  (tmp_path / "outside").mkdir()
  shutil.copy(folder / "a.png", tmp_path / "outside" / "secret.png")
  os.symlink(tmp_path / "outside" / "secret.png", folder / "link.png")
  os.symlink(tmp_path / "outside", folder / "linked")
  os.symlink("a.png", folder / "same.png")
  return folder


def features(model, files):
  pixels = [api.preprocess(str(file), size=model.image_size) for file in files]
  found = model.encode_image(np.stack(pixels))
  return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_a_folder_is_searched_and_nothing_beside_it(model, photos, cache, capsys, monkeypatch):
  lines = []
  found = library.open_library(model, photos, say=lines.append)
  names = ["a.png", "b.jpg", "more/c.png", "more/d.webp"]
  assert [os.path.relpath(file, photos) for file in found.files] == names
  assert f"Left out 2 pictures behind links that lead out of {photos}" in lines
  assert "4 of 5 pictures" in lines[-1] and "broken.png" in capsys.readouterr().out
  expected = features(model, found.files)
  np.testing.assert_allclose(found.vectors, expected, atol=1e-5)

  hits = comparing.by_picture(model, found, found.files[2], 3, words=ENGLISH)
  assert hits[0].name == "more/c.png" and hits[0].cosine == pytest.approx(1, abs=1e-5)
  assert len(hits) == 3 and hits[0].thumbnail.size == (50, 40)
  cosines = expected @ expected[2]
  order = np.argsort(-cosines)[:3]
  assert [hit.name for hit in hits] == [names[i] for i in order]
  np.testing.assert_allclose([hit.cosine for hit in hits], cosines[order], atol=1e-5)

  query = model.encode_text(model.tokenizer(["一只猫"], context_length=model.context_length))[0]
  cosines = expected @ (query / np.linalg.norm(query))
  hits = comparing.by_text(model, found, "一只猫", 48, words=ENGLISH)
  assert [hit.name for hit in hits] == [names[i] for i in np.argsort(-cosines)]
  page = shown.hits(hits, words=ENGLISH)
  assert page.count("<img") == 4 and 'alt="more/c.png"' in page and str(photos) not in page
  with pytest.raises(given.Fault, match="Please fill in “Text”"):
    comparing.by_text(model, found, " ", 12, words=ENGLISH)

  # Known features are read, and computed anew only where something has changed.
  def never(*_, **__):
    raise AssertionError("computed again")

  with monkeypatch.context() as patch:
    patch.setattr(extract_features, "extract_images", never)
    again = library.open_library(model, photos, say=lines.append)
  np.testing.assert_array_equal(again.vectors, found.vectors)
  (photos / "b.jpg").unlink()
  os.symlink(photos.parent / "outside" / "secret.png", photos / "b.jpg")  # since then
  hits = comparing.by_text(model, again, "一只猫", 48, words=ENGLISH)
  assert sorted(hit.name for hit in hits) == [names[0], *names[2:]]
  fewer = library.open_library(model, photos, say=lines.append)
  assert len(fewer) == 3 and len(list(cache.glob("*.npy"))) == 1
  assert shown.hits([], words=ENGLISH) == shown.fault(ENGLISH.none_left)


def test_folders_that_cannot_be_searched(model, tmp_path, cache):
  with pytest.raises(ValueError, match="Expected a folder of pictures in --images, found no local"):
    library.open_library(model, tmp_path / "nowhere")
  with pytest.raises(ValueError, match="found none"):
    library.open_library(model, tmp_path)
  (tmp_path / "x.png").write_bytes(b"no picture")
  with pytest.raises(ValueError, match="found none that can be read"):
    library.open_library(model, tmp_path)


def test_similarities_are_the_apis(model, photos):
  texts = ["一只猫", "一只狗", "数字三", "花"]
  upload, learnt = photos / "a.png", float(np.exp(model.logit_scale))
  found = comparing.similarity(model, upload, "\n".join(texts), learnt, words=ENGLISH)
  pixels = api.preprocess(str(upload), size=model.image_size)[None]
  tokens = model.tokenizer(texts, context_length=model.context_length)
  logits = model.get_similarity(pixels, tokens)[0][0]
  order = np.argsort(-logits)
  assert [like.text for like in found] == [texts[i] for i in order]
  expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
  np.testing.assert_allclose([x.probability for x in found], expected[order], rtol=1e-4)
  np.testing.assert_allclose([x.cosine for x in found], logits[order] / learnt, rtol=1e-4)
  flatter = comparing.similarity(model, upload, "\n".join(texts), 1.0, words=ENGLISH)
  assert [x.cosine for x in flatter] == [x.cosine for x in found]
  assert flatter[0].probability < found[0].probability
  assert sum(x.probability for x in flatter) == pytest.approx(1)
  page = shown.likenesses(found, words=ENGLISH)
  assert page.index(found[0].text) < page.index(found[1].text) and page.count("<meter") == 4


def test_attention_is_shown_where_it_is(model, photos, monkeypatch):
  weights = np.full((1, 3, 4, 4), 0.01, np.float32)
  weights[0, :, 0, 3] = 0.5  # top right
  monkeypatch.setattr(model, "class_attention", lambda pixels: weights)
  drawn, share = comparing.attention(model, photos / "a.png", words=ENGLISH)
  assert share == pytest.approx(0.65, abs=1e-6) and drawn.shape == (358, 448, 3)
  plain = comparing.to_look_at(given.picture(photos / "a.png", words=ENGLISH))
  changed = np.abs(drawn.astype(int) - plain).mean(-1)
  assert changed[:80, -80:].mean() > 40 and changed[180:, :200].mean() < 3
  assert "65 % is on the patches" in shown.attention(drawn, share, words=ENGLISH)


def test_attention_of_a_model_is_that_of_its_last_layer(model):
  arrays = golden("micro_vit", "forward")
  found = model.class_attention(images(arrays))
  assert found.shape == (len(arrays["images"]), 3, 4, 4) and found.dtype == np.float32
  assert (found > 0).all() and (found.sum((2, 3)) < 1).all()
  alone = model.class_attention(images(arrays)[1:2])
  assert error(alone, found[1:2]) < 1e-5
  assert model.class_attention(images(arrays)[:0]).shape == (0, 3, 4, 4)
  assert comparing.tabs(model, None) == ("similarity", "attention")
