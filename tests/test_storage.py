"""Files, outputs, locks and copies in buckets, against emulated GCS and S3."""

import json
import os
import pathlib
import threading
import time

import numpy as np
import pytest

from ofa_jax import checksums, files, outputs, partial, staging, storage, text_files
from ofa_jax.engine import growing, lock
from tests import bucket_servers


def rule_of(services, place):
  """Sets what fails of the service that a place is in."""

  def setter(rule):
    services[place[:2]].rule = rule

  return setter


def test_objects_are_files(bucket):
  assert not storage.exists(bucket)
  storage.write_bytes(f"{bucket}/a/b.txt", b"0123456789")
  files.write_text(f"{bucket}/a/c.txt", "绿")
  assert storage.is_file(f"{bucket}/a/b.txt") and not storage.is_dir(f"{bucket}/a/b.txt")
  assert storage.is_dir(f"{bucket}/a") and not storage.is_file(f"{bucket}/a")
  assert not storage.exists(f"{bucket}/a/b.tx")
  assert storage.read_range(f"{bucket}/a/b.txt", 3, 4) == b"3456"
  assert storage.read_range(f"{bucket}/a/b.txt", 8, 4) == b"89"
  assert storage.stat(f"{bucket}/a/b.txt").size == 10
  assert storage.glob(f"{bucket}/a/*.txt") == [f"{bucket}/a/b.txt", f"{bucket}/a/c.txt"]
  assert list(storage.files_below(bucket)) == ["a/b.txt", "a/c.txt"]
  assert text_files.read(f"{bucket}/a/c.txt") == "绿"
  with storage.opened(f"{bucket}/a/b.txt") as file:
    assert file.peek(2)[:2] == b"01" and file.read(3) == b"012"
    file.seek(-2, os.SEEK_END)
    assert file.read() == b"89"
  before = storage.stat(f"{bucket}/a/b.txt")
  storage.write_bytes(f"{bucket}/a/b.txt", b"012345678X")
  assert storage.stat(f"{bucket}/a/b.txt").stamp != before.stamp
  for end in (b"\r", b"\n", b"\r\n", b"\n\r"):
    storage.write_bytes(f"{bucket}/a/b.txt", b"\x00" + end)
    assert storage.read_bytes(f"{bucket}/a/b.txt") == b"\x00" + end
  with pytest.raises(FileExistsError):
    storage.write_bytes(f"{bucket}/a/b.txt", b"", new=True)
  storage.move_folder(f"{bucket}/a", f"{bucket}/z")
  assert list(storage.files_below(bucket)) == ["z/b.txt", "z/c.txt"]
  storage.remove(bucket)
  storage.remove(bucket)
  assert not storage.exists(bucket)
  with pytest.raises(FileNotFoundError, match="expected an object"):
    storage.read_bytes(f"{bucket}/a/b.txt")


def test_what_is_written_whole_appears_at_the_end(bucket):
  with files.written_whole(f"{bucket}/model") as made:
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "params").mkdir()
    (made / "params" / "d").write_bytes(b"1")
    assert not storage.exists(f"{bucket}/model")
  assert list(storage.files_below(f"{bucket}/model")) == ["config.json", "params/d"]
  with pytest.raises(ValueError, match="exists already"), files.written_whole(f"{bucket}/model"):
    raise AssertionError
  with pytest.raises(KeyError), files.written_whole(f"{bucket}/f", replace=True) as made:
    made.write_text("half")
    raise KeyError
  assert not storage.exists(f"{bucket}/f")


def test_a_folder_that_cannot_be_copied_whole_is_none(bucket, services, monkeypatch):
  monkeypatch.setattr(storage, "WAITS", ())
  with pytest.raises(OSError), files.written_whole(f"{bucket}/model") as made:
    made.mkdir()
    for name in ("config.json", "a", "b"):
      (made / name).write_text(name)
    rule_of(services, bucket)(
      lambda method, path, number: 403 if "config.json" in path and method != "GET" else None
    )
    # GCS names what is uploaded in the body.
    monkeypatch.setattr(storage, "upload", failing(storage.upload, "/config.json"))
  rule_of(services, bucket)(None)
  assert not storage.exists(f"{bucket}/model")


def failing(upload, name):
  def fails(local, path):
    if str(path).endswith(name):
      raise OSError("the test says so")
    upload(local, path)

  return fails


def test_outputs_are_tried_before_the_work(bucket, services):
  outputs.check_folder(bucket)
  outputs.check_file(f"{bucket}/x.json")
  outputs.check_new(f"{bucket}/model")
  assert not storage.exists(bucket)
  storage.write_bytes(f"{bucket}/model/config.json", b"{}")
  for check, place, told in (
    (outputs.check_new, f"{bucket}/model", "exists already"),
    (outputs.check_file, f"{bucket}/model", "the folder"),
    (outputs.check_file, f"{bucket}/model/", "the folder"),
    (outputs.check_folder, f"{bucket}/model/config.json", "the object"),
    (outputs.check_folder, f"{bucket[:5]}no-such-bucket/x", "nothing can be written"),
    (outputs.check_file, "https://host/x", "gs:// or s3://"),
  ):
    with pytest.raises(ValueError, match=told):
      check(place)
  rule_of(services, bucket)(bucket_servers.read_only)
  with pytest.raises(ValueError, match="the right to use") as error:
    outputs.check_folder(bucket)
  assert len(str(error.value).splitlines()) == 1


def test_faults_that_pass_are_tried_again(bucket, services, caplog, monkeypatch):
  monkeypatch.setattr(storage, "WAITS", (0.01,) * 3)
  rule_of(services, bucket)(bucket_servers.every(3))
  for i in range(4):
    storage.write_bytes(f"{bucket}/{i}", b"%d" % i)
    assert storage.read_bytes(f"{bucket}/{i}") == b"%d" % i
  assert list(storage.files_below(bucket)) == ["0", "1", "2", "3"]


def test_faults_that_stay_are_told_once(bucket, services, caplog, monkeypatch):
  monkeypatch.setattr(storage, "WAITS", (0.01,) * 2)
  tries = []

  def fails(fs):
    tries.append(fs)
    raise ConnectionError("reset by peer")

  with pytest.raises(OSError, match="reset by peer"):
    storage._retried(f"{bucket}/x", fails)
  assert len(tries) == 3
  assert [r.getMessage().count("trying again") for r in caplog.records] == [1, 1]


def test_a_fault_is_not_taken_for_nothing_there(bucket, services, monkeypatch):
  rule_of(services, bucket)(lambda *_: 403)
  for ask in (storage.exists, storage.is_file, storage.is_dir):
    with pytest.raises(PermissionError):
      ask(f"{bucket}/x")


def test_lines_are_gathered(bucket, services):
  asked = services[bucket[:2]].asked
  before = len(asked)  # of other tests
  file = growing.Growing(f"{bucket}/log.txt", every=0.3)
  for i in range(40):
    file.append(f"{i}\n")
    time.sleep(0.01)
  file.flush()
  assert storage.read_bytes(f"{bucket}/log.txt").count(b"\n") == 40
  writes = [m for m, path in asked[before:] if m in ("PUT", "POST")]
  file.append("end\n")
  file.close()
  again = growing.Growing(f"{bucket}/log.txt")
  again.append("again\n")
  again.close()
  lines = storage.read_bytes(f"{bucket}/log.txt").decode().splitlines()
  assert lines == [*map(str, range(40)), "end", "again"]
  assert len(writes) < 40


def test_one_writer(bucket):
  with lock.one_writer(bucket, beat=0.1) as note:
    assert note is None
    with pytest.raises(lock.HeldError, match="the only one"), lock.one_writer(bucket, beat=0.1):
      raise AssertionError
  assert not storage.exists(bucket)
  gone = {"host": "elsewhere", "pid": 1, "since": "then", "token": "t", "beat": 3}
  storage.write_bytes(f"{bucket}/{lock.NAME}", json.dumps(gone).encode())
  with lock.one_writer(bucket, beat=0.05) as note:
    assert "process 1 on elsewhere" in note and "takes over" in note


def test_only_one_of_several_gets_the_lock(bucket):
  taken, held = [], []

  def take():
    try:
      with lock.one_writer(bucket, beat=0.5):
        taken.append(True)
        time.sleep(5.0)
    except lock.HeldError:
      held.append(True)

  threads = [threading.Thread(target=take) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(taken), len(held)) == (1, 2)


def test_copies_are_made_once(bucket, services, monkeypatch, tmp_path):
  monkeypatch.setenv(staging.VARIABLE, str(tmp_path / "ssd"))
  storage.write_bytes(f"{bucket}/a/x.tsv", b"one")
  copy = pathlib.Path(staging.staged(f"{bucket}/a/x.tsv"))
  assert copy == tmp_path / "ssd" / bucket[:2] / bucket[5:] / "a" / "x.tsv"
  assert copy.read_bytes() == b"one"
  asked = len(services[bucket[:2]].asked)
  staging.staged(f"{bucket}/a/x.tsv")
  assert not any("alt=media" in p for _, p in services[bucket[:2]].asked[asked:])
  storage.write_bytes(f"{bucket}/a/x.tsv", b"two")
  assert pathlib.Path(staging.staged(f"{bucket}/a/x.tsv")).read_bytes() == b"two"
  copy.write_bytes(b"cut")
  copy.write_bytes(b"cu")
  assert pathlib.Path(staging.staged(f"{bucket}/a/x.tsv")).read_bytes() == b"two"
  storage.write_bytes(f"{bucket}/a/b/y", b"y")
  folder = staging.local_folder(f"{bucket}/a")
  assert (folder / "b" / "y").read_bytes() == b"y"
  with pytest.raises(ValueError, match="local disk"):
    staging.stage_to(bucket)


def test_partial_work_for_a_bucket_is_kept_locally(bucket, tmp_path):
  storage.write_bytes(f"{bucket}/in.tsv", b"1")
  left = partial.place_of(f"{bucket}/out.jsonl")
  assert left.is_relative_to(tmp_path / "cache")
  left.parent.mkdir(parents=True)
  work = {"input": partial.fingerprint([f"{bucket}/in.tsv"])}
  assert not partial.taken_up(left, work)
  left.write_bytes(b"row\n")
  assert partial.taken_up(left, {"input": partial.fingerprint([f"{bucket}/in.tsv"])})
  storage.write_bytes(f"{bucket}/in.tsv", b"2")
  assert partial.fingerprint([f"{bucket}/in.tsv"]) != work["input"]
  partial.finish(left, f"{bucket}/out.jsonl")
  assert storage.read_bytes(f"{bucket}/out.jsonl") == b"row\n"
  assert not list(left.parent.iterdir())


def test_checksums_of_a_bucket_are_the_services(bucket):
  storage.write_bytes(f"{bucket}/s/a", b"one")
  storage.write_bytes(f"{bucket}/s/b", b"two")
  checksums.write(f"{bucket}/s")
  assert checksums.faults(f"{bucket}/s") == []
  storage.write_bytes(f"{bucket}/s/a", b"ONE")
  changed = checksums.faults(f"{bucket}/s")
  assert changed == (["a has another content (CRC-32)"] if bucket.startswith("gs") else [])
  storage.write_bytes(f"{bucket}/s/a", b"on")
  storage.remove(f"{bucket}/s/b")
  assert len(checksums.faults(f"{bucket}/s")) == 2


def test_checksums_of_a_copy_compare_sizes(bucket, tmp_path):
  (tmp_path / "m").mkdir()
  (tmp_path / "m" / "a").write_bytes(b"one")
  checksums.write(tmp_path / "m")
  storage.upload(tmp_path / "m", f"{bucket}/m")
  assert checksums.faults(f"{bucket}/m") == []
  storage.write_bytes(f"{bucket}/m/a", b"on")
  assert len(checksums.faults(f"{bucket}/m")) == 1
  checksums.write(f"{bucket}/m")
  back = staging.local_folder(f"{bucket}/m")
  assert checksums.faults(back) == []
  (back / "a").write_bytes(b"longer")
  assert len(checksums.faults(back)) == 1


def test_a_missing_library_is_named(monkeypatch):
  import builtins

  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name in ("gcsfs", "s3fs"):
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  for place, extra in (("gs://b/x", "gcs"), ("s3://b/x", "s3")):
    with pytest.raises(ValueError, match=rf"pip install \w+ \(the extra \[{extra}\]"):
      storage.of(place)


def test_local_paths_stay_pathlib(tmp_path):
  assert type(storage.of(tmp_path)) is type(tmp_path)
  assert storage.normal("gs://b/a/../c") == "gs://b/c"
  assert storage.absolute("s3://b/x") == "s3://b/x"
  assert storage.absolute("x") == os.path.abspath("x")
  np.testing.assert_equal(storage.stat(__file__).size, os.path.getsize(__file__))
