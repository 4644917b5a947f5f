"""OFA's weight table: the key lists of all sizes, both layouts, and there and back."""

import jax
import numpy as np
import pytest

from ofa_jax import trees
from ofa_jax.convert import rules
from ofa_jax.convert.ofa import sizes as ofa_sizes
from ofa_jax.convert.ofa import table as convert
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa import FREEZE, SIZES, ClassifierConfig
from tests.ofa_golden import (
  VARIANTS,
  golden_json,
  micro_config,
  micro_state_dict,
  rule_state_dict,
)

# Scalars of the released sizes, the tied table counted once (the paper's table 1, to the digit).
COUNTS = {
  "tiny": 33_488_336,
  "medium": 92_892_000,
  "base": 182_238_536,
  "large": 472_977_152,
  "huge": 929_486_848,
}


def listed(size):
  """The state dict of a released size, of arrays that take no memory."""
  lists = golden_json("realsize/state_dicts")[size]["state_dict"]
  return {
    name: np.broadcast_to(np.zeros((), dtype), shape) for name, (shape, dtype) in lists.items()
  }


@pytest.mark.parametrize("size", SIZES)
def test_the_key_lists_of_the_released_sizes_convert(size):
  tensors = listed(size)
  config = ofa_sizes.infer_config(tensors, {})
  assert config == SIZES[size]
  _, params, rest = abstract(config)
  assert trees.count(params) == COUNTS[size]
  shapes = convert.shapes_of({**params, "rest": rest})
  shapes = {path.removeprefix("rest/"): shape for path, shape in shapes.items()}
  untied = {name: x for name, x in tensors.items() if name not in convert.TIED}
  needed = rules.match(untied, convert.RULES, shapes=shapes, ignored=convert.IGNORED)
  left = set(untied) - {tensor.name for tensor in needed}
  assert left == {name for name in convert.buffers(micro_config())} | {
    name for name in tensors if name.endswith("num_batches_tracked")
  }


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_there_and_back_is_bit_equal(variant):
  released = micro_state_dict(variant)
  config = micro_config(**VARIANTS.get(variant, {}))
  found = convert.to_torch(*convert.from_torch(released, config), config)
  assert found.keys() == released.keys()
  buffers = convert.buffers(config)
  for name, x in released.items():
    if name in buffers or name.endswith("num_batches_tracked"):
      assert found[name].shape == x.shape, name
    else:
      np.testing.assert_array_equal(found[name], x, strict=True)


def test_buffers_are_the_originals():
  buckets = golden_json("position_buckets")
  for size in (256, 16):
    stored = buckets[f"token_bucket_{size}"]["by_relative_position_from_-1023_to_1023"]
    found = convert.buffers(micro_config_with(token_bucket_size=size))["encoder.token_rp_bucket"]
    distances = [*found[0, ::-1], *found[1:, 0]]
    np.testing.assert_array_equal(distances, stored)
  for size in (42, 8):
    stored = buckets[f"image_bucket_{size}"]
    options = {"image_bucket_size": size, "code_image_size": 32}
    found = convert.buffers(micro_config_with(**options))["decoder.image_rp_bucket"]
    assert list(found.shape) == stored["shape"] and found.dtype == np.int64
    np.testing.assert_array_equal(found[:5, :5], stored["corner5x5"])
    np.testing.assert_array_equal(found[50], stored["row_50"])
  for pixels, size in ((128, 42), (256, 42), (32, 8)):
    stored = buckets[f"decoder_image_position_idx_code{pixels}_bucket{size}"]
    options = {"image_bucket_size": size, "code_image_size": pixels}
    found = convert.buffers(micro_config_with(**options))["decoder.image_position_idx"]
    np.testing.assert_array_equal(found[: len(stored) - 1], stored[:-1])
    assert stored[-1] == "then 769 times 1024" and set(found[len(stored) - 1 :]) == {1024}
    assert len(found) == len(stored) - 1 + 769


def micro_config_with(**sizes):
  config = micro_config()
  for name, value in sizes.items():
    setattr(config, name, value)
  return config


def test_half_precision_is_widened():
  half = {
    k: x.astype(np.float16) if x.dtype == np.float32 else x for k, x in micro_state_dict().items()
  }
  params, _ = convert.from_torch(half, micro_config())
  words = params["tokens"]["embedding"]
  assert words.dtype == np.float32
  np.testing.assert_array_equal(words, half[convert.WORDS].astype(np.float32))


def test_copies_of_the_tied_table_must_be_equal():
  tensors = {**micro_state_dict(), convert.TIED[1]: micro_state_dict()[convert.WORDS] + 1}
  with pytest.raises(ValueError, match=r"decoder\.output_projection\.weight differs"):
    convert.from_torch(tensors, micro_config())
  alone = {k: x for k, x in micro_state_dict().items() if k not in convert.TIED}
  assert_same(convert.from_torch(alone, micro_config()), micro())
  last = {k: x for k, x in micro_state_dict().items() if k not in (convert.WORDS, convert.TIED[1])}
  assert_same(convert.from_torch(last, micro_config()), micro())


def micro():
  return convert.from_torch(micro_state_dict(), micro_config())


def assert_same(found, expected):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, expected)


def test_what_is_missing_or_left_over_is_listed_at_once():
  tensors = dict(micro_state_dict())
  del tensors["encoder.layers.1.fc1.bias"]
  tensors["encoder.layers.1.fc3.bias"] = np.zeros(3)
  tensors["decoder.layer_norm.bias"] = np.zeros(3)
  with pytest.raises(ValueError) as raised:
    convert.from_torch(tensors, micro_config())
  for line in (
    "missing: encoder.layers.1.fc1.bias (64,)",
    "unexpected: encoder.layers.1.fc3.bias (3,), like the missing encoder.layers.1.fc1.bias",
    "shape of decoder.layer_norm.bias: expected (32,), found (3,)",
  ):
    assert line in str(raised.value)


def test_transformers_layout_there_and_back():
  released = convert.to_torch(*micro(), micro_config())
  theirs = convert.to_huggingface(released)
  expected = {
    "encoder.layers.0.self_attn_mid_layer_norm.weight": "encoder.layers.0.attn_ln.weight",
    "encoder.layers.1.ffn_layer_norm.bias": "encoder.layers.1.ffn_layernorm.bias",
    "decoder.layers.0.self_attn_mid_layer_norm.bias": "decoder.layers.0.self_attn_ln.bias",
    "decoder.layers.0.cross_attn.c_attn": "decoder.layers.0.encoder_attn.c_attn",
    "decoder.layers.1.cross_attn_layer_norm.weight": (
      "decoder.layers.1.encoder_attn_layer_norm.weight"
    ),
    "decoder.layers.1.cross_attn_mid_layer_norm.bias": "decoder.layers.1.cross_attn_ln.bias",
    "decoder.layers.0.ffn_layer_norm.weight": "decoder.layers.0.ffn_layernorm.weight",
    "encoder.embed_images.layer1.0.conv1.weight": "encoder.embed_images.layer1.0.conv1.weight",
  }
  for name, fairseq in expected.items():
    assert theirs[name] is released[fairseq]
  assert not any("encoder_attn" in name or "layernorm." in name for name in theirs)
  assert convert.standard_names(theirs).keys() == released.keys()
  assert_same(convert.from_torch(theirs, micro_config()), micro())
  assert ofa_sizes.infer_config(theirs, OPTIONS) == micro_config()


OPTIONS = {"code_dict_size": 32, "num_bins": 16, "orig_patch_image_size": 64}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_has_no_such_parts(variant):
  config = micro_config(**VARIANTS[variant])
  tensors = convert.to_torch(*convert.from_torch(micro_state_dict(variant), config), config)
  with pytest.raises(ValueError, match="use --to=torch"):
    convert.to_huggingface(tensors)


def test_old_names_are_read():
  tensors = {}
  for name, x in micro_state_dict().items():
    name = name.replace("encoder.layers.0.final_layer_norm", "encoder.layers.0.layer_norms.1")
    name = name.replace("decoder.layers.1.encoder_attn_layer", "decoder.layers.1.layer_norms.1")
    tensors[name.replace("layer_norms.1_norm", "layer_norms.1")] = x
  attn = "decoder.layers.0.self_attn"
  for kind in ("weight", "bias"):
    parts = [tensors.pop(f"{attn}.{part}_proj.{kind}") for part in "qkv"]
    tensors[f"{attn}.in_proj_{kind}"] = np.concatenate(parts)
  assert_same(convert.from_torch(tensors, micro_config()), micro())


def test_heads_of_any_name():
  config = micro_config(classifier=ClassifierConfig(classes=3, hidden=24))
  shapes = {"dense.weight": (24, 32), "dense.bias": (24,), "out_proj.weight": (3, 24)}
  shapes["out_proj.bias"] = (3,)
  head = rule_state_dict({f"classification_heads.mnli.{k}": s for k, s in shapes.items()})
  tensors = {**micro_state_dict(), **head}
  assert ofa_sizes.infer_config(tensors, OPTIONS) == config
  params, _ = convert.from_torch(tensors, config)
  expected = head["classification_heads.mnli.dense.weight"].T
  np.testing.assert_array_equal(params["classifier"]["dense"]["kernel"], expected)


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_options_there_and_back(variant):
  config = micro_config(
    **VARIANTS.get(variant, {}),
    interpolate_position=True,
    dropout=0.1,
    encoder_drop_path=0.2,
    batch_norm_eps=1e-3,
  )
  settings = {
    "image_size": 480,
    "imagenet_normalization": True,
    "generation": {"num_beams": 10, "max_length": 16, "no_repeat_ngram_size": 3},
  }
  options = ofa_sizes.to_options(config, settings)
  assert ofa_sizes.infer_config(micro_state_dict(variant), options) == config
  assert ofa_sizes.settings(options) == settings
  assert ofa_sizes.from_json(ofa_sizes.to_json(config)) == config


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"encoder_normalize_before": False}, "encoder_normalize_before: expected True, found False"),
    ({"attn_scale_factor": 1}, "attn_scale_factor: expected 2, found 1"),
  ],
)
def test_options_of_another_model_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    ofa_sizes.infer_config(micro_state_dict(), options)
  with pytest.raises(ValueError, match="Expected an OFA's state dict"):
    ofa_sizes.infer_config({"encoder.x": np.zeros(3)}, {})


def test_frozen_patterns_are_the_originals():
  """Trained are exactly the tensors that the original trains, by their names there."""
  variants = golden_json("micro/variants")
  for variant, way in (
    ("adapter", "adapter"),
    ("prefix_plain", "prompt"),
    ("prefix_proj", "prompt"),
  ):
    trained = trained_names(variant, FREEZE[way])
    assert trained == set(variants[variant]["trainable"]), variant
  names = set(micro_state_dict()) - set(convert.buffers(micro_config()))
  bitfit = {n for n in names if n.endswith("bias") and ("layer_norm" in n or ".fc" in n)}
  assert trained_names(None, FREEZE["bitfit"]) == bitfit
  norms = {n for n in names if ".bn" in n or "downsample.1" in n}
  everything = trained_names(None, ("^$",))
  assert everything - trained_names(None, FREEZE["resnet_norms"]) == norms & everything


def trained_names(variant, freeze):
  """PyTorch's names of the parameters that these patterns leave trained."""
  config = micro_config(**VARIANTS.get(variant, {}))
  _, params, _ = abstract(config)
  kept = {
    path: x
    for path, x in convert.shapes_of(params).items()
    if not trees.first_match(((p, True) for p in freeze), path)
  }
  return {tensor.name for tensor in rules.needed_tensors(convert.RULES, kept)}
