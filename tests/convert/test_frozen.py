"""The tables of VQGAN, OpenAI's CLIP and Inception v3, and the files that these come in."""

import dataclasses
import sys
import types

import numpy as np
import pytest
import yaml

from ofa_jax import hub, trees
from ofa_jax.convert import families, inception, patches, rules, torch_files, vqgan
from ofa_jax.convert.cnclip import table as cnclip
from ofa_jax.convert.openai_clip import family as openai_clip
from ofa_jax.convert.openai_clip import table as clip
from ofa_jax.models.abstract import abstract
from ofa_jax.models.inception import InceptionConfig
from ofa_jax.models.patches import PatchCodecConfig
from tests import cnclip_golden
from tests.frozen_golden import LISTS, golden_json, shapes_of, state_dict

torch = pytest.importorskip("torch")

TABLES = {
  "vqgan": (vqgan.RULES, vqgan.IGNORED),
  "clip": (None, clip.IGNORED),
  "inception": (inception.RULES, inception.IGNORED),
}
OF = {"torchvision": "inception", "pytorch_fid": "inception"}
# What else the released files hold.
EXTRA = {
  "vqgan": ["loss.discriminator.main.0.weight", "loss.perceptual_loss.lin0.model.1.weight"],
  "clip": ["input_resolution", "context_length", "vocab_size"],
}


@pytest.mark.parametrize("name", LISTS)
def test_every_tensor_of_every_size_is_used(name):
  tensors = shapes_of(name)
  kind = OF.get(name, name.split("_")[0])
  (family,) = [family for family in families.FAMILIES if family.wrote(tensors)]
  config, _ = family.infer(tensors, {})
  table, ignored = TABLES[kind]
  table = table or clip.rules_of(config)
  _, params, rest = abstract(config)
  shapes = {p: x.shape for tree in (params, rest) for p, x in trees.flatten(tree).items()}
  extra = {key: np.zeros(1, np.float32) for key in EXTRA.get(kind, ())}
  if name == "pytorch_fid":  # as older files are
    tensors = {k: x for k, x in tensors.items() if "num_batches" not in k}
  used = rules.match({**tensors, **extra}, table, shapes=shapes, ignored=ignored)
  left = tensors.keys() - {tensor.name for tensor in used}
  assert all(n.startswith("AuxLogits.") or n.endswith(".num_batches_tracked") for n in left)
  number = trees.count(params)
  total = golden_json(*LISTS[name]).get("n_params", number)
  assert number + sum(tensors[n].size for n in left if n.endswith(("weight", "bias"))) == total
  if name == "clip":
    with pytest.raises(ValueError, match=r"1 differences.*\n.*unexpected: more"):
      rules.match({**tensors, "more": np.zeros(1)}, table, shapes=shapes, ignored=ignored)


def test_sizes_are_read_off_the_tensors():
  config, _ = vqgan.infer(shapes_of("vqgan"), {})
  assert (config.width, config.multipliers, config.blocks, config.attention) == (
    *(32, (1, 1, 2, 4), 1),
    (3,),
  )
  assert (config.num_codes, config.embed_dim, config.z_channels) == (32, 32, 32)
  assert vqgan.infer(shapes_of("vqgan_f8"), {})[0] == vqgan.RELEASED
  config, _ = openai_clip.infer(shapes_of("clip_b16"), {})
  assert config.name == "ViT-B/16" and (config.text.heads, config.vision.head_width) == (8, 64)
  assert (config.vision.image_size, config.embed_dim) == (224, 512)
  for name, classes in (("torchvision", 1000), ("pytorch_fid", 1008)):
    config, _ = inception.infer(shapes_of(name), {})
    assert config == InceptionConfig(variant=name, num_classes=classes, name=f"inception_v3_{name}")


@pytest.mark.parametrize("name", ["vqgan", "clip"])
def test_tensors_come_back_as_they_were(name, tmp_path):
  tensors = state_dict(name)
  (family,) = [family for family in families.FAMILIES if family.wrote(tensors)]
  config, settings = family.infer(tensors, {})
  family.save_torch(
    tmp_path / "x.pt", config, family.from_torch(tensors, config), settings=settings
  )
  found = torch_files.load_state_dict(tmp_path / "x.pt")
  assert found.keys() == tensors.keys()
  for key, x in tensors.items():
    np.testing.assert_array_equal(found[key], x, strict=True)
  again, _ = family.infer(found, torch_files.load_options(tmp_path / "x.pt"))
  assert again == config
  assert family.from_json(family.to_json(config)) == config


def test_a_table_of_patches_comes_back_with_the_side_of_its_pictures(tmp_path):
  config = PatchCodecConfig(image_size=16, patch_size=4, num_codes=3)
  table = np.random.default_rng(0).normal(size=(3, 48)).astype(np.float32)
  weights = {"patches": {"embedding": table}}, {}
  patches.FAMILY.save_torch(tmp_path / "x.pt", config, weights, settings={})
  source = hub.open_model(tmp_path / "x.pt")
  assert (source.family.name, source.config) == ("patches", config)
  np.testing.assert_array_equal(source.load()[0]["patches"]["embedding"], table)
  torch.save({"patches.weight": torch.from_numpy(table)}, tmp_path / "bare.pt")
  assert hub.open_model(tmp_path / "bare.pt").config.image_size == 32


def test_a_clip_with_a_resnet_has_chinese_clips_tower():
  """The one of which Chinese-CLIP's tower is proven to be the original's."""
  tower = {
    name.removeprefix("module."): x
    for name, x in cnclip_golden.micro_state_dict("micro_rn50").items()
    if name.startswith("module.visual.")
  }
  text = {name: x for name, x in state_dict("clip").items() if not name.startswith("visual.")}
  text["text_projection"] = np.ones((64, 40), np.float32)
  tensors = {**text, **tower}
  assert openai_clip.FAMILY.wrote(tensors)
  config, _ = openai_clip.infer(tensors, {})
  expected = cnclip_golden.micro_config("micro_rn50")
  assert (
    config.vision == expected.vision
    and clip.from_json(openai_clip.FAMILY.to_json(config)) == config
  )
  params, rest = clip.from_torch(tensors, config)
  stored = cnclip.from_torch(cnclip_golden.micro_state_dict("micro_rn50"), expected)
  for found, tree in ((params, stored[0]), (rest, stored[1])):
    assert not trees.difference(found["visual"], tree["visual"])
    for path, x in trees.flatten(tree["visual"]).items():
      np.testing.assert_array_equal(trees.flatten(found["visual"])[path], x)


def lightning(path, tensors, monkeypatch):
  """A checkpoint as PyTorch Lightning 1.0 writes it: states of callbacks under their classes."""
  name = "pytorch_lightning.callbacks.model_checkpoint"
  callback = type("ModelCheckpoint", (), {"__module__": name})
  module = types.ModuleType(name)
  module.ModelCheckpoint = callback
  for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
    monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
  monkeypatch.setitem(sys.modules, name, module)
  content = {
    "epoch": 3,
    "global_step": 1000,
    "pytorch-lightning_version": "1.0.8",
    "callbacks": {callback: {"best_model_score": torch.tensor(1.0), "dirpath": path.parent}},
    "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}}],
    "lr_schedulers": [],
    "state_dict": {k: torch.from_numpy(x) for k, x in tensors.items()},
  }
  torch.save(content, path)
  return path


def described(**changes):
  """A `model.yaml` as the released one, of the micro model."""
  params = golden_json(*LISTS["vqgan"])["config"]
  params["ddconfig"] |= changes
  return yaml.safe_dump({"model": {"target": "taming.models.vqgan.GumbelVQ", "params": params}})


def test_lightnings_checkpoints_are_read_with_their_sizes(tmp_path, monkeypatch):
  tensors = {**state_dict("vqgan"), "loss.discriminator.main.0.weight": np.zeros(1, np.float32)}
  path = lightning(tmp_path / "last.ckpt", tensors, monkeypatch)
  assert hub.open_model(path).config.image_size == 256  # the released one's
  (tmp_path / "model.yaml").write_text(described())
  source = hub.open_model(path)
  assert (source.family.name, source.config.image_size) == ("vqgan", 32)
  params, _ = source.load()
  np.testing.assert_array_equal(params["embed"]["embedding"], tensors["quantize.embed.weight"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"ch": 64}, "other sizes: ddconfig.ch: 64, the tensors 32"),
    ({"attn_resolutions": [8]}, r"attention at the levels: \[2\], the tensors \[3\]"),
    ({"resolution": "big"}, "resolution as a number of pixels, found 'big'"),
    ({"double_z": True}, "double_z: True, the tensors False"),
    ({"attn_resolutions": 4}, r"attention at the levels: \[\], the tensors \[3\]"),
  ],
)
def test_sizes_of_another_vqgan_are_told(changes, message, tmp_path):
  torch.save({"state_dict": {k: torch.from_numpy(x) for k, x in state_dict("vqgan").items()}},
             tmp_path / "last.ckpt")  # fmt: skip
  (tmp_path / "model.yaml").write_text(described(**changes))
  with pytest.raises(ValueError, match=message):
    hub.open_model(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
  "text",
  [
    "just text",
    "model: 3",
    "model: {params: {a: 1}}",
    "a: [",
    "!!python/object/apply:os.getcwd []",
    "a: &a [1]\nmodel: {params: {ddconfig: {ch: *a}}}",
  ],
)
def test_other_yaml_is_told(text, tmp_path):
  (tmp_path / "model.yaml").write_text(text)
  with pytest.raises(ValueError, match=r"expected the sizes of a VQGAN under model\.params"):
    vqgan.beside(tmp_path)


def test_damaged_descriptions_are_told():
  config = dataclasses.asdict(vqgan.RELEASED)
  for changes, message in (
    ({"multipliers": []}, "expected 1 to 12 numbers"),
    ({"attention": [-1]}, "whole number from 0 to 100"),
    ({"width": 0}, "width 0, expected a whole number from 1"),
  ):
    with pytest.raises(ValueError, match=f"does not describe a VQGAN.*{message}"):
      vqgan.FAMILY.from_json({**config, **changes})
  with pytest.raises(ValueError, match=r"does not describe an Inception v3.*num_classes"):
    inception.FAMILY.from_json({"variant": "torchvision", "num_classes": -1, "name": ""})
  with pytest.raises(ValueError, match="does not describe an OpenAI CLIP"):
    clip.from_json({"vision": {"patch_size": 16}, "text": {}})


def test_models_that_cannot_be_are_told():
  tensors = state_dict("vqgan")
  del tensors["encoder.conv_out.weight"]
  with pytest.raises(ValueError, match=r"found none of its 'encoder\.conv_out\.weight'"):
    vqgan.infer(tensors, {})
  tensors = shapes_of("torchvision")
  del tensors["fc.bias"]
  with pytest.raises(ValueError, match=r"found no fc\.bias"):
    inception.infer(tensors, {})
  tensors = shapes_of("clip")
  del tensors["text_projection"]
  with pytest.raises(ValueError, match="found none of its 'text_projection'"):
    openai_clip.infer(tensors, {})
  with pytest.raises(ValueError, match="expected merges of the model's 49000 tokens, found 49408"):
    config, _ = openai_clip.infer(shapes_of("clip"), {})
    config.text.vocab_size = 49000
    openai_clip.read_tokenizer(None, config)
