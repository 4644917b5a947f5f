"""JSON of anybody, and the sizes in it."""

import dataclasses
import os

import pytest

from ofa_jax import hub
from ofa_jax.convert import json_files, limits
from ofa_jax.convert.cnclip import huggingface, model_config
from ofa_jax.convert.ofa import sizes as ofa_sizes
from ofa_jax.models.ofa import SIZES
from tests.cnclip_golden import micro_config
from tests.fuzz_weights import stopped_after

TEXTS = {
  "a list": (b"[1]", "found list"),
  "nothing": (b"", "Expecting value"),
  "cut short": (b'{"a": 1', "delimiter"),
  "deep lists": (b'{"a": ' + b"[" * 10_000, "nested too deep"),
  "deep objects": (b'{"a":' * 10_000, "nested too deep"),
  "NaN": (b'{"a": NaN}', "the number NaN"),
  "infinity": (b'{"a": -Infinity}', "the number -Infinity"),
  "a float too large": (b'{"a": 1e999}', "too large"),
  "a number of a million digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", "digits"),
  "a key twice": (b'{"a": {"b": 1, "b": 2}}', "the key 'b' twice"),
  "no UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
  "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "git lfs pull"),
  "a web page": (b"<!DOCTYPE html>\n<html></html>", "a web page"),
  "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_hostile_texts_are_one_line(tmp_path, kind):
  content, message = TEXTS[kind]
  path = tmp_path / "config.json"
  path.write_bytes(content)
  with stopped_after(5), pytest.raises(ValueError, match=message) as raised:
    hub.open_model(tmp_path)
  assert str(raised.value).startswith(f"{path}: expected a JSON object, found ")
  assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_files_without_end_are_refused(tmp_path):
  path = tmp_path / "config.json"
  with path.open("wb") as file:
    file.truncate(1 << 30)
  with pytest.raises(ValueError, match=r"found 1,073,741,824 bytes, more than"):
    hub.open_model(tmp_path)
  path.unlink()
  path.symlink_to("/dev/zero")
  with pytest.raises(ValueError, match="device or pipe"):
    hub.open_model(tmp_path)
  path.unlink()
  os.mkfifo(path)
  with stopped_after(5), pytest.raises(ValueError, match="device or pipe"):
    hub.open_model(tmp_path)
  path.unlink()
  path.mkdir()
  with pytest.raises(ValueError, match="a folder"):
    hub.open_model(tmp_path)


def test_a_byte_order_mark_is_no_fault(tmp_path):
  (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": "\xe7\x8c\xab"}')
  assert json_files.read(tmp_path / "x.json") == {"a": "猫"}


CHANGES = (
  {"layers": 10**9},
  {"layers": -1},
  {"layers": 0},
  {"layers": "12"},
  {"layers": 2.0},
  {"layers": True},
  {"layers": None},
  {"layers": [2]},
  {"layers": {}},
  {"width": 10**30},
  {"heads": 0},
  {"mlp": -4},
)


@pytest.mark.parametrize("change", CHANGES)
def test_impossible_sizes_are_refused_before_anything_is_built(change):
  described = model_config.to_json(micro_config("micro_vit"))
  described["text"] |= change
  (name,) = change
  with (
    stopped_after(5),
    pytest.raises(ValueError, match=rf"text\.{name} .*expected a whole"),
  ):
    model_config.from_json(described)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"encoder_layers": 10**9},
      "encoder_layers 1000000000, expected a whole number from 1 to",
    ),
    ({"stages": [3, 4, 10**9]}, r"stages\[2\] 1000000000"),
    ({"stages": [3, 4]}, "stages tuple, expected 3 numbers"),
    ({"stages": 3}, "not iterable"),
    ({"dropout": 7}, "dropout 7, expected a rate"),
    ({"scale_fc": "yes"}, "scale_fc 'yes', expected bool"),
    ({"name": 3}, "name 3, expected str"),
    ({"classifier": 3}, "classifier: expected a JSON object"),
    ({"classifier": {"classes": 10**12}}, "classifier.classes 1000000000000"),
    ({"batch_norm_eps": [1]}, "batch_norm_eps list"),
  ],
)
def test_impossible_sizes_of_an_ofa_are_refused(change, message):
  described = ofa_sizes.to_json(SIZES["tiny"]) | change
  with stopped_after(5), pytest.raises(ValueError, match=message):
    ofa_sizes.from_json(described)


@pytest.mark.parametrize(
  "described",
  [
    {"vision_config": []},
    {"text_config": "x"},
    {"vision_config": {"num_hidden_layers": 10**9}},
    {"vision_config": {"hidden_size": "768"}},
    {"vision_config": {"num_attention_heads": 0}},
    {"vision_config": {"hidden_size": -768, "intermediate_size": -3072}},
    {"text_config": {"num_hidden_layers": 10**9}},
    {"text_config": {"vocab_size": None}},
    {"text_config": {"hidden_dropout_prob": -1}},
    {"projection_dim": [512]},
  ],
)
def test_impossible_sizes_of_a_hugging_face_directory_are_refused(described):
  with stopped_after(5), pytest.raises(ValueError, match="expected"):
    huggingface.config_from_json(described)


def test_real_models_are_possible():
  for config in (*SIZES.values(), micro_config("micro_vit"), micro_config("micro_rn50")):
    assert limits.check(config) is config
  problem = dataclasses.replace(SIZES["huge"], heads=10**9, mlp=0)
  with pytest.raises(ValueError, match=r"mlp 0, .*; heads 1000000000, "):
    limits.check(problem)


@pytest.mark.parametrize(
  "settings",
  [{"context_length": -1}, {"context_length": "52"}, {"image_size": 10**9}, {"generation": []},
   {"generation": {"num_beams": 10**9}}, {"generation": {"temperature": 1e300}}],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match="expected the settings of a model, found"):
    limits.check_settings(settings)
