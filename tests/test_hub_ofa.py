"""OFA in every form that it is stored in, from fairseq's checkpoint to a run."""

import argparse
import hashlib
import json
import pathlib
import runpy
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import ofa_jax
from ofa_jax import hub, trees
from ofa_jax.config import to_dict
from ofa_jax.convert import torch_files
from ofa_jax.convert.family import of_mixture
from ofa_jax.convert.ofa import family as ofa_family
from ofa_jax.convert.ofa import sizes as ofa_sizes
from ofa_jax.convert.ofa import table as convert
from ofa_jax.engine.checkpoint import Checkpoints
from ofa_jax.engine.step import State
from ofa_jax.models.abstract import abstract
from ofa_jax.models.ofa import OFAConfig
from ofa_jax.tokenizers.ofa import OFATokenizer
from ofa_jax.weights import open_start
from tests.ofa_directory import write_words
from tests.ofa_files import GOLDEN
from tests.ofa_golden import error, golden, inputs, micro_config, micro_state_dict

torch = pytest.importorskip("torch")

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "convert_torch_weights.py"
SETTINGS = {
  "image_size": 64,
  "imagenet_normalization": False,
  "generation": {"num_beams": 4, "max_length": 20, "no_repeat_ngram_size": 3},
}
OPTIONS = {
  **ofa_sizes.to_options(micro_config(), SETTINGS),
  "eval_args": '{"beam":4,"max_len_b":20,"no_repeat_ngram_size":3}',
}


def weights():
  return convert.from_torch(micro_state_dict(), micro_config())


def assert_same(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), b, strict=True),
    tuple(found),
    tuple(expected),
  )


def tensors(**changes):
  released = {k: torch.from_numpy(np.array(x)) for k, x in micro_state_dict().items()}
  return {**released, **changes}


def save_fairseq(path, *, old=False, **more):
  """A checkpoint as fairseq's trainer leaves it, with `cfg` or with the older `args`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  options = argparse.Namespace(**OPTIONS)
  task = {"_name": "caption", "orig_patch_image_size": 256, "patch_image_size": 64}
  content = {
    "args": options if old else None,
    "cfg": None if old else {"_name": None, "common": {"seed": 1}, "task": task, "model": options},
    "model": tensors(),
    "criterion": None,
    "optimizer_history": [{"criterion_name": "C", "num_updates": 3, "lr_scheduler_state": {}}],
    "task_state": {},
    "extra_state": {"metrics": {}, "val_loss": np.float64(0.5)},
    **more,
  }
  torch.save(content, path)
  return path


def write_transformers_words(folder, words):
  """The tokenizer of a folder as transformers keeps it: vocab.json, merges.txt."""
  symbols = [*OFATokenizer.from_directory(words).symbols]
  encoder = json.loads((words / "encoder.json").read_text())
  spelled = {str(number): piece for piece, number in encoder.items()}
  vocab = {spelled.get(symbol, symbol): i for i, symbol in enumerate(symbols)}
  (folder / "vocab.json").write_text(json.dumps(vocab))
  pieces = vocab.keys()
  lines = (words / "vocab.bpe").read_text().splitlines()
  kept = [x for x in lines if x.startswith("#") or {*x.split(), x.replace(" ", "")} <= pieces]
  (folder / "merges.txt").write_text("\n".join(kept) + "\n")


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs the command and returns what it printed; `SystemExit` passes through."""
  tool = runpy.run_path(str(TOOL), run_name="tool")

  def run(*args):
    monkeypatch.setattr(sys, "argv", ["convert_torch_weights.py", *map(str, args)])
    tool["main"]()
    return capsys.readouterr().out

  return run


@pytest.mark.parametrize("old", [False, True])
def test_fairseqs_checkpoints_there_and_back(command, tmp_path, old):
  path = save_fairseq(tmp_path / "in" / "checkpoint_best.pt", old=old)
  write_words(path.parent)
  said = command(path, tmp_path / "ours")
  assert f"{path} (torch) -> {tmp_path / 'ours'} (orbax): unnamed sizes, " in said
  source = hub.open_model(tmp_path / "ours")
  assert (source.config, source.settings) == (micro_config(), SETTINGS)
  assert (source.form, source.image_size) == ("directory", 64)
  assert_same(source.load(), weights())
  described = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert (described["family"], described["format"]) == ("ofa", 1)
  assert described["tokenizer"] == {"kind": "gpt2"}
  words = (path.parent / "vocab.bpe").read_bytes()
  assert (tmp_path / "ours" / "vocab.bpe").read_bytes() == words
  assert source.tokenizer.vocab_size == 112

  command(tmp_path / "ours", tmp_path / "back.pt", "--to=torch")
  back = torch.load(tmp_path / "back.pt", weights_only=False)
  assert back["model"].keys() == tensors().keys()
  for name, x in tensors().items():
    if name.endswith(("_rp_bucket", "image_position_idx", "num_batches_tracked")):
      assert back["model"][name].dtype == x.dtype, name
    else:
      assert torch.equal(back["model"][name], x), name
  again = hub.open_model(tmp_path / "back.pt")
  assert (again.config, again.settings) == (source.config, source.settings)
  # The tied table is stored once.
  one, two = (back["model"][name] for name in convert.TIED)
  assert one.data_ptr() == two.data_ptr() == back["model"][convert.WORDS].data_ptr()


def test_the_moving_average_is_read_in_the_precision_there_is(command, tmp_path, capsys):
  words = tensors()[convert.WORDS]
  half = {name: (2 * words).half() for name in (convert.WORDS, *convert.TIED)}
  full = {name: 2 * words for name in (convert.WORDS, *convert.TIED)}
  for name, extra, expected in (
    ("half", {"ema": half}, (2 * words).half().float()),
    ("full", {"ema": half, "ema_fp32_params": full}, 2 * words),
  ):
    path = save_fairseq(tmp_path / f"{name}.pt", extra_state=extra)
    command(path, tmp_path / name, "--ema")
    found = hub.load_directory(tmp_path / name)[1]["tokens"]["embedding"]
    np.testing.assert_array_equal(np.asarray(found), expected.numpy())
    command(path, tmp_path / f"{name}-trained")
    assert_same(hub.load_directory(tmp_path / f"{name}-trained")[1:], weights())
  with pytest.raises(SystemExit):
    command(save_fairseq(tmp_path / "none.pt"), tmp_path / "x", "--ema")
  assert "expected a moving average" in capsys.readouterr().err


def test_options_may_be_in_a_namespace_but_run_no_code(tmp_path):
  class Malicious:
    def __reduce__(self):
      return exec, ("raise SystemExit('ran')",)

  path = save_fairseq(tmp_path / "x.pt", task_state={"x": Malicious()})
  with pytest.raises(ValueError, match="may run code"):
    hub.open_model(path)
  assert torch_files.load_options(save_fairseq(tmp_path / "y.pt"))["num_bins"] == 16


def test_state_dicts_without_options_are_as_released(tmp_path):
  torch.save(tensors(), tmp_path / "x.pt")
  config = hub.open_model(tmp_path / "x.pt").config
  assert (config.num_codes, config.num_bins, config.width) == (8192, 1000, 32)
  with pytest.raises(ValueError, match="expected the tensors of a Chinese-CLIP or an OFA"):
    torch.save({"x": torch.zeros(3)}, tmp_path / "z.pt")
    hub.open_model(tmp_path / "z.pt")


def test_transformers_directories_there_and_back(command, tmp_path):
  hub.save_directory(tmp_path / "ours", micro_config(), *weights(), settings=SETTINGS)
  command(tmp_path / "ours", tmp_path / "hf", "--to=hf")
  described = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert described["model_type"] == "ofa" and described["d_model"] == 32
  source = hub.open_model(tmp_path / "hf")
  assert (source.form, source.config) == ("huggingface", micro_config())
  assert source.settings == SETTINGS
  assert_same(source.load(), weights())


@pytest.mark.parametrize(
  "changes",
  [
    {"interpolate_position": True, "dropout": 0.1, "decoder_drop_path": 0.2},
    {"freeze_resnet": True, "entangle_position_embedding": True, "disable_entangle": False},
    {"batch_norm_eps": 1e-3, "scale_attn": False},
  ],
)
def test_what_is_written_is_read_again(changes):
  config = micro_config(**changes)
  shapes = {path: np.zeros(x.shape, x.dtype) for path, x in _flat(config).items()}
  params, rest = (
    traverse_util.unflatten_dict({k: x for k, x in shapes.items() if k in part}, sep="/")
    for part in map(trees.flatten, abstract(config)[1:])
  )
  written = convert.to_torch(params, rest, config)
  options = ofa_sizes.to_options(config, SETTINGS)
  described = json.loads(json.dumps(ofa_sizes.to_huggingface(config, SETTINGS)))
  for names, said in ((written, options), (convert.to_huggingface(written), described)):
    assert ofa_sizes.infer_config(names, said) == config
    assert ofa_sizes.settings(said) == SETTINGS


def _flat(config):
  _, params, rest = abstract(config)
  return {**trees.flatten(params), **trees.flatten(rest)}


def test_a_name_is_downloaded_and_converted_once(tmp_path, monkeypatch):
  released = convert.to_huggingface(tensors())
  torch.save(released, tmp_path / "pytorch_model.bin")
  described = {"model_type": "ofa", "code_dict_size": 32, "num_bins": 16}
  (tmp_path / "config.json").write_text(json.dumps({**described, "orig_patch_image_size": 64}))
  write_transformers_words(tmp_path, write_words(tmp_path / "words"))
  downloads = []

  def get(repo, file, *, local_dir):
    assert repo == "OFA-Sys/OFA-tiny"
    downloads.append(file)
    local_dir.mkdir(parents=True, exist_ok=True)
    (local_dir / file).write_bytes((tmp_path / file).read_bytes())

  def info(repo, paths):
    sha = hashlib.sha256((tmp_path / paths[0]).read_bytes()).hexdigest()
    large = paths[0].endswith(".bin")  # the hub keeps small files without a sum
    return [types.SimpleNamespace(lfs=types.SimpleNamespace(sha256=sha) if large else None)]

  monkeypatch.setattr("huggingface_hub.hf_hub_download", get)
  monkeypatch.setattr("huggingface_hub.HfApi", lambda: types.SimpleNamespace(get_paths_info=info))
  for _ in range(2):
    source = hub.open_model("OFA-tiny", download_root=tmp_path / "cache")
    assert (source.form, source.config) == ("directory", micro_config())
    assert_same(source.load(), weights())
  assert downloads == list(hub.RELEASES["OFA-tiny"].files)
  merges = (tmp_path / "merges.txt").read_bytes()
  assert (tmp_path / "cache" / "OFA-tiny" / "merges.txt").read_bytes() == merges
  assert source.tokenizer.vocab_size == 112


def test_runs_are_read(tmp_path):
  write_words(tmp_path / "words")
  task = {"tokenizer": str(tmp_path / "words"), "image_size": 96}
  config = {"model": to_dict(micro_config()), "task": task}
  (tmp_path / "config.json").write_text(json.dumps(config))
  params, rest = weights()
  state = State(
    step=np.int32(3), params=params, opt={}, rest=rest, ema=None, bad=np.zeros(2, np.int32)
  )
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(jax.tree.map(jnp.asarray, state))
  source = hub.open_model(tmp_path)
  assert (source.form, source.config, source.image_size) == ("run", micro_config(), 96)
  assert source.files == tmp_path / "words"
  assert_same(source.load(), weights())


def test_training_starts_from_a_model_that_lacks_parts(tmp_path):
  hub.save_directory(tmp_path / "ours", micro_config(), *weights(), settings=SETTINGS)
  path = save_fairseq(tmp_path / "x.pt")
  config = micro_config(scale_resids=True)
  for name in (tmp_path / "ours", path):
    source = open_start(name, config=config, seed=0)
    assert isinstance(source.config, OFAConfig) and source.config is config
    params, rest = source.load()
    factors = params["encoder"]["blocks"]["mlp"].pop("residual_scale")
    assert set(np.asarray(factors).ravel()) == {1.0}
    params["decoder"]["blocks"]["mlp"].pop("residual_scale")
    assert_same((params, rest), weights())
  # Options that change no parameter are the config's, not the stored model's.
  source = open_start(tmp_path / "ours", config=micro_config(dropout=0.1), seed=0)
  assert source.config.dropout == 0.1
  assert_same(source.load(), weights())


def test_a_tokenizer_that_is_not_there_is_asked_for(tmp_path):
  hub.save_directory(tmp_path / "ours", micro_config(), *weights())
  assert json.loads((tmp_path / "ours" / "config.json").read_text())["tokenizer"] is None
  with pytest.raises(ValueError, match=r"found none in .*put dict\.txt, encoder\.json, vocab\.bpe"):
    _ = hub.open_model(tmp_path / "ours").tokenizer


def test_a_checkpoint_alone_gives_the_originals_numbers(command, tmp_path):
  # As the original made it: 256 pixels for positions that are never interpolated, and no words.
  options = argparse.Namespace(**{**OPTIONS, "orig_patch_image_size": 256})
  path = save_fairseq(tmp_path / "alone" / "checkpoint.pt", cfg={"model": options})
  said = command(path, tmp_path / "ours")
  assert "reads ids, but no text yet. Expected the files of OFA's tokenizer" in said
  model, _ = ofa_jax.load_from_name(tmp_path / "ours")
  stored = golden("micro", "mm_batch")
  given = {name: np.asarray(x) for name, x in inputs(stored).items()}
  found = model.forward(
    given["tokens"],
    given["decoder_tokens"],
    images=given["image"],
    image_mask=given["image_mask"],
  )
  assert error(found, stored["logits"]) < 1e-5
  with np.load(GOLDEN / "generation" / "inputs.npz") as arrays:
    image = arrays["mm.patch_images"].transpose(0, 2, 3, 1)
    found = model.generate_tokens(
      arrays["mm.src_tokens"], image, arrays["mm.patch_masks"], no_repeat_ngram_size=3
    )
  case = json.loads((GOLDEN / "generation" / "beam_search.json").read_text())
  for hypotheses, expected in zip(found, case["caption_beam5_ngram3"]["hypos"], strict=True):
    assert [x["tokens"].tolist() for x in hypotheses] == [x["tokens"] for x in expected]
    for x, y in zip(hypotheses, expected, strict=True):
      assert x["score"] == pytest.approx(y["score"], abs=1e-4)
  missing = r"tokenizer beside the model, found none.*--tokenizer=DIR.*tokenizer= of load_from_name"
  with pytest.raises(ValueError, match=missing):
    model.caption(image[:1])
  with pytest.raises(ValueError, match=missing):
    model.answer(image[:1], ["is it raining?"], ["yes", "no"])

  # The tokenizer comes later: for one call, or into the directory.
  words = write_words(tmp_path / "words")
  assert ofa_jax.load_from_name(path, tokenizer=words)[0].tokenizer.vocab_size == 112
  assert "no text" not in command(path, tmp_path / "with", f"--tokenizer={words}")
  assert hub.open_model(tmp_path / "with").tokenizer.vocab_size == 112


def test_another_models_dictionary_is_refused(command, tmp_path, capsys):
  path = save_fairseq(tmp_path / "in" / "checkpoint.pt")
  write_words(path.parent)
  listed = path.parent / "dict.txt"
  listed.write_text(f"unused 1\n{listed.read_text()}")
  message = "expected a dictionary of the model's 112 symbols, found 113"
  for to in ("orbax", "hf"):
    with pytest.raises(SystemExit):
      command(path, tmp_path / "ours", f"--to={to}")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
  with pytest.raises(ValueError, match=message):
    ofa_jax.load_from_name(path)[0].caption(np.zeros((1, 64, 64, 3), np.uint8))
  with pytest.raises(ValueError, match=message):
    ofa_jax.load_from_name(path, tokenizer=path.parent)


@pytest.mark.parametrize("captions", ["caption.Caption", "reward.SelfCritical"])
def test_of_a_mixture_the_task_that_captions_speaks_for_the_model(captions):
  parts = {
    "vqa": {"_class": "x.VQA", "image_size": 32, "tokenizer": "words", "search": {"num_beams": 9}},
    "caption": {"_class": f"ofa_jax.tasks.{captions}", "search": {"num_beams": 2}},
  }
  settings = ofa_family.read_settings(of_mixture({"_class": "x.Mixture", "tasks": parts}))
  assert (settings["image_size"], settings["generation"]) == (32, {"num_beams": 2})
  alone = {"_class": "x.VQA", "image_size": 64}
  assert of_mixture(alone) == alone
