"""Sizes as JSON, in both kinds of fields."""

import json

import pytest

from ofa_jax.config import to_dict
from ofa_jax.convert.cnclip import model_config
from ofa_jax.models import cnclip
from tests.cnclip_files import MODEL_CONFIGS
from tests.cnclip_golden import MICRO, micro_config

NAMES = [*cnclip.MODELS.values(), ("ViT-B-32", "RBT3-chinese")]


@pytest.mark.parametrize("model", MICRO)
def test_the_originals_files_are_read(model, tmp_path):
  vision, text = MODEL_CONFIGS[model]
  expected = micro_config(model, dropout=0.1)
  assert model_config.read([vision, text]) == expected
  assert model_config.read([text, vision]) == expected
  merged = {**json.loads(vision.read_text()), **json.loads(text.read_text())}
  (tmp_path / "merged.json").write_text(json.dumps(merged))
  assert model_config.read([tmp_path / "merged.json"]) == expected


@pytest.mark.parametrize("names", NAMES)
def test_both_kinds_of_fields_hold_every_config(names):
  config = cnclip.config(*names)
  assert model_config.from_json(json.loads(json.dumps(model_config.to_json(config)))) == config
  # A run's config.json names the classes as well.
  assert model_config.from_json(json.loads(json.dumps(to_dict(config)))) == config
  config.name = ""
  assert model_config.from_fields(model_config.to_fields(config)) == config


def test_our_fields_hold_the_first_values_of_scale_and_bias():
  config = cnclip.config("ViT-B-16", "RBT3-chinese")
  config.logit_scale, config.logit_bias = 2.5, -10.0
  assert model_config.from_json(json.loads(json.dumps(model_config.to_json(config)))) == config


def test_all_faults_of_the_fields_are_listed():
  fields = model_config.to_fields(cnclip.config("ViT-B-16", "RBT3-chinese"))
  del fields["embed_dim"], fields["text_hidden_size"]
  fields |= {"vision_widht": 3, "vision_layers": "many", "vocab_size": "21128"}
  fields["text_hidden_act"] = "relu"
  with pytest.raises(ValueError) as raised:
    model_config.from_fields(fields)
  message = str(raised.value)
  for fault in (
    "missing field 'embed_dim'",
    "missing field 'text_hidden_size'",
    "unknown field 'vision_widht', did you mean 'vision_width'?",
    "vision_layers: expected a number (ViT) or a list of four (ResNet), found 'many'",
    "vocab_size: expected a number, found '21128'",
    "text_hidden_act: expected 'gelu', found 'relu'",
  ):
    assert fault in message


def test_one_tower_is_not_enough():
  with pytest.raises(ValueError, match=r"Micro-ViT\.json: .*missing field 'text_hidden_size'"):
    model_config.read(MODEL_CONFIGS["micro_vit"][:1])


@pytest.mark.parametrize("text", ["", "[1, 2]", "{"])
def test_files_that_are_no_json_object_are_named(tmp_path, text):
  (tmp_path / "x.json").write_text(text)
  with pytest.raises(ValueError, match=r"x\.json: expected a JSON"):
    model_config.read([tmp_path / "x.json"])
  with pytest.raises(ValueError, match=r"missing\.json: expected a JSON"):
    model_config.read([tmp_path / "missing.json"])


def test_unknown_own_fields_are_an_error():
  described = model_config.to_json(cnclip.config("RN50", "RBT3-chinese"))
  described["text"]["experts"] = 8
  with pytest.raises(ValueError, match="experts"):
    model_config.from_json(described)
  with pytest.raises(ValueError, match="does not describe a Chinese-CLIP"):
    model_config.from_json({"vision": {}})
