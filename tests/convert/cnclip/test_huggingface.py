"""Hugging Face's ChineseCLIPModel, in and out."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from ofa_jax.convert.cnclip import huggingface
from ofa_jax.convert.cnclip import table as convert
from tests.cnclip_golden import (
  error,
  flatten,
  golden,
  golden_json,
  images,
  micro_config,
  micro_model,
  micro_state_dict,
)


@pytest.fixture(scope="module")
def params():
  return convert.from_torch(micro_state_dict("micro_vit"), micro_config("micro_vit"))[0]


@pytest.fixture
def directory(tmp_path, params):
  config = micro_config("micro_vit", dropout=0.1)
  huggingface.save(tmp_path / "hf", config, params, context_length=52)
  return tmp_path / "hf"


def described(directory):
  return json.loads((directory / "config.json").read_text())


def assert_same(found, expected):
  found, expected = flatten(found), flatten(expected)
  assert found.keys() == expected.keys()
  for path, x in expected.items():
    np.testing.assert_array_equal(found[path], x, strict=True)


def test_names_and_shapes_are_theirs(directory):
  found = safetensors.numpy.load_file(directory / "model.safetensors")
  expected = golden_json("micro_vit", "hf_state_dict_keys")
  assert {k: list(x.shape) for k, x in found.items()} == expected


def test_round_trip_is_bit_equal(directory, params):
  config = huggingface.config_from_json(described(directory))
  assert config == micro_config("micro_vit", dropout=0.1)
  found, rest = huggingface.load(directory, config)
  assert rest == {}
  assert_same(found, params)


def test_transformers_computes_our_features(directory):
  torch = pytest.importorskip("torch")
  from transformers import ChineseCLIPModel

  model, report = ChineseCLIPModel.from_pretrained(directory, output_loading_info=True)
  assert not any(report.values()), report
  arrays = golden("micro_vit", "forward")
  tokens = torch.from_numpy(arrays["token_ids"]).long()
  with torch.no_grad():
    found = model.eval()(
      input_ids=tokens,
      attention_mask=(tokens != 0).long(),
      pixel_values=torch.from_numpy(arrays["images"]),
    )
  assert error(found.image_embeds, arrays["image_features_norm"]) < 1e-4
  assert error(found.text_embeds, arrays["text_features_norm"]) < 1e-4
  assert error(found.logits_per_image, arrays["logits_per_image"]) < 1e-4


def test_transformers_attends_to_the_same_patches(directory):
  torch = pytest.importorskip("torch")
  from transformers import ChineseCLIPModel

  model = ChineseCLIPModel.from_pretrained(directory, attn_implementation="eager").eval()
  arrays = golden("micro_vit", "forward")
  with torch.no_grad():
    theirs = model.vision_model(torch.from_numpy(arrays["images"]), output_attentions=True)
  expected = theirs.attentions[-1][:, :, 0, 1:].reshape(-1, 3, 4, 4)
  with jax.default_matmul_precision("highest"):
    found = micro_model("micro_vit").visual.class_attention(images(arrays))
  assert error(found, expected) < 1e-5


def test_their_tokenizer_and_image_processor_are_configured(directory):
  pytest.importorskip("torch")
  from PIL import Image
  from transformers import AutoTokenizer, ChineseCLIPImageProcessor

  from ofa_jax.api import preprocess, tokenize

  tokenizer = AutoTokenizer.from_pretrained(directory)
  found = tokenizer("杰尼龟 Squirtle", padding="max_length", max_length=52)["input_ids"]
  assert found == tokenize("杰尼龟 Squirtle")[0].tolist()
  processor = ChineseCLIPImageProcessor.from_pretrained(directory)
  pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
  picture = Image.fromarray(pixels)
  found = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
  np.testing.assert_allclose(found, preprocess(picture, size=32), atol=1e-5)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_and_bin_files_are_read(directory, params, form):
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  (directory / "model.safetensors").unlink()
  # Old versions stored these, too.
  tensors["text_model.embeddings.position_ids"] = np.arange(64)[None]
  tensors["text_model.pooler.dense.weight"] = np.zeros((32, 32), np.float32)
  halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
  main = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
  stem, _, suffix = main.rpartition(".")
  names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
  for name, half in zip(names, halves, strict=True):
    if form == "bin":
      torch = pytest.importorskip("torch")
      torch.save({k: torch.from_numpy(x) for k, x in half.items()}, directory / name)
    else:
      safetensors.numpy.save_file(half, directory / name)
  weight_map = {k: name for name, half in zip(names, halves, strict=True) for k in half}
  (directory / f"{main}.index.json").write_text(json.dumps({"weight_map": weight_map}))
  found, _ = huggingface.load(directory, micro_config("micro_vit"))
  assert_same(found, params)
  (directory / names[1]).unlink()
  with pytest.raises(ValueError, match=names[1]):
    huggingface.load(directory, micro_config("micro_vit"))
  for index, message in (
    ("[]", "expected a JSON object, found list"),
    ('{"weight_map": {"a": "../b"}}', "expected an index of shards"),
    ('{"weight_map": 3}', "expected an index of shards"),
  ):
    (directory / f"{main}.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
      huggingface.load(directory, micro_config("micro_vit"))


def test_left_out_settings_have_their_defaults():
  config = huggingface.config_from_json(
    {"projection_dim": 512, "text_config": {"vocab_size": 21128}, "vision_config": {}}
  )
  expected = micro_config("micro_vit", dropout=0.1)
  assert (config.vision.width, config.vision.patch_size, config.vision.head_width) == (768, 32, 64)
  assert config.text.dropout == expected.text.dropout
  assert config.text.heads == config.text.layers == 12


def test_all_faults_are_listed(directory):
  config = described(directory)
  config["text_config"]["hidden_act"] = "relu"
  config["vision_config"] |= {"hidden_act": "gelu", "intermediate_size": 100}
  with pytest.raises(ValueError) as raised:
    huggingface.config_from_json(config)
  for fault in (
    "text_config.hidden_act: expected 'gelu', found 'relu'",
    "vision_config.hidden_act: expected 'quick_gelu', found 'gelu'",
    "vision_config.intermediate_size: expected 4 * hidden_size = 192, found 100",
  ):
    assert fault in str(raised.value)

  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  del tensors["logit_scale"]
  tensors["vision_model.extra"] = np.zeros(3, np.float32)
  tensors["text_projection.weight"] = tensors["text_projection.weight"].T.copy()
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  with pytest.raises(ValueError) as raised:
    huggingface.load(directory, micro_config("micro_vit"))
  for fault in (
    f"{directory}: ",
    "missing: logit_scale ()",
    "unexpected: vision_model.extra (3,)",
    "shape of text_projection.weight: expected (24, 32), found (32, 24)",
  ):
    assert fault in str(raised.value)


def test_damaged_or_missing_weights_are_named(directory):
  weights = directory / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:1000])
  with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
    huggingface.load(directory, micro_config("micro_vit"))
  weights.unlink()
  with pytest.raises(ValueError, match="found none"):
    huggingface.load(directory, micro_config("micro_vit"))


def test_there_is_no_resnet(tmp_path):
  with pytest.raises(ValueError, match="has no ResNet"):
    huggingface.save(tmp_path / "hf", micro_config("micro_rn50"), {}, context_length=52)
  assert not (tmp_path / "hf").exists()
