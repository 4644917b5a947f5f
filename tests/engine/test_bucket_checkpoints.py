"""Checkpoints in buckets, by TensorStore's drivers and Orbax's code, against emulators."""

import dataclasses
import os

import jax.numpy as jnp
import pytest

from ofa_jax import storage
from ofa_jax.engine import bucket_arrays, checkpoint, log, step_name
from ofa_jax.engine.best import Best
from tests import bucket_servers, tiny
from tests.engine.test_checkpoint import assert_same, layout, numbered, program_of


@pytest.fixture(scope="module")
def program(digits):
  """Of few numbers: a bucket is a process of Python here."""
  model = dataclasses.replace(tiny.MODEL, text=dataclasses.replace(tiny.BERT, vocab_size=64))
  return program_of(digits, ema=0.9, model=model)


def test_round_trip(bucket, program, services):
  state = numbered(program)
  with checkpoint.Checkpoints(bucket, keep=2) as checkpoints:
    assert checkpoints.latest() is None
    for number in (1, 2, 3):
      checkpoints.save(dataclasses.replace(state, step=jnp.int32(number)))
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.has_ema(3)
    assert_same(state, checkpoints.restore(3, **layout(program)))
  assert step_name.split_step(f"{bucket}@3") == (bucket, "3")
  at, params, _ = checkpoint.open_weights(bucket, **layout(program), which="2")
  assert at == 2
  assert_same(state.ema, params)
  assert not any(n[:2] == "1/" for n in storage.files_below(f"{bucket}/checkpoints"))
  if bucket.startswith("gs"):
    methods = {m for m, path in services["gs"].asked if "/d/" in path or "%2Fd%2F" in path}
    assert {"POST", "GET"} <= methods  # TensorStore's own requests


# Seconds each, for the emulators are of Python: of what does not depend on the service beyond what
# `test_round_trip` shows of both, one is quick.
SLOW = {s: pytest.param(s, marks=pytest.mark.slow) for s in bucket_servers.SCHEMES}
ON_GCS = pytest.mark.parametrize("bucket", ["gs", SLOW["s3"]], indirect=True)
ON_S3 = pytest.mark.parametrize("bucket", [SLOW["gs"], "s3"], indirect=True)


@ON_GCS
def test_a_save_cut_short_does_not_count(bucket, program):
  state = numbered(program)
  with checkpoint.Checkpoints(bucket) as checkpoints:
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(1)))
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(2)))
  storage.remove(f"{bucket}/checkpoints/2/commit_success.txt")
  with checkpoint.Checkpoints(bucket) as checkpoints:
    assert checkpoints.steps() == [1]
    checkpoints.remove_partial()
  assert {n.split("/")[0] for n in storage.files_below(f"{bucket}/checkpoints")} == {"1"}


@ON_S3
def test_a_run_that_was_copied_from_a_disk_goes_on(bucket, program, tmp_path):
  state = numbered(program)
  with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(1)))
  storage.upload(tmp_path / "run", bucket)
  for name in ("_CHECKPOINT_METADATA", "model/_METADATA"):  # of a save that was cut short
    storage.write_bytes(f"{bucket}/checkpoints/2/{name}", b"{}")
  with checkpoint.Checkpoints(bucket) as checkpoints:
    assert checkpoints.steps() == [1]
    restored = checkpoints.restore(1, **layout(program))
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(2)))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
  assert_same(dataclasses.replace(state, step=jnp.int32(1)), restored)


@ON_S3
def test_a_damaged_step_is_set_aside(bucket, program):
  state = numbered(program)
  with checkpoint.Checkpoints(bucket) as checkpoints:
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(1)))
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(2)))
  folder = f"{bucket}/checkpoints/2"
  name = next(n for n in storage.files_below(folder) if n.startswith("model/d/"))
  storage.write_bytes(f"{folder}/{name}", b"cut")
  said = []
  with checkpoint.Checkpoints(bucket) as checkpoints:
    restored = checkpoints.restore_newest(**layout(program), warn=said.append)
    assert int(restored.step) == 1
    assert checkpoints.steps() == [1]
  assert "2.damaged" in said[0] and name in said[0]
  assert storage.exists(f"{bucket}/checkpoints/2.damaged/model/_METADATA")


@ON_GCS
def test_the_best_is_named(bucket, program):
  state = numbered(program)
  rows = [{"step": 1, "valid/x": 0.5}, {"step": 2, "valid/x": 0.2}]
  with checkpoint.Checkpoints(bucket, keep=1, best=Best("valid/x", "max", rows)) as checkpoints:
    for number in (1, 2, 3):
      checkpoints.save(dataclasses.replace(state, step=jnp.int32(number)))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
  storage.write_bytes(f"{bucket}/config.json", b'{"best_metric": "valid/x"}')
  storage.write_bytes(f"{bucket}/{log.METRICS}", b'{"step": 1, "valid/x": 0.5}\n')
  with checkpoint.open_run(bucket) as run:
    assert run.find("best") == 1


@pytest.mark.slow  # a minute of waiting between tries
def test_saves_go_through_passing_faults(bucket, program, services, monkeypatch):
  monkeypatch.setitem(bucket_arrays.RETRIES, "initial_delay", "0.01s")
  monkeypatch.setattr(storage, "WAITS", (0.01,) * 3)
  services[bucket[:2]].rule = bucket_servers.every(3)
  state = numbered(program)
  with checkpoint.Checkpoints(bucket) as checkpoints:
    checkpoints.save(state)
    checkpoints.wait()
    assert_same(state, checkpoints.restore(3, **layout(program)))


def test_what_tensorstore_is_told(monkeypatch):
  monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host:1")
  monkeypatch.delenv("AWS_REGION", raising=False)
  monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
  described = bucket_arrays.kvstore("s3://b/runs/1/model")
  assert described.pop("s3_request_retries")["max_retries"] > 2
  assert described == {
    "driver": "s3",
    "bucket": "b",
    "path": "runs/1/model",
    "endpoint": "http://host:1",
    "aws_region": "eu-west-1",
  }
  described = bucket_arrays.kvstore("gs://b/runs/1/model")
  assert (described["driver"], described["bucket"]) == ("gcs", "b")


def test_local_runs_are_what_they_were(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert bucket_arrays.path_of("runs/1") == bucket_arrays.epath.Path(os.path.abspath("runs/1"))
  assert bucket_arrays.options("runs/1") == {}


def test_orbax_hands_arrays_to_the_drivers(bucket):
  """The same descriptions as of a local folder, but for where the bytes lie."""
  from orbax.checkpoint._src.serialization import tensorstore_utils

  bucket_arrays.prepare()
  there = tensorstore_utils.build_kvstore_tspec(f"{bucket}/1/model", use_ocdbt=True)
  here = tensorstore_utils.build_kvstore_tspec("/runs/1/model", use_ocdbt=True)
  assert there["driver"] == here["driver"] == "ocdbt"
  assert there["base"]["driver"] == {"gs": "gcs", "s3": "s3"}[bucket[:2]]
  assert here["base"]["driver"] == "file"
  assert there["base"]["path"].endswith("/1/model")
