"""Chinese-CLIP's weights there and back again."""

import numpy as np
import pytest

from ofa_jax.convert import rules
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.models import cnclip
from tests.cnclip_golden import (
  MICRO,
  abstract,
  flatten,
  golden_json,
  micro_config,
  micro_state_dict,
)

REAL = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50")


@pytest.mark.parametrize("model", MICRO)
def test_round_trip_is_bit_equal(model):
  config, released = micro_config(model), micro_state_dict(model)
  back = convert.to_torch(*convert.from_torch(released, config), config)
  kept = {k.removeprefix("module."): v for k, v in released.items() if "bert.pooler" not in k}
  assert back.keys() == kept.keys()
  for name, x in kept.items():
    assert back[name].dtype == x.dtype
    if not name.endswith("num_batches_tracked"):
      np.testing.assert_array_equal(back[name], x, strict=True)


@pytest.mark.parametrize("model", MICRO)
def test_parameters_are_those_of_the_model(model):
  config = micro_config(model)
  _, params, rest = abstract(config)
  found = convert.from_torch(micro_state_dict(model), config)
  for ours, expected in zip(found, (params, rest), strict=True):
    ours, expected = flatten(ours), flatten(expected)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
      k: (v.shape, v.dtype) for k, v in expected.items()
    }


@pytest.mark.parametrize("name", REAL)
def test_real_size_names_and_shapes_are_the_originals(name):
  struct = golden_json("realsize", "state_dicts")[name]
  config = cnclip.config(*struct["struct"].split("@"))
  _, params, rest = abstract(config)
  shapes = {path: x.shape for path, x in {**flatten(params), **flatten(rest)}.items()}
  needed = {t.name: list(t.shape) for t in rules.needed_tensors(convert.rules_of(config), shapes)}
  expected = {k: v for k, v in struct["shapes"].items() if not k.endswith("num_batches_tracked")}
  assert needed == expected


@pytest.mark.parametrize("name", REAL)
def test_config_is_inferred_from_the_tensors(name):
  struct = golden_json("realsize", "state_dicts")[name]
  tensors = {k: np.broadcast_to(np.float32(0), shape) for k, shape in struct["shapes"].items()}
  expected = cnclip.config(*struct["struct"].split("@"))
  assert convert.infer_config(tensors) == expected
  assert convert.infer_config({f"module.{k}": v for k, v in tensors.items()}) == expected


def test_a_config_that_cannot_be_inferred_is_an_error():
  with pytest.raises(ValueError, match="--model-config=JSON"):
    convert.infer_config(micro_state_dict("micro_vit"))
  with pytest.raises(ValueError, match="Expected a Chinese-CLIP state dict"):
    convert.infer_config({"encoder.weight": np.zeros(3)})


def test_flash_attention_names_are_read():
  config, released = micro_config("micro_vit"), micro_state_dict("micro_vit")
  flash = {}
  for name, x in released.items():
    if ".attention.self." in name:
      prefix, _, kind = name.rpartition(".")
      prefix = prefix.rpartition(".")[0]
      parts = [released[f"{prefix}.{part}.{kind}"] for part in ("query", "key", "value")]
      flash[f"{prefix}.Wqkv.{kind}"] = np.concatenate(parts)
    else:
      name = name.replace("attention.output.dense", "attention.self.out_proj")
      flash[name.replace("in_proj_", "Wqkv.")] = x
  names = set(golden_json("micro_vit", "flash_attention_keys")["flash_keys"])
  assert names == {name for name in flash if "pooler" not in name}
  expected, found = (convert.from_torch(x, config)[0] for x in (released, flash))
  for path, x in flatten(expected).items():
    np.testing.assert_array_equal(flatten(found)[path], x)


def test_weights_of_another_model_are_an_error_that_lists_everything():
  released = micro_state_dict("micro_vit")
  with pytest.raises(ValueError) as raised:
    convert.from_torch(released, micro_config("micro_rn50"))
  message = str(raised.value)
  assert "missing: visual.layer1.block0" not in message
  assert "missing: visual.layer1.0.conv1.weight (8, 8, 1, 1)" in message
  assert "unexpected: visual.proj (48, 24)" in message
  assert "unexpected: bert.encoder.layer.3.output.dense.weight (32, 128)" in message
  assert "shape of text_projection: expected (32, 40), found (32, 24)" in message
  assert "pooler" not in message


@pytest.mark.parametrize("model", MICRO)
def test_the_original_layout_survives_a_torch_file(model, tmp_path):
  torch = pytest.importorskip("torch")
  config, released = micro_config(model), micro_state_dict(model)
  tensors = convert.to_torch(*convert.from_torch(released, config), config)
  path = tmp_path / "model.pt"
  torch.save({"state_dict": {k: torch.from_numpy(v) for k, v in tensors.items()}}, path)
  loaded = torch.load(path, weights_only=True)["state_dict"]
  again = convert.from_torch({k: v.numpy() for k, v in loaded.items()}, config)
  for ours, expected in zip(again, convert.from_torch(released, config), strict=True):
    for name, x in flatten(expected).items():
      np.testing.assert_array_equal(flatten(ours)[name], x, strict=True)
