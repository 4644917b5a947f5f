"""Where models come from, with the Hugging Face Hub replaced at its two functions."""

import hashlib
import json
import os
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ofa_jax import hub
from ofa_jax.config import to_dict
from ofa_jax.convert import torch_files
from ofa_jax.convert.cnclip import table as convert
from ofa_jax.engine import sharding
from ofa_jax.engine.checkpoint import Checkpoints
from ofa_jax.engine.step import State
from ofa_jax.models import cnclip, ofa
from ofa_jax.models.abstract import abstract
from ofa_jax.tokenizers.bert import CONTEXT_LENGTH
from ofa_jax.weights import open_towers
from tests import cnclip_files, tiny
from tests.cnclip_golden import MICRO, flatten, micro_config, micro_state_dict


def weights(model="micro_vit"):
  return convert.from_torch(micro_state_dict(model), micro_config(model))


def assert_same(found, expected):
  found, expected = flatten(found), flatten(expected)
  assert found.keys() == expected.keys()
  for path, x in expected.items():
    np.testing.assert_array_equal(np.asarray(found[path]), x, strict=True)


@pytest.fixture
def directory(tmp_path):
  hub.save_directory(tmp_path / "model", micro_config("micro_vit"), *weights())
  return tmp_path / "model"


class FakeHub:
  """One file on the hub; `received` is what arrives of it."""

  def __init__(self, monkeypatch, name, content):
    self.name, self.content, self.received, self.downloads = name, content, content, 0
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

  def get_paths_info(self, repo, paths):
    assert repo == hub.RELEASES[self.name].repo and set(paths) <= set(hub.RELEASES[self.name].files)
    lfs = types.SimpleNamespace(sha256=hashlib.sha256(self.content).hexdigest())
    return [types.SimpleNamespace(lfs=lfs)]

  def download(self, repo, file, *, local_dir):
    self.downloads += 1
    local_dir.mkdir(parents=True, exist_ok=True)
    (local_dir / file).write_bytes(self.received)
    return str(local_dir / file)


@pytest.mark.parametrize("model", MICRO)
def test_model_directories_round_trip(tmp_path, model):
  config = micro_config(model, dropout=0.1)
  config.name = "micro@micro"
  params, rest = weights(model)
  hub.save_directory(tmp_path / "deep" / "x", config, params, rest, settings={"context_length": 24})
  found_config, found_params, found_rest = hub.load_directory(tmp_path / "deep" / "x")
  assert found_config == config
  assert_same(found_params, params)
  assert_same(found_rest, rest)
  source = hub.open_model(tmp_path / "deep" / "x")
  assert (source.form, source.settings) == ("directory", {"context_length": 24})
  assert source.tokenizer.vocab == tmp_path / "deep" / "x" / "vocab.txt"
  assert source.tokenizer.vocab.read_bytes().startswith(b"[PAD]")


def test_weights_go_where_they_are_wanted(directory):
  mesh = sharding.make_mesh((2, 4, 1))
  config = micro_config("micro_vit")
  _, params, rest = abstract(config)
  whole = sharding.replicated(mesh)
  places = sharding.params_shardings(params, config.sharding, mesh)
  found = hub.load_directory(directory, shardings=(places, jax.tree.map(lambda _: whole, rest)))[1]
  assert_same(found, weights()[0])
  assert found["bert"]["position"]["embedding"].sharding.spec == P(None, "fsdp")
  found = hub.load_directory(directory, shardings=whole)[1]
  assert found["bert"]["position"]["embedding"].sharding == whole


def test_an_existing_directory_is_not_replaced(directory):
  with pytest.raises(ValueError, match="exists already"):
    hub.save_directory(directory, micro_config("micro_vit"), *weights())


def test_weights_that_are_not_those_of_the_config_are_listed(directory):
  described = json.loads((directory / "config.json").read_text())
  described["text"]["layers"] = 3
  (directory / "config.json").write_text(json.dumps(described))
  with pytest.raises(ValueError, match=r"bert/blocks/attn/out/bias: expected \(3, 32\)") as raised:
    hub.load_directory(directory)
  assert "found 12 differences" in str(raised.value)


@pytest.mark.parametrize(
  "described, message",
  [
    ({"family": "cnclip", "format": 2}, "expected format 1, found 2"),
    ({"model_type": "siglip"}, "found {'model_type': 'siglip'}"),
    ({"family": "x"}, "found {'family': 'x'}"),
    ({"model_type": "chinese_clip", "vision_config": {"hidden_act": "gelu"}}, "quick_gelu"),
    ({"model": {"_class": "x.CNCLIPConfig"}}, "does not describe a Chinese-CLIP"),
    ({"family": "cnclip", "format": 1, "vision": {}}, "does not describe a Chinese-CLIP"),
    ([], "expected a JSON object, found list"),
    (None, "expected a JSON object, found"),
  ],
)
def test_other_directories_say_what_they_are(tmp_path, described, message):
  text = "{" if described is None else json.dumps(described)
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError) as raised:
    hub.open_model(tmp_path)
  assert message in str(raised.value)
  assert str(tmp_path) in str(raised.value)


def test_a_directory_without_a_config_is_an_error(tmp_path):
  with pytest.raises(ValueError, match=r"found no config\.json"):
    hub.open_model(tmp_path)


def test_fine_tuned_names_are_proposed():
  with pytest.raises(ValueError, match="did you mean OFA-large-caption or "):
    hub.open_model("OFA-large-captions")


def test_unknown_names_list_the_known_ones():
  with pytest.raises(ValueError) as raised:
    hub.open_model("ViT-L-14-366")
  message = str(raised.value)
  pretrained = [name for name, release in hub.RELEASES.items() if not release.finetuned]
  assert len(pretrained) == 12 and all(name in message for name in pretrained)
  assert "ofa_jax.available_models() has the fine-tuned ones" in message
  assert message.endswith("did you mean ViT-L-14-336 or ViT-L-14?")


def test_a_user_without_a_home_is_told(monkeypatch):
  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user nobody has listed
  for name in ("ViT-B-16", "~/model", "~nobody-here/model"):
    with pytest.raises(ValueError, match=r"Expected a home directory for ~.*Set HOME"):
      hub.open_model(name)


def test_every_release_is_a_model():
  sizes = [f"OFA-{size}" for size in ofa.SIZES]
  first = [*cnclip.MODELS, *sizes, "OFA-CN-base", "OFA-CN-large"]
  assert list(hub.RELEASES)[: len(first)] == first
  for name in list(hub.RELEASES)[len(first) :]:
    base = name.removesuffix("-stage1").rpartition("-")[0]  # what it was fine-tuned from
    assert base in first and hub.RELEASES[name].finetuned, name


@pytest.mark.parametrize("ema", [False, True])
def test_runs_are_read(tmp_path, digits, ema):
  config = tiny.config(digits, model=micro_config("micro_rn50"))
  (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
  params, rest = weights("micro_rn50")
  old = jax.tree.map(np.zeros_like, params)
  state = State(
    step=np.int32(3),
    params=old if ema else params,
    opt={"mu": old},
    rest=rest,
    ema=params if ema else None,
    bad=np.zeros(2, np.int32),
  )
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(jax.tree.map(jnp.asarray, state))
  source = hub.open_model(tmp_path)
  assert source.form == "run"
  assert source.config == config.model
  assert source.settings["context_length"] == config.task.context_length != CONTEXT_LENGTH
  found = source.load()
  assert_same(found[0], params)
  assert_same(found[1], rest)


def test_only_runs_have_steps(directory, tmp_path):
  with pytest.raises(
    ValueError, match=r"model@8: expected a run of ofa_jax.train, which has steps"
  ):
    hub.open_model(f"{directory}@8")
  with pytest.raises(ValueError, match=r"found '.*/nothing@8', which is none of them"):
    hub.open_model(tmp_path / "nothing@8")
  directory.rename(tmp_path / "model@8")
  assert hub.open_model(tmp_path / "model@8").form == "directory"


def test_a_name_is_downloaded_and_converted_once(tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  released = cnclip_files.save(tmp_path / "x.pt", micro_state_dict("micro_vit"))
  monkeypatch.setattr(convert, "infer_config", lambda _: micro_config("micro_vit"))
  fake = FakeHub(monkeypatch, "ViT-B-16", released.read_bytes())
  root = tmp_path / "cache"
  source = hub.open_model("ViT-B-16", download_root=root)
  assert_same(source.load()[0], weights()[0])
  assert {path.name for path in root.iterdir()} == {"ViT-B-16", "clip_cn_vit-b-16.pt"}
  assert torch.load(root / "clip_cn_vit-b-16.pt", weights_only=True)["epoch"] == 15

  monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the pickle was read again"))
  assert_same(hub.open_model("ViT-B-16", download_root=root).load()[0], weights()[0])
  assert fake.downloads == 1


def test_another_process_may_be_faster(tmp_path, monkeypatch):
  config = micro_config("micro_vit")

  def load():
    hub.save_directory(tmp_path / "RN50", config, *weights())
    return weights()

  (tmp_path / "clip_cn_rn50.pt").touch()
  source = hub.Source(config=config, load=load, form="torch", settings={})
  monkeypatch.setattr(hub, "_open_torch", lambda *_, **__: source)
  assert_same(hub.open_model("RN50", download_root=tmp_path).load()[0], weights()[0])


def test_a_file_that_is_there_is_not_downloaded(tmp_path, monkeypatch):
  fake = FakeHub(monkeypatch, "RN50", b"")
  (tmp_path / "clip_cn_rn50.pt").write_bytes(b"mine")
  assert hub.download("RN50", tmp_path).read_bytes() == b"mine"
  assert fake.downloads == 0


def test_a_damaged_download_is_removed(tmp_path, monkeypatch):
  fake = FakeHub(monkeypatch, "RN50", b"whole file")
  fake.received = b"whole fi"
  with pytest.raises(ValueError, match=r"expected SHA-256 .* start again"):
    hub.download("RN50", tmp_path)
  assert not (tmp_path / "clip_cn_rn50.pt").exists()
  fake.received = fake.content
  assert hub.download("RN50", tmp_path).read_bytes() == b"whole file"


def test_an_unreachable_hub_says_how_to_go_on(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise OSError("no route to host")

  FakeHub(monkeypatch, "RN50", b"")
  monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
  with pytest.raises(ValueError, match=r"no route to host.*resolve/main/clip_cn_rn50\.pt"):
    hub.download("RN50", tmp_path)


def test_towers_start_a_model(tmp_path):
  torch = pytest.importorskip("torch")
  tensors = {k.removeprefix("module."): x for k, x in micro_state_dict("micro_vit").items()}
  parts = {
    name: {k: torch.from_numpy(x) for k, x in tensors.items() if k.startswith(start)}
    for name, start in (("clip.pt", ("visual.", "logit_scale")), ("pytorch_model.bin", "bert."))
  }
  for name, part in parts.items():
    torch.save(part, tmp_path / name)
  for bert in (tmp_path, tmp_path / "pytorch_model.bin"):
    source = open_towers(tmp_path / "clip.pt", bert, config=micro_config("micro_vit"))
    params, _ = source.load()
    expected, _ = weights()
    assert_same(params["visual"], expected["visual"])
    assert_same(params["bert"], expected["bert"])
  shutil.copyfile(tmp_path / "clip.pt", tmp_path / "pytorch_model.bin")
  with pytest.raises(ValueError, match="found no BERT"):
    open_towers(tmp_path / "clip.pt", tmp_path)


@pytest.mark.parametrize("model", MICRO)
def test_released_files_are_read_without_pytorch(tmp_path, monkeypatch, model):
  pytest.importorskip("torch")
  path = cnclip_files.save(tmp_path / "x.pt", micro_state_dict(model))
  monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
  found = hub.open_model(path, config=micro_config(model)).load()
  assert_same(found[0], weights(model)[0])
  assert_same(found[1], weights(model)[1])
  with pytest.raises(ValueError, match=r"pip install torch"):
    torch_files.save_checkpoint(tmp_path / "y.pt", {}, name="x")


@pytest.mark.parametrize("prefix", ["", "module.module.", "_orig_mod.", "model.", "module.model."])
def test_wrapped_state_dicts_with_buffers_are_read(tmp_path, prefix):
  pytest.importorskip("torch")
  tensors = {k.removeprefix("module."): x for k, x in micro_state_dict("micro_vit").items()}
  tensors["bert.embeddings.position_ids"] = np.arange(64)[None]
  tensors["bert.embeddings.token_type_ids"] = np.zeros((1, 64), np.int64)
  tensors = {f"{prefix}{name}": x for name, x in tensors.items()}
  path = cnclip_files.save(tmp_path / "x.pt", tensors)
  assert_same(hub.open_model(path, config=micro_config("micro_vit")).load()[0], weights()[0])
  with pytest.raises(ValueError, match="heads of 64"):  # told as a Chinese-CLIP's
    hub.open_model(path)


def test_damaged_numbers_are_refused_with_the_files_name(tmp_path):
  pytest.importorskip("torch")
  tensors = {k: np.array(x) for k, x in micro_state_dict("micro_vit").items()}
  first, second, *_ = (name for name, x in tensors.items() if x.ndim == 2)
  tensors[first][1, 1], tensors[second][0] = np.nan, np.inf
  path = cnclip_files.save(tmp_path / "x.pt", tensors)
  with pytest.raises(
    ValueError, match=r"x\.pt: Expected finite weights, found 2 tensors"
  ) as raised:
    hub.open_model(path, config=micro_config("micro_vit")).load()
  assert "1 NaN of" in str(raised.value)
  tensors[first], tensors[second] = tensors[first].astype(np.int32), tensors[second] > 0
  path = cnclip_files.save(tmp_path / "y.pt", tensors)
  with pytest.raises(ValueError, match=r"y\.pt: Expected exactly .* 2 differences") as raised:
    hub.open_model(path, config=micro_config("micro_vit")).load()
  assert "found int32" in str(raised.value) and "found bool" in str(raised.value)


def test_a_model_says_which_files_its_weights_are_in(tmp_path, digits):
  run = tmp_path / "run"
  for step in (3, 12):
    (run / "checkpoints" / str(step)).mkdir(parents=True)
  (run / "config.json").write_text(json.dumps(to_dict(tiny.config(digits))))
  for name, step in ((run, "12"), (f"{run}@3", "3"), (run / "checkpoints" / "3", "3")):
    expected = [run / "config.json", run / "checkpoints" / step]
    assert hub.open_model(name).stored() == expected, name
