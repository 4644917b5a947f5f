"""The names that users know, against the original's outputs."""

import json
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import unittest.mock

import jax
import numpy as np
import pytest
from PIL import Image

import ofa_jax
from ofa_jax import api, configs, hub
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.inference import batches, cnclip
from tests import cnclip_files
from tests.cnclip_golden import MICRO, error, golden, images, micro_config, micro_state_dict
from tests.ofa_directory import save_micro

PREPROCESS = pathlib.Path(__file__).parent / "golden" / "cnclip" / "preprocess"
CASES = json.loads((PREPROCESS / "golden.json").read_text())["cases"]


@pytest.fixture(scope="module", params=MICRO)
def micro(request, tmp_path_factory):
  """(the original's arrays, the model loaded from a model directory, the directory)."""
  directory = tmp_path_factory.mktemp("models") / request.param
  config = micro_config(request.param)
  hub.save_directory(
    directory, config, *convert.from_torch(micro_state_dict(request.param), config)
  )
  model, _ = api.load_from_name(directory)
  return golden(request.param, "forward"), model, directory


def test_features_and_logits_are_the_originals(micro):
  arrays, model, _ = micro
  image, tokens = images(arrays), arrays["token_ids"]
  assert error(model.encode_image(image), arrays["image_features"]) < 1e-4
  assert error(model.encode_text(tokens), arrays["text_features"]) < 1e-4
  per_image, per_text = model.get_similarity(image, tokens)
  assert error(per_image, arrays["logits_per_image"]) < 1e-4
  np.testing.assert_array_equal(per_text, per_image.T)
  assert np.exp(model.logit_scale) == pytest.approx(arrays["logit_scale_exp"], rel=1e-6)


@pytest.mark.parametrize("model", MICRO)
def test_fp16_files_give_what_the_originals_load_from_name_gives(model, tmp_path):
  pytest.importorskip("torch")
  path = cnclip_files.save(tmp_path / "x.pt", cnclip_files.half_state_dict(model))
  loaded = api.CNCLIPModel(hub.open_model(path, config=micro_config(model)))
  inputs, expected = golden(model, "forward"), golden(model, "forward_load_from_name")
  assert error(loaded.encode_image(images(inputs)), expected["image_features"]) < 1e-4
  assert error(loaded.encode_text(inputs["token_ids"]), expected["text_features"]) < 1e-4


def test_any_number_of_rows_gives_the_same_features(micro, monkeypatch):
  arrays, model, _ = micro
  monkeypatch.setattr(cnclip, "MAX_BATCH", 2)  # on 8 devices: chunks of 16
  tokens = np.tile(arrays["token_ids"], (5, 1))
  whole = np.tile(model.encode_text(arrays["token_ids"]), (5, 1))
  for rows in (0, 1, 7, 16, 37):
    found = model.encode_text(tokens[:rows])
    assert found.dtype == np.float32
    assert found.shape == (rows, model.config.embed_dim)
    np.testing.assert_allclose(found, whole[:rows], atol=2e-5)


def test_a_model_says_in_a_line_what_it_is(micro):
  _, model, _ = micro
  line = (
    f"CNCLIPModel(num_params={model.num_params:_}, image_size={model.image_size}, "
    f"context_length={model.context_length}, embed_dim={model.config.embed_dim}, precision='fp32')"
  )
  assert repr(model) == line and len(line) < 120


def test_the_wheel_has_the_packages_version_and_its_types():
  assert re.fullmatch(r"\d+\.\d+\.\d+", ofa_jax.__version__)
  assert (pathlib.Path(ofa_jax.__file__).parent / "py.typed").exists()
  project = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())
  assert project["project"]["dynamic"] == ["version"]
  setuptools = project["tool"]["setuptools"]
  assert setuptools["dynamic"]["version"] == {"attr": "ofa_jax.__version__"}
  assert "py.typed" in setuptools["package-data"]["ofa_jax"]


def test_the_recipes_are_a_package_wherever_they_lie(tmp_path):
  """In a checkout beside this one, in a wheel within; a link would be a text file elsewhere."""
  root = pathlib.Path(__file__).parent.parent
  (folder,) = configs.__path__
  assert pathlib.Path(folder) == root / "configs" and not pathlib.Path(folder).is_symlink()
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "one.py").touch()
  shutil.copy(configs.__file__, tmp_path)
  assert runpy.run_path(str(tmp_path / "configs.py"))["__path__"] == [str(tmp_path / "configs")]
  told = {}
  with unittest.mock.patch("setuptools.setup", lambda **given: told.update(given)):
    runpy.run_path(str(root / "setup.py"))
  assert told["package_dir"] == {"ofa_jax.configs": "configs"}
  assert {"ofa_jax", "ofa_jax.configs", "ofa_jax.data"} <= {*told["packages"]}
  assert not {*told["packages"]} & {"tests", "configs", "tools"}


def test_few_shapes_are_compiled():
  sizes = {batches.padded(rows, 8) for rows in range(1, 2049)}
  assert sizes == {8 * 2**i for i in range(9)}
  assert all(batches.padded(rows, 1) >= rows for rows in range(1, 300))


def test_bytes_are_normalised_on_the_device(micro):
  _, model, _ = micro
  pixels = np.random.default_rng(0).integers(0, 256, (3, *[model.image_size] * 2, 3), np.uint8)
  ready = np.stack([api.preprocess(Image.fromarray(x), size=model.image_size) for x in pixels])
  np.testing.assert_allclose(
    model.encode_image(pixels), model.encode_image(ready), rtol=1e-4, atol=1e-4
  )


def test_bf16_is_close(micro):
  arrays, _, directory = micro
  model, _ = api.load_from_name(directory, precision="bf16")
  found = model.encode_image(images(arrays)), model.encode_text(arrays["token_ids"])
  for x, expected in zip(found, (arrays["image_features"], arrays["text_features"]), strict=True):
    assert x.dtype == np.float32
    assert 1e-4 < error(x, expected) < 0.05


def test_float64_does_not_depend_on_the_batch(micro):
  """As float32 does in its last digits; and bytes are the very pixels that `preprocess` makes."""
  _, _, directory = micro
  with pytest.raises(ValueError, match="jax_enable_x64"):
    api.load_from_name(directory, precision="fp64")
  with jax.enable_x64(True):
    model, preprocess = api.load_from_name(directory, precision="fp64")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, *[model.image_size] * 2, 3), np.uint8)
    whole = model.encode_image(np.stack([preprocess(Image.fromarray(x)) for x in pixels]))
    parts = np.concatenate([model.encode_image(pixels[:1]), model.encode_image(pixels[1:])])
    _, per_text = model.get_similarity(pixels[:2], model.tokenizer(["杰尼龟"]))
  assert whole.dtype == parts.dtype == per_text.dtype == np.float64
  assert error(parts, whole) < 1e-13


def test_the_handle_describes_the_model(micro):
  arrays, model, _ = micro
  expected = {"micro_vit": (826_097, 96_240), "micro_rn50": (1_073_349, 355_684)}
  assert (model.num_params, model.num_visual_params) in expected.values()
  assert model.image_size == arrays["images"].shape[-1]
  assert model.context_length == 52
  np.testing.assert_array_equal(model.tokenizer("杰尼龟"), api.tokenize("杰尼龟"))


def test_wrong_inputs_are_errors(micro):
  _, model, _ = micro
  size = model.image_size
  for bad in (
    np.zeros((1, size, size + 1, 3), np.uint8),
    np.zeros((size, size, 3), np.float32),
    np.zeros((1, 3, size, size), np.float32),
    np.zeros((1, size, size, 3), np.int64),
  ):
    with pytest.raises(ValueError, match="Expected images uint8 or float32"):
      model.encode_image(bad)
  with pytest.raises(ValueError, match=r"at most 64 tokens .* found 65\. Give a smaller context"):
    model.encode_text(np.zeros((1, 65), np.int32))
  for bad in (np.zeros(4, np.int32), np.zeros((1, 4), np.float32)):
    with pytest.raises(ValueError, match="Expected tokens"):
      model.encode_text(bad)
  for bad in (-1, 21128):
    with pytest.raises(ValueError, match="Expected token ids 0 to 21127"):
      model.encode_text(np.array([[101, bad]]))


@pytest.mark.parametrize("case", CASES)
def test_preprocessing_equals_the_original(case):
  name, size = case.split("@")
  with Image.open(PREPROCESS / "images" / name) as image:
    found = api.preprocess(image, size=int(size)).transpose(2, 0, 1)
  assert found.dtype == np.float32
  step = int(size) // 16
  with np.load(PREPROCESS / "golden.npz") as expected:
    np.testing.assert_allclose(
      found[:, ::step, ::step][:, :16, :16], expected[f"{case}/sub16"], atol=1e-5
    )
    np.testing.assert_allclose(found[:, 0, :64], expected[f"{case}/row0"], atol=1e-5)


def test_the_whole_way_from_a_picture(micro):
  _, _, directory = micro
  model, preprocess = ofa_jax.load_from_name(directory)
  picture = Image.fromarray(np.full((40, 70, 3), 200, np.uint8))
  image = preprocess(picture)[None]
  assert image.shape == (1, model.image_size, model.image_size, 3)
  tokens = ofa_jax.tokenize(["杰尼龟", "妙蛙种子", "小火龙"])
  assert (tokens.shape, tokens.dtype) == ((3, 52), np.int32)
  per_image, per_text = model.get_similarity(image, tokens)
  assert (per_image.shape, per_text.shape) == ((1, 3), (3, 1))


def test_unknown_names_and_precisions_are_errors():
  vision = ("refcoco", "refcocoplus", "refcocog", "vqa", "snli_ve", "image_gen")
  chinese = ("muge", "refcoco", "refcocoplus", "refcocog", "ocr")
  assert ofa_jax.available_models() == [
    *("ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50"),
    *("OFA-tiny", "OFA-medium", "OFA-base", "OFA-large", "OFA-huge"),
    *("OFA-CN-base", "OFA-CN-large"),
    *("OFA-base-caption", *(f"OFA-base-{task}" for task in vision)),
    *("OFA-large-caption", "OFA-large-caption-stage1"),
    *(f"OFA-large-{task}" for task in (*vision, "imagenet", "gigaword")),
    *("OFA-huge-caption", "OFA-huge-vqa"),
    *(f"OFA-CN-{size}-{task}" for size in ("base", "large") for task in chinese),
  ]
  with pytest.raises(ValueError, match="did you mean ViT-B-16"):
    ofa_jax.load_from_name("ViT-B16")
  with pytest.raises(ValueError, match="Expected precision bf16 or fp32 or fp64, found 'fp16'"):
    ofa_jax.load_from_name("ViT-B-16", precision="fp16")


def test_the_package_is_imported_without_jax():
  code = """
import sys, ofa_jax
names = dir(ofa_jax)
assert {"available_models", "load_from_name", "tokenize", "__version__"} <= set(names), names
assert "TYPE_CHECKING" not in names
assert "jax" not in sys.modules and "ofa_jax.api" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True)
  with pytest.raises(AttributeError, match="no attribute 'load'"):
    ofa_jax.load  # noqa: B018


def test_the_commands_of_features_refuse_an_ofa(tmp_path):
  path = save_micro(tmp_path)
  with pytest.raises(ValueError, match=r"Expected a Chinese-CLIP, found an OFA in .*generate"):
    api.load_clip(str(path), precision="fp32")
