"""Files as they are released, through the command and into use: VQGAN, OpenAI's CLIP, Inception."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import yaml
from flax import nnx
from PIL import Image

from ofa_jax import api, hub, storage
from ofa_jax.convert import __main__ as command
from ofa_jax.data import images
from ofa_jax.models import vqgan
from ofa_jax.models.abstract import abstract
from tests.frozen_golden import DIR, LISTS, error, golden, golden_json, last, state_dict

TEXTS = ["a dog runs on the beach", "An OLD train: 3 wagons!", "it's a cat's toy"]


@pytest.fixture(autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


def opened(path):
  """The stored model."""
  source = hub.open_model(path)
  return source, nnx.merge(abstract(source.config)[0], *source.load())


def scripted(tensors):
  """A TorchScript module with these tensors, in half precision where they are matrices."""
  root = torch.nn.Module()
  for name, x in tensors.items():
    *folders, last_name = name.split(".")
    module = root
    for folder in folders:
      if not hasattr(module, folder):
        module.add_module(folder, torch.nn.Module())
      module = getattr(module, folder)
    module.register_buffer(last_name, torch.from_numpy(np.array(x)))
  return torch.jit.script(root)


def test_a_vqgan_draws_as_the_original(tmp_path):
  tensors = {**state_dict("vqgan"), "loss.perceptual_loss.lin0.model.1.weight": np.ones(2)}
  torch.save(
    {"state_dict": {k: torch.from_numpy(x) for k, x in tensors.items()}, "global_step": 7},
    tmp_path / "last.ckpt",
  )
  params = golden_json(*LISTS["vqgan"])["config"]
  (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
  # As people start it, once.
  done = subprocess.run(
    [sys.executable, "-m", "ofa_jax.convert", tmp_path / "last.ckpt", tmp_path / "vqgan"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "3,039,395 parameters" in done.stdout
  source, model = opened(tmp_path / "vqgan")
  assert (source.form, source.image_size) == ("directory", 32)
  arrays = golden("vqgan", "micro")
  pixels = np.asarray(jax.jit(lambda codes: vqgan.to_uint8(model.decode(codes)))(arrays["codes"]))
  assert np.abs(pixels.astype(int) - arrays["decoded_uint8"]).max() <= 1
  np.testing.assert_array_equal(
    jax.jit(model.encode)(last(arrays["image"])), arrays["argmax_codes"]
  )
  command.convert(str(tmp_path / "vqgan"), str(tmp_path / "back.pt"), to="torch")
  back = torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"]
  assert back.keys() == state_dict("vqgan").keys()
  with pytest.raises(ValueError, match="Hugging Face's libraries know for --to=hf, found a VQGAN"):
    command.convert(str(tmp_path / "vqgan"), str(tmp_path / "hf"), to="hf")
  with pytest.raises(ValueError, match="Expected a Chinese-CLIP or OFAs, found a VQGAN"):
    api.load_from_name(tmp_path / "vqgan")


def test_a_clip_judges_as_the_original_and_transformers(tmp_path, capsys):
  """From a TorchScript archive to a model directory, to transformers and back."""
  transformers = pytest.importorskip("transformers")
  extras = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
  tensors = {**state_dict("clip"), **{k: np.int64(x) for k, x in extras.items()}}
  scripted(tensors).save(tmp_path / "ViT.pt")
  command.convert(str(tmp_path / "ViT.pt"), str(tmp_path / "clip"), check=False)
  source, model = opened(tmp_path / "clip")
  assert json.loads((tmp_path / "clip" / "config.json").read_text())["family"] == "openai_clip"
  arrays = golden("openai_clip", "micro")
  captions = json.loads((DIR / "openai_clip" / "captions.json").read_text())[:7]  # one is Chinese
  tokens = source.tokenizer(captions)
  np.testing.assert_array_equal(tokens, arrays["text"][:7])
  text = jax.jit(model.encode_text)(tokens)
  assert error(text, arrays["text_features"][:7]) < 1e-4
  assert error(jax.jit(model.encode_image)(last(arrays["image"])), arrays["image_features"]) < 1e-4

  command.convert(str(tmp_path / "clip"), str(tmp_path / "hf"), to="hf", check=True)
  told = capsys.readouterr().out
  assert "image features against transformers" in told
  other = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
  with torch.no_grad():
    pixels = torch.from_numpy(arrays["image"])
    outputs = other(input_ids=torch.from_numpy(arrays["text"]), pixel_values=pixels)
  assert error(outputs.logits_per_image.numpy(), arrays["logits_per_image"]) < 1e-4
  theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "hf")
  for text in TEXTS:
    ids = source.tokenizer.pieces(text)
    assert theirs(text)["input_ids"] == [source.tokenizer.start, *ids, source.tokenizer.end]
  picture = DIR / "openai_clip" / "images" / "rgb_50x97.png"
  processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "hf")
  prepared = processor(Image.open(picture), return_tensors="np")["pixel_values"][0]
  ours = images.normalize(images.decode_cropped(storage.read_bytes(picture), size=64))
  np.testing.assert_allclose(np.moveaxis(prepared, 0, -1), ours, rtol=0, atol=1e-5)

  command.convert(str(tmp_path / "hf"), str(tmp_path / "back.pt"), to="torch")
  back = torch.load(tmp_path / "back.pt", weights_only=True)
  assert back.keys() == state_dict("clip").keys()
  for name, x in state_dict("clip").items():
    np.testing.assert_array_equal(back[name].numpy(), x)


@pytest.mark.slow  # four files of 100 MB, 8 s
def test_both_inceptions_are_told_apart(tmp_path):
  for name in ("torchvision", "pytorch_fid"):
    tensors = {k: torch.from_numpy(np.array(x)) for k, x in state_dict(name).items()}
    torch.save(tensors, tmp_path / f"{name}.pth")
    command.convert(str(tmp_path / f"{name}.pth"), str(tmp_path / name))
    source = hub.open_model(tmp_path / name)
    assert (source.family.name, source.config.variant) == ("inception", name)
    params, rest = source.load()
    weight = tensors["Mixed_7c.branch3x3dbl_3b.conv.weight"].numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["Mixed_7c"]["branch3x3dbl_3b"]["conv"]["kernel"], weight)
    mean = tensors["Mixed_5b.branch_pool.bn.running_mean"].numpy()
    np.testing.assert_array_equal(rest["Mixed_5b"]["branch_pool"]["bn"]["mean"], mean)
