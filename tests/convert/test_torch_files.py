"""PyTorch's files: what is read, what is refused."""

import argparse
import collections
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from ofa_jax.convert import torch_files
from tests import cnclip_files, hostile_pickles
from tests.fuzz_weights import stopped_after

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


def bits(tensor):
  return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_as_torch(path, expected):
  found = torch_files.load_state_dict(path)
  assert list(found) == list(expected)
  for name, tensor in expected.items():
    x = found[name]
    assert (f"torch.{x.dtype}", x.shape) == (str(tensor.dtype), tuple(tensor.shape)), name
    assert np.ascontiguousarray(x).tobytes() == bits(tensor), name
    assert not x.flags.writeable or not x.size
  return found


DTYPES = (
  *("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32"),
  *("int64", "uint16", "uint32", "uint64"),
)


@pytest.mark.parametrize("zipped", [True, False])
def test_all_tensors_are_those_of_torch_load(tmp_path, zipped):
  base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
  tensors = {name: torch.arange(7).to(getattr(torch, name)) for name in DTYPES}
  tensors |= {
    "transposed": base.transpose(0, 2),
    "slice": base[1, 1:, ::2],
    "row": base[2],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(base.clone()),
    "half of a parameter": torch.nn.Parameter(torch.ones(2).half(), requires_grad=False),
  }
  marked = torch.nn.Parameter(torch.ones(3))
  marked.note = "an attribute"
  tensors["with attributes"] = marked
  content = {
    "epoch": 3,
    "args": argparse.Namespace(arch="x", nested=argparse.Namespace(rate=0.5)),
    "state_dict": collections.OrderedDict(tensors),
    "more": [
      torch.Size([2]),
      torch.device("cpu"),
      torch.float16,
      {1, "a"},
      b"\x00\xff",
      1e-3,
      None,
    ],
    "optimizer": {"state": {0: {"step": torch.tensor(5.0), "exp_avg": base}}, (1, 2): 2**70},
    "lr": np.float64(1e-4),
    "counts": collections.Counter("aab"),
  }
  content["state_dict"]._metadata = collections.OrderedDict({"": {"version": 1}})
  torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
  found = assert_as_torch(tmp_path / "x.pt", tensors)
  assert np.shares_memory(found["transposed"], found["row"])
  assert torch_files.load_options(tmp_path / "x.pt")["arch"] == "x"


def test_options_that_cannot_be_shown_are_left_out(tmp_path):
  endless = ()
  for _ in range(60):
    endless = (endless, endless)
  options = {"arch": "x", "sizes": [1, 2], "eval_args": {"beam": 5}}
  nested = {"a": endless, "b": {"c": endless}, "d": [[1]], "e": argparse.Namespace()}
  content = {"model": {"x": torch.ones(1)}, "args": argparse.Namespace(**options, **nested)}
  torch.save({**content, torch_files.DESCRIBED: endless}, tmp_path / "x.pt")
  assert torch_files.load_options(tmp_path / "x.pt") == options


def test_newer_pickle_protocols_are_read(tmp_path):
  tensors = {"a": torch.ones(2), "b": torch.zeros(3).bfloat16()}
  torch.save({**tensors, "lr": np.float64(1)}, tmp_path / "x.pt", pickle_protocol=4)
  assert_as_torch(tmp_path / "x.pt", tensors)


class Scripted(torch.nn.Module):
  """Parameters, buffers, shared ones, and tensors that are neither."""

  def __init__(self):
    super().__init__()
    self.visual = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    self.register_buffer("mean", torch.ones(2))
    self.scale = torch.nn.Parameter(torch.tensor(2.0))
    self.shared = self.visual[0].weight
    self.plain = torch.ones(4)

  def forward(self, x):
    return self.visual(x * self.scale + self.mean)


@pytest.mark.parametrize("way", ["script", "trace", "half"])
def test_torchscript_archives_give_their_state_dict(tmp_path, way):
  module = Scripted().half() if way == "half" else Scripted()
  made = torch.jit.trace(module, torch.ones(2, 2)) if way == "trace" else torch.jit.script(module)
  torch.jit.save(made, tmp_path / "x.pt")
  found = torch_files.load_state_dict(tmp_path / "x.pt")
  expected = torch.jit.load(tmp_path / "x.pt").state_dict()
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    assert np.ascontiguousarray(found[name]).tobytes() == bits(tensor), name


class Writes(torch.nn.Module):
  """Its code, which TorchScript runs on opening the archive, writes a file or never ends."""

  def __init__(self, target: str, loops: bool):
    super().__init__()
    self.target, self.loops = target, loops
    self.weight = torch.nn.Parameter(torch.ones(2))

  def forward(self, x):
    return x + self.weight

  @torch.jit.export
  def __getstate__(self):
    return (self.target, self.loops, self.weight, self.training)

  @torch.jit.export
  def __setstate__(self, state: tuple[str, bool, torch.Tensor, bool]):
    self.target = state[0]
    self.loops = state[1]
    self.weight = state[2]
    self.training = state[3]
    while self.loops:
      self.training = not self.training
    torch.save(self.weight, self.target)


@pytest.mark.parametrize("loops", [False, True])
def test_code_of_torchscript_archives_never_runs(tmp_path, loops):
  target = tmp_path / "harm"
  torch.jit.save(torch.jit.script(Writes(str(target), loops)), tmp_path / "x.pt")
  target.unlink(missing_ok=True)
  if not loops:
    torch.jit.load(tmp_path / "x.pt")  # it would
    assert target.exists()
    target.unlink()
  with pytest.raises(ValueError, match=r"may run code .*Writes\.__setstate__.*refused"):
    torch_files.load_state_dict(tmp_path / "x.pt")
  assert not target.exists()


def test_tensors_that_numpy_has_not_are_one_line(tmp_path):
  sparse = torch.eye(3).to_sparse()
  quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
  for kind, x in {
    "float8_e4m3fn": torch.ones(2).to(torch.float8_e4m3fn),
    "complex64": torch.ones(2) * 1j,
    "sparse": sparse,
    "quantised": quantised,
    "meta": torch.ones(2, device="meta"),
    "negated": torch._neg_view(torch.ones(2)),
  }.items():
    for zipped in (True, False):
      if kind == "float8_e4m3fn" and not zipped:
        continue  # which that format cannot hold
      torch.save(
        {"a": torch.ones(1), "x": x}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped
      )
      with pytest.raises(ValueError, match=rf"x is a .*{kind}") as raised:
        torch_files.load_state_dict(tmp_path / "x.pt")
      assert "\n" not in str(raised.value)


def test_hostile_pickles_are_refused(tmp_path):
  target = tmp_path / "harm"
  names = set()
  for i, (name, data) in enumerate(hostile_pickles.generate(100, target=str(target))):
    path = tmp_path / ("x.pt" if i % 2 else "x.bin")
    path.write_bytes(data)
    if i % 2:
      with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/version", "3\n")
    with stopped_after(5), pytest.raises(ValueError) as raised:
      torch_files.load_state_dict(path)
    assert len(str(raised.value)) < 500, name
    names.add(name)
  assert len(names) > 50
  assert not target.exists()


def test_flipped_bits_are_refused(tmp_path):
  path = cnclip_files.save(
    tmp_path / "x.pt", {f"a{i}": np.ones(5_000, np.float32) for i in range(4)}
  )
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(40):
    data = bytearray(whole)
    name = f"x/data/{rng.integers(4)}".encode()
    at = whole.index(name) + 100 + rng.integers(4 * 5_000 - 100)  # inside its record
    data[at] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"differ from their checksums \(data/\d\).*get it again"):
      torch_files.load_state_dict(path)
    torch_files.load_state_dict(path, verify=False)
  data = bytearray(whole)
  data[whole.index(b"state_dict")] ^= 1
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r"x/data.pkl"):
    torch_files.load_state_dict(path, verify=False)


KINDS = {
  "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
  "page": (b"\n<!DOCTYPE html><html><body>404", "a web page"),
  "xml": (b"<?xml version='1.0'?><Error/>", "a web page"),
  "json": (b'{"error": "not found"}', "JSON text"),
  "gzip": (b"\x1f\x8b\x08\x00", "gunzip"),
  "hdf": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
  "empty": (b"", "an empty file"),
  "zeros": (bytes(9_000), "zeros, as a download"),
  "text": (b"hello", "opcode b'h'|refers to what it has not kept"),
  "tar": (b"\0" * 257 + b"ustar" + b"\0" * 600, "the tar format"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_weights_is_told_as_what_it_is(tmp_path, kind):
  content, message = KINDS[kind]
  (tmp_path / "x.pt").write_bytes(content)
  with pytest.raises(ValueError, match=message) as raised:
    torch_files.load_state_dict(tmp_path / "x.pt")
  assert str(raised.value).startswith(f"{tmp_path / 'x.pt'}: expected")


def test_broken_archives_are_told_as_what_they_are(tmp_path):
  whole = cnclip_files.save(tmp_path / "whole.pt", TENSORS).read_bytes()
  (tmp_path / "x.pt").write_bytes(whole[: whole.index(b"whole/data/1") + 20])
  with pytest.raises(ValueError, match="cut short in its record whole/data/1"):
    torch_files.load_state_dict(tmp_path / "x.pt")
  for archive, message in (
    ({"a.npy": b"x"}, "without a data.pkl"),
    ({"x/data.pkl": b"\x80\x02}.", "x/byteorder": b"big"}, "not little-endian"),
  ):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
      for name, data in archive.items():
        file.writestr(name, data)
    with pytest.raises(ValueError, match=message):
      torch_files.load_state_dict(tmp_path / "x.pt")
  data = bytearray(whole)
  at = whole.index(b"PK\x01\x02")
  data[at + 8] |= 1
  (tmp_path / "x.pt").write_bytes(data)
  with pytest.raises(ValueError, match="encrypted"):
    torch_files.load_state_dict(tmp_path / "x.pt")
  (tmp_path / "x.pt").unlink()
  (tmp_path / "x.pt").symlink_to("/dev/zero")
  with pytest.raises(ValueError, match="device or pipe"):
    torch_files.load_state_dict(tmp_path / "x.pt")


def test_a_safetensors_file_of_another_name_is_read(tmp_path):
  safetensors.numpy.save_file(TENSORS, tmp_path / "x.pt")
  assert_tensors(torch_files.load_state_dict(tmp_path / "x.pt"))
  assert torch_files.load_options(tmp_path / "x.pt") == {}
