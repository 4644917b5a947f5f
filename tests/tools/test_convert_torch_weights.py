"""The conversion command, against the original's own code where that is installed."""

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ofa_jax import hub
from tests import cnclip_files
from tests.cnclip_golden import MICRO, error, golden, images, micro_state_dict
from tests.evaluation_golden import save_model

torch = pytest.importorskip("torch")

TOOL = Path(__file__).parents[2] / "tools" / "convert_torch_weights.py"


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs the command and returns what it printed; `SystemExit` passes through."""
  tool = runpy.run_path(str(TOOL), run_name="tool")

  def run(*args, configs=()):
    flags = ["--model-config", *map(str, configs)] if configs else []
    monkeypatch.setattr(sys, "argv", ["convert_torch_weights.py", *map(str, args), *flags])
    try:
      tool["main"]()
    except SystemExit as error:
      raise SystemExit(capsys.readouterr().err) from error
    return capsys.readouterr().out

  return run


@pytest.fixture
def cn_clip(monkeypatch):
  """The original's class CLIP; it imports torchvision only for its image transform."""
  try:
    import torchvision  # noqa: F401
  except ImportError:
    transforms = types.ModuleType("torchvision.transforms")
    for name in ("Compose", "InterpolationMode", "Normalize", "Resize", "ToTensor"):
      setattr(transforms, name, object)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
  return pytest.importorskip("cn_clip.clip.model").CLIP


@pytest.fixture(params=MICRO)
def released(request, tmp_path):
  """(name, a file like the released ones, the JSON files of its sizes)."""
  path = cnclip_files.save(tmp_path / "released.pt", micro_state_dict(request.param))
  return request.param, path, cnclip_files.MODEL_CONFIGS[request.param]


def load(path):
  return torch.load(path, weights_only=True)["state_dict"]


def assert_bit_equal(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    if not name.endswith("num_batches_tracked"):
      assert found[name].dtype == x.dtype, name
      assert torch.equal(found[name], x), name


def test_there_and_back_is_bit_equal(command, released, tmp_path):
  _, path, configs = released
  said = command(path, tmp_path / "ours", configs=configs)
  assert f"{path} (torch) -> {tmp_path / 'ours'} (orbax): unnamed sizes, " in said
  command(tmp_path / "ours", tmp_path / "back.pt", "--to=torch")
  expected = {k: x for k, x in load(path).items() if "bert.pooler" not in k}
  assert_bit_equal(load(tmp_path / "back.pt"), expected)
  # The tensors do not tell its heads, of 16 here: the file does.
  sources = [hub.open_model(tmp_path / name) for name in ("ours", "back.pt")]
  assert sources[0].config == sources[1].config and sources[0].settings == sources[1].settings


@pytest.mark.parametrize("model", MICRO)
def test_fp16_files_keep_their_values(command, model, tmp_path):
  half = cnclip_files.half_state_dict(model)
  path = cnclip_files.save(tmp_path / "half.pt", half)
  command(path, tmp_path / "ours", configs=cnclip_files.MODEL_CONFIGS[model])
  command(tmp_path / "ours", tmp_path / "back.pt", "--to=torch")
  expected = {k: x.float() if x.is_floating_point() else x for k, x in load(path).items()}
  assert_bit_equal(load(tmp_path / "back.pt"), expected)


def test_flash_attention_checkpoints_come_back_in_the_released_naming(command, tmp_path):
  optimizer = {"param_groups": [{"lr": np.float64(1e-4)}]}
  flash = cnclip_files.flash_state_dict()
  path = cnclip_files.save(tmp_path / "epoch3.pt", flash, optimizer=optimizer)
  command(path, tmp_path / "back.pt", "--to=torch", configs=cnclip_files.MODEL_CONFIGS["micro_vit"])
  expected = {k: torch.from_numpy(x) for k, x in micro_state_dict("micro_vit").items()}
  expected = {k: x for k, x in expected.items() if "bert.pooler" not in k}
  assert_bit_equal(load(tmp_path / "back.pt"), expected)


def test_cn_clip_computes_our_features(command, released, cn_clip, tmp_path):
  model, path, configs = released
  command(path, tmp_path / "ours", configs=configs)
  command(tmp_path / "ours", tmp_path / "back.pt", "--to=torch")
  fields = {k: v for file in configs for k, v in json.loads(file.read_text()).items()}
  if isinstance(fields["vision_layers"], str):
    fields["vision_layers"] = json.loads(fields["vision_layers"])
  original = cn_clip(**fields).eval()
  # As its loaders do it.
  original.load_state_dict({k[len("module.") :]: x for k, x in load(tmp_path / "back.pt").items()})
  arrays = golden(model, "forward")
  with torch.no_grad():
    image = original.encode_image(torch.from_numpy(arrays["images"]))
    text = original.encode_text(torch.from_numpy(arrays["token_ids"]).long())
  from ofa_jax import load_from_name

  ours, _ = load_from_name(tmp_path / "ours")
  assert error(ours.encode_image(images(arrays)), image) < 1e-4
  assert error(ours.encode_text(arrays["token_ids"]), text) < 1e-4


def differences(said):
  """The numbers that --check printed, relative to the largest feature."""
  lines = [line for line in said.splitlines() if "largest difference" in line]
  return [float(line.split()[-3]) / float(line.split()[-1]) for line in lines]


@pytest.mark.usefixtures("cn_clip")
def test_check_runs_the_original(command, released, tmp_path):
  _, path, configs = released
  said = command(path, tmp_path / "ours", "--check", configs=configs)
  assert "image features against cn_clip on " in said
  assert len(differences(said)) == 2
  assert max(differences(said)) < 1e-4


def test_check_runs_transformers(command, tmp_path):
  path = cnclip_files.save(tmp_path / "x.pt", micro_state_dict("micro_vit"))
  command(path, tmp_path / "ours", configs=cnclip_files.MODEL_CONFIGS["micro_vit"])
  said = command(tmp_path / "ours", tmp_path / "hf", "--to=hf", "--check")
  assert "text features against transformers on " in said
  assert len(differences(said)) == 2
  assert max(differences(said)) < 1e-4
  said = command(tmp_path / "hf", tmp_path / "again", "--check")
  assert max(differences(said)) < 1e-4


def test_two_towers_start_a_model(command, tmp_path):
  tensors = {k.removeprefix("module."): x for k, x in micro_state_dict("micro_vit").items()}
  for name, start in (("clip.pt", ("visual.", "logit_scale")), ("bert.bin", "bert.")):
    part = {k: torch.from_numpy(x) for k, x in tensors.items() if k.startswith(start)}
    torch.save(part, tmp_path / name)
  arguments = tmp_path / "clip.pt", tmp_path / "start.pt", "--to=torch"
  command(
    *arguments,
    f"--bert={tmp_path / 'bert.bin'}",
    configs=cnclip_files.MODEL_CONFIGS["micro_vit"],
  )
  found = load(tmp_path / "start.pt")
  for name, x in tensors.items():
    if name != "text_projection" and "bert.pooler" not in name:
      np.testing.assert_array_equal(found[f"module.{name}"].numpy(), x)


def test_faults_end_in_one_line_and_leave_nothing(command, released, tmp_path):
  model, path, configs = released
  other = cnclip_files.MODEL_CONFIGS[MICRO[1 - MICRO.index(model)]]
  (tmp_path / "half.pt").write_bytes(path.read_bytes()[:5000])
  (tmp_path / "taken").mkdir()
  out = tmp_path / "out"
  before = set(tmp_path.iterdir())
  for arguments, given, message in (
    ((path, out), (), "the number of heads cannot be inferred"),
    ((path, out), other, "Is the config the one of these weights?"),
    ((path, out), configs[:1], "missing field 'text_hidden_size'"),
    ((tmp_path / "half.pt", out), configs, "cut short"),
    ((tmp_path / "nothing.pt", out), (), "which is none of them"),
    ((path, tmp_path / "taken"), configs, "exists already"),
  ):
    with pytest.raises(SystemExit, match=r"^error: ") as raised:
      command(*arguments, configs=given)
    assert message in str(raised.value)
  assert set(tmp_path.iterdir()) == before


def test_flipped_bits_of_exports_are_refused(command, tmp_path):
  command(save_model(tmp_path, "vit"), tmp_path / "hf", "--to=hf")
  files = [path for path in sorted((tmp_path / "hf").iterdir()) if path.name != "checksums.json"]
  rng = np.random.default_rng(0)
  for path in [*files, *[tmp_path / "hf" / "model.safetensors"] * 15]:
    data = bytearray(path.read_bytes())
    at, bit = rng.integers(len(data)), 1 << rng.integers(8)
    for flip in (True, False):
      data[at] ^= bit
      path.write_bytes(data)
      if flip:
        with pytest.raises(ValueError):
          hub.open_model(tmp_path / "hf").load()
  hub.open_model(tmp_path / "hf").load()


def test_sizes_are_given_only_where_there_are_none(command, released, tmp_path):
  _, path, configs = released
  command(path, tmp_path / "ours", configs=configs)
  with pytest.raises(SystemExit, match=r"only for a \.pt"):
    command(tmp_path / "ours", tmp_path / "again.pt", "--to=torch", configs=configs)
