"""PyTorch's files: what is read, what is refused."""

import os
import pickle

import numpy as np
import pytest

from ofa_jax.convert import torch_files
from tests import cnclip_files

torch = pytest.importorskip("torch")

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float16([1.5, -2])}


class Malicious:
  """A pickle of this creates a file where it is opened without care."""

  def __init__(self, target):
    self.target = str(target)

  def __reduce__(self):
    return os.mkdir, (self.target,)


def assert_tensors(found):
  assert found.keys() == TENSORS.keys()
  for name, x in TENSORS.items():
    np.testing.assert_array_equal(found[name], x, strict=True)


def test_state_dicts_are_found_where_they_are(tmp_path):
  tensors = {k: torch.from_numpy(x) for k, x in TENSORS.items()}
  for content in (
    tensors,
    {"state_dict": tensors},
    {"state_dict": {**tensors, "_metadata": "x"}, "epoch": 3, "optimizer": {"state": {}}},
  ):
    torch.save(content, tmp_path / "x.pt")
    assert_tensors(torch_files.load_state_dict(tmp_path / "x.pt"))
  torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
  assert_tensors(torch_files.load_state_dict(tmp_path / "old.pt"))


def test_training_checkpoints_of_the_original_are_read(tmp_path):
  # Its scheduler leaves a NumPy float64, which PyTorch's `weights_only` refuses by itself.
  optimizer = {"param_groups": [{"lr": np.float64(1e-4), "betas": (0.9, 0.98)}]}
  path = cnclip_files.save(tmp_path / "epoch1.pt", TENSORS, optimizer=optimizer)
  with pytest.raises(pickle.UnpicklingError):
    torch.load(path, weights_only=True)
  assert_tensors(torch_files.load_state_dict(path))


def test_bfloat16_keeps_its_values(tmp_path):
  torch.save({"x": torch.tensor([1.5, -0.1]).bfloat16()}, tmp_path / "x.pt")
  found = torch_files.load_state_dict(tmp_path / "x.pt")["x"].astype(np.float32)
  np.testing.assert_array_equal(found, np.float32([1.5, -0.10009765625]))


def test_torchscript_archives_are_read(tmp_path):
  module = torch.nn.Linear(3, 2)
  torch.jit.save(torch.jit.script(module), tmp_path / "clip.pt")
  found = torch_files.load_state_dict(tmp_path / "clip.pt")
  np.testing.assert_array_equal(found["weight"], module.weight.detach().numpy())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, zipped):
  target = tmp_path / "harm"
  torch.save(
    {"state_dict": {"x": torch.ones(1)}, "name": Malicious(target)},
    tmp_path / "x.pt",
    _use_new_zipfile_serialization=zipped,
  )
  with pytest.raises(ValueError, match=r"may run code .*\bmkdir.*refused"):
    torch_files.load_state_dict(tmp_path / "x.pt")
  assert not target.exists()


def test_a_bare_pickle_is_refused(tmp_path):
  target = tmp_path / "harm"
  (tmp_path / "x.bin").write_bytes(pickle.dumps(Malicious(target)))
  with pytest.raises(ValueError, match=r"x\.bin: expected a pickle of tensors only"):
    torch_files.load_state_dict(tmp_path / "x.bin")
  assert not target.exists()


def test_damaged_files_are_named(tmp_path):
  whole = cnclip_files.save(tmp_path / "whole.pt", TENSORS).read_bytes()
  for name, content in (
    ("half.pt", whole[: len(whole) // 2]),
    ("empty.pt", b""),
    ("text.pt", b"version https://git-lfs.github.com/spec/v1\n"),
  ):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: expected a "):
      torch_files.load_state_dict(tmp_path / name)
  with pytest.raises(ValueError, match="found none"):
    torch_files.load_state_dict(tmp_path / "missing.pt")


def test_files_without_tensors_say_what_they_hold(tmp_path):
  torch.save({"args": {}, "epoch": 3}, tmp_path / "x.pt")
  with pytest.raises(ValueError, match=r"found \['args', 'epoch'\]"):
    torch_files.load_state_dict(tmp_path / "x.pt")
  torch.save([1, 2], tmp_path / "x.pt")
  with pytest.raises(ValueError, match="found list"):
    torch_files.load_state_dict(tmp_path / "x.pt")


def test_checkpoints_are_written_as_the_originals_training_does(tmp_path):
  torch_files.save_checkpoint(tmp_path / "x.pt", TENSORS, name="mine", epoch=2, step=70)
  content = torch.load(tmp_path / "x.pt", weights_only=True)
  assert {k: content.pop(k) for k in ("epoch", "step", "name")} == {
    "epoch": 2,
    "step": 70,
    "name": "mine",
  }
  assert list(content) == ["state_dict"]
  assert list(content["state_dict"]) == ["module.a.weight", "module.b"]
  assert content["state_dict"]["module.b"].dtype == torch.float16
