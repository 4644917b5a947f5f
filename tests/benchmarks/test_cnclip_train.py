"""The training benchmark: what its arguments mean, and that both sides compute the same.

Its GPU half cannot run here; what differs there, fused attention and autocast, is run on the CPU.
"""

import argparse
import importlib
import math
from pathlib import Path

import numpy as np
import pytest

from ofa_jax.convert.cnclip import model_config
from tests.cnclip_golden import micro_config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def script(monkeypatch):
  """The script as a module, with its neighbours to import."""
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  return importlib.import_module("cnclip_train")


def test_arguments_depend_on_the_platform(script, capsys):
  cpu = script.parse([])
  assert (cpu.platform, cpu.models, cpu.steps) == ("cpu", ["ViT-B-16"], 1)
  gpu = script.parse(["--platform=gpu"])
  assert (gpu.models, gpu.steps) == (["ViT-B-16", "ViT-L-14", "ViT-H-14"], 20)
  assert script.parse(["--platform=gpu", "--models", "ViT-H-14", "--steps=3"]).steps == 3
  with pytest.raises(SystemExit):
    script.parse(["--models", "ViT-B-61"])
  assert "expected models out of ViT-B-16" in capsys.readouterr().err


def test_settings(script, tmp_path):
  (cpu,) = script.settings(script.parse([]), folder=tmp_path)
  assert (cpu.precision, cpu.unroll, cpu.batch_size) == ("fp32", 1, 16)
  gpu = script.settings(script.parse(["--platform=gpu"]), folder=tmp_path)
  assert [s.model for s in gpu] == ["ViT-B-16", "ViT-L-14", "ViT-H-14"]
  assert {(s.precision, s.unroll) for s in gpu} == {("bf16", 1)}
  assert gpu[2].fields["vision_head_width"] == 80
  args = script.parse(["--platform=gpu", "--batch-size=32", "--unroll=4"])
  assert {(s.batch_size, s.unroll) for s in script.settings(args, folder=tmp_path)} == {(32, 4)}
  assert script.product_shapes(cpu) == [(16 * 197, 768, 3072), (16 * 197, 3072, 768)]


@pytest.fixture
def setting(script, tmp_path):
  """The micro ViT on its data."""
  from input_pipeline import make_data

  make_data(tmp_path, 8)
  return script.Setting(
    model="micro",
    fields=model_config.to_fields(micro_config("micro_vit")),
    platform="cpu",
    batch_size=4,
    unroll=2,
    threads=1,
    folder=tmp_path,
  )


@pytest.mark.slow  # two processes compile and train: 40 s
def test_both_sides_train_the_same_model(script, setting):
  """Each in its process; the losses before the first step are compared inside."""
  pytest.importorskip("cn_clip")
  found = script.measure(setting, argparse.Namespace(steps=1, repeats=1))
  assert math.isclose(*found["loss"].values(), rel_tol=1e-5)
  assert found["pairs_per_second"].keys() == found["all_seconds"].keys()
  assert found["ofa_jax_over_cn_clip"].keys() == {"synthetic", "decoded"}
  assert found["share_of_peak"] is None and found["share_of_product"]["ofa_jax"] > 0
  for name in ("ofa_jax", "cn_clip"):
    assert found["peak_bytes"][name]["all"] >= found["peak_bytes"][name]["libraries"] > 0
    assert set(found["seconds_by_part"][name]) == {"forward", "forward and backward", "update"}


def test_fused_attention_of_bert_is_its_own(script):
  pytest.importorskip("cn_clip")
  import torch
  from torchvision_stand_in import stand_in_for_torchvision

  with stand_in_for_torchvision():
    from cn_clip.clip import modeling_bert
    from cn_clip.clip.configuration_bert import BertConfig

  class Fused(modeling_bert.BertSelfAttention):
    pass

  script.fuse_attention(Fused)
  config = BertConfig(vocab_size_or_config_json_file=8, hidden_size=32, num_attention_heads=4)
  torch.manual_seed(0)
  own = modeling_bert.BertSelfAttention(config).eval()
  fused = Fused(config).eval()
  fused.load_state_dict(own.state_dict())
  x = torch.randn(2, 6, 32)
  mask = -10000.0 * (torch.arange(6) > 3).float().expand(2, 1, 1, 6)
  with torch.no_grad():
    np.testing.assert_allclose(fused(x, mask)[0], own(x, mask)[0], atol=1e-6)


@pytest.mark.slow  # both compile, 20 s; tests/engine/test_step.py trains in bf16
def test_half_precision_trains(script, setting, monkeypatch):
  """The GPU's precision, on this CPU."""
  pytest.importorskip("cn_clip")
  monkeypatch.setattr(script.Setting, "precision", "bf16")
  theirs, ours = script.Theirs(setting), script.Ours(setting)
  assert math.isclose(ours.loss(), theirs.loss(), rel_tol=2e-2)
  for side in (ours, theirs):
    assert side.steps("synthetic", 1) > 0
    side.close()
