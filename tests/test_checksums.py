"""Checksums of folders: what is written, what is told, and where they are looked at."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ofa_jax import checksums, hub
from ofa_jax.engine import checkpoint
from ofa_jax.engine.step import State
from tests.cnclip_golden import micro_config, micro_state_dict


def flip(path, at, bit=0):
  """Changes one bit of a file."""
  data = bytearray(path.read_bytes())
  data[at] ^= 1 << bit
  path.write_bytes(data)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "d" / "deep").mkdir(parents=True)
  for name, size in (("a", 3), ("deep/b", 3_000_000), ("empty", 0)):
    (tmp_path / "d" / name).write_bytes(bytes(range(256)) * (size // 256 + 1) if size else b"")
  checksums.write(tmp_path / "d")
  return tmp_path / "d"


def test_a_whole_folder_has_no_faults(folder):
  assert checksums.faults(folder) == []
  assert set(json.loads((folder / "checksums.json").read_text())["files"]) == {
    "a",
    "deep/b",
    "empty",
  }
  (folder / "README.md").write_text("a file of one's own")
  assert checksums.faults(folder) == []


def test_every_fault_is_told(folder, monkeypatch):
  flip(folder / "deep" / "b", 1_234_567, 6)
  (folder / "a").write_bytes(b"ab")
  (folder / "empty").unlink()
  lines = checksums.faults(folder)
  assert [line.split()[0] for line in lines] == ["a", "empty", "deep/b"]
  with pytest.raises(ValueError, match=r"deep/b has another content.*delete checksums.json"):
    checksums.verify(folder)
  assert checksums.faults(folder, under=("a",)) == lines[:1]
  shares = [checksums.faults(folder, part=(i, 3)) for i in range(3)]
  assert sorted(line for share in shares for line in share) == sorted(lines)
  monkeypatch.setenv("OFA_JAX_VERIFY", "0")
  assert checksums.faults(folder) == []


@pytest.mark.parametrize(
  "content", ["", "[]", '{"files": {"a": 3}}', '{"files": {"../x": [1, 2]}}', "[" * 100_000]
)
def test_damaged_checksums_are_a_fault(folder, content):
  (folder / "checksums.json").write_text(content)
  assert "checksums.json: expected" in checksums.faults(folder)[0]


def test_folders_of_older_versions_are_read(folder):
  (folder / "checksums.json").unlink()
  flip(folder / "a", 0)
  checksums.verify(folder)


def test_flipped_bits_of_model_directories_are_refused(tmp_path):
  from ofa_jax.convert.cnclip import table as cnclip

  config = micro_config("micro_vit")
  hub.save_directory(
    tmp_path / "m", config, *cnclip.from_torch(micro_state_dict("micro_vit"), config)
  )
  hub.load_directory(tmp_path / "m")
  files = [path for path in sorted((tmp_path / "m").rglob("*")) if path.stat().st_size > 0]
  files = [path for path in files if path.is_file() and path.name != checksums.NAME]
  rng = np.random.default_rng(0)
  for path in [*files, *rng.choice(files, 5)]:
    at, bit = rng.integers(path.stat().st_size), rng.integers(8)
    flip(path, at, bit)
    with pytest.raises(ValueError):
      hub.open_model(tmp_path / "m").load()
    flip(path, at, bit)
  hub.load_directory(tmp_path / "m")


def state(step):
  x = jnp.arange(5_000, dtype=jnp.float32) + step
  return State(
    step=jnp.int32(step), params={"x": x}, opt={"mu": x}, rest={}, ema=None, bad=jnp.zeros(2)
  )


def test_checkpoints_have_checksums_and_keep_working(tmp_path):
  layout = {
    "abstract": jax.eval_shape(lambda: state(0)),
    "shardings": jax.tree.map(lambda x: x.sharding, state(0)),
  }
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in range(4):
      checkpoints.save(state(step))
  steps = tmp_path / "checkpoints"
  assert sorted(p.name for p in steps.iterdir() if p.is_dir()) == ["2", "3"]
  assert all((steps / step / checksums.NAME).is_file() for step in ("2", "3"))
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest() == 3
    np.testing.assert_array_equal(
      checkpoints.restore(3, **layout).params["x"], state(3).params["x"]
    )
    rng = np.random.default_rng(1)
    for item, read in (
      ("train", lambda: checkpoints.restore(3, **layout)),
      ("model", lambda: checkpoints.restore_weights(3, **layout, ema=False)),
    ):
      files = [p for p in sorted((steps / "3" / item).rglob("*")) if p.is_file()]
      for path in [p for p in files if p.stat().st_size]:
        at, bit = rng.integers(path.stat().st_size), rng.integers(8)
        flip(path, at, bit)
        with pytest.raises(ValueError, match=rf"step 3 .*{item}/.* has another content"):
          read()
        flip(path, at, bit)
    checkpoints.restore(3, **layout)
    checkpoints.save(state(4))
  assert sorted(p.name for p in steps.iterdir() if p.is_dir()) == ["3", "4"]


def test_a_single_kept_checkpoint_gets_its_checksums_at_the_end(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    for step in range(3):
      checkpoints.save(state(step))
  assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()] == ["2"]
  assert (tmp_path / "checkpoints" / "2" / checksums.NAME).is_file()


def test_all_processes_refuse_what_one_has_found(tmp_path, monkeypatch):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state(1))
    checkpoints.wait()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    others = {"faults": 0}

    def gather(mine):
      return np.array([mine, others["faults"]])

    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)
    assert checkpoints._at(1).fault_of_checksums(["model"]) is None
    others["faults"] = 3
    assert "another process has read" in checkpoints._at(1).fault_of_checksums(["model"])
    monkeypatch.setattr(jax, "process_count", lambda: 1)
