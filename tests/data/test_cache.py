import multiprocessing
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from ofa_jax.data import cache
from ofa_jax.data.cache import DecodeCache, ImageReader, cache_key
from ofa_jax.data.images import decode
from ofa_jax.data.tsv import BadRow, ImageTable
from tests.data.samples import encode, photograph, write_tsv

ROWS, SIZE = 500, 16
SPAWN = multiprocessing.get_context("spawn")


def picture(i, size=SIZE):
  return np.random.default_rng(i).integers(1, 256, (size, size, 3), dtype=np.uint8)


def open_cache(folder, *, key=("what", "v1"), rows=ROWS, **options):
  return DecodeCache(folder, key=key, num_rows=rows, size=SIZE, **options)


def stored(folder, **options):
  """The rows that a fresh process would take from the disk; every one of them must be right."""
  opened = open_cache(folder, **options)
  found = [i for i in range(ROWS) if opened.get(i) is not None]
  for i in found:
    np.testing.assert_array_equal(opened.get(i), picture(i))
  opened.close()
  return found


def test_rows_come_back_at_once_and_in_the_next_run(tmp_path):
  opened = open_cache(tmp_path)
  assert opened.get(3) is None
  opened.put(3, picture(3))
  opened.put(ROWS - 1, picture(ROWS - 1)[::-1][::-1])
  np.testing.assert_array_equal(opened.get(3), picture(3))  # before anything is synced
  assert stored(tmp_path) == []
  opened.close()
  opened.close()
  assert stored(tmp_path) == [3, ROWS - 1]


def test_flags_are_written_after_the_pixels_are_synced(tmp_path, monkeypatch):
  opened = open_cache(tmp_path)
  events = []
  pwrite, fsync = os.pwrite, os.fsync
  monkeypatch.setattr(
    os, "pwrite", lambda f, data, at: events.append(memoryview(data).nbytes) or pwrite(f, data, at)
  )
  monkeypatch.setattr(os, "fsync", lambda f: events.append("sync") or fsync(f))
  monkeypatch.setattr(cache, "SYNC_BYTES", 2 * SIZE * SIZE * 3)
  opened.put(0, picture(0))
  opened.put(1, picture(1))
  assert events == [768, 768, "sync", 1, 1]


def test_memory_is_bounded(tmp_path):
  opened = open_cache(tmp_path, max_bytes=4096 + 10 * SIZE * SIZE * 3)
  assert opened.capacity == 10
  for i in range(ROWS):
    opened.put(i, picture(i))
  assert opened.get(9) is not None
  assert opened.get(10) is None
  opened.close()
  assert opened.path.stat().st_size <= 4096 + 10 * SIZE * SIZE * 3
  assert stored(tmp_path) == list(range(10))  # a larger bound keeps what is there
  nothing = open_cache(tmp_path / "none", max_bytes=0)
  nothing.put(0, picture(0))
  assert nothing.get(0) is None
  nothing.close()


def test_a_full_disk_stops_the_storing_and_nothing_else(tmp_path, monkeypatch):
  opened = open_cache(tmp_path)
  opened.put(0, picture(0))

  def full(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patched:
    patched.setattr(os, "pwrite", full)
    opened.put(1, picture(1))
    assert opened.get(1) is None
    np.testing.assert_array_equal(opened.get(0), picture(0))
  opened.close()
  assert stored(tmp_path) == [0]


def test_a_cut_file_claims_only_what_it_has(tmp_path):
  opened = open_cache(tmp_path)
  for i in range(ROWS):
    opened.put(i, picture(i))
  opened.close()
  os.truncate(opened.path, 4096 + 20 * SIZE * SIZE * 3 + 5)
  assert stored(tmp_path) == list(range(20))
  os.truncate(opened.path, 100)
  assert stored(tmp_path) == []


def test_another_version_replaces_the_file_and_another_transform_does_not(tmp_path):
  for key in (("a", "v1"), ("b", "v1"), ("a", "v2")):
    open_cache(tmp_path, key=key).close()
  assert sorted(os.listdir(tmp_path)) == ["a-v2.pixels", "b-v1.pixels"]


def test_key_follows_files_and_transform(tmp_path):
  path = tmp_path / "a.tsv"
  path.write_bytes(b"1\tQUJD\n")
  base = cache_key([str(path)], size=224, exact=True)
  assert cache_key([str(path)], size=224, exact=True) == base
  for options in ({"size": 336, "exact": True}, {"size": 224, "exact": False}):
    what, version = cache_key([str(path)], **options)
    assert what != base[0]
    assert version == base[1]
  path.write_bytes(b"1\tQUJE\n")
  os.utime(path, ns=(0, 1))
  what, version = cache_key([str(path)], size=224, exact=True)
  assert what == base[0]
  assert version != base[1]


def fill(folder, begin, forever=False):
  cache.SYNC_BYTES = 7 * SIZE * SIZE * 3
  opened = open_cache(folder)
  while True:
    for i in range(begin, begin + 300):
      opened.put(i % ROWS, picture(i % ROWS))
    if not forever:
      return opened.close()
    opened._here[:] = False


def test_two_processes_fill_one_cache(tmp_path):
  workers = [SPAWN.Process(target=fill, args=(tmp_path, begin)) for begin in (0, 200)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
    assert worker.exitcode == 0
  assert stored(tmp_path) == list(range(500))


def test_rows_of_another_process_are_seen(tmp_path):
  opened = open_cache(tmp_path)
  other = open_cache(tmp_path)
  other.put(5, picture(5))
  other.close()
  np.testing.assert_array_equal(opened.get(5), picture(5))
  opened.close()


def test_kill_while_filling_leaves_no_false_flag(tmp_path):
  for trial in range(3):
    worker = SPAWN.Process(target=fill, args=(tmp_path, 100 * trial, True))
    worker.start()
    for _ in range(2000):
      if len(stored(tmp_path)) > 20 * (trial + 1):
        break
      time.sleep(0.005)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert len(stored(tmp_path)) > 20 * (trial + 1)  # `stored` compares every pixel


@pytest.fixture
def table(tmp_path):
  images = [(str(i), encode(photograph(100 + 25 * i, 200), format="JPEG")) for i in range(3)]
  return ImageTable([write_tsv(tmp_path / "a.tsv", [*images, ("3", b"not an image")])])


def test_reader_decodes_once(tmp_path, table, monkeypatch):
  decoded = []
  monkeypatch.setattr(
    cache, "decode", lambda e, **options: decoded.append(e) or decode(e, **options)
  )
  for _ in range(2):  # two runs
    reader = ImageReader(table, size=32, cache_dir=tmp_path / "cache")
    for _ in range(2):  # two epochs
      for i in range(3):
        np.testing.assert_array_equal(reader.read(i, None), decode(table.encoded(i), size=32))
    reader.close()
  assert len(decoded) == 3
  with pytest.raises(BadRow, match=r"a\.tsv:4 3: not a JPEG"):
    ImageReader(table, size=32).read(3, None)


def test_images_converted_before_and_after_resizing_are_kept_apart(tmp_path):
  colours = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
  palette = encode(Image.fromarray(colours).quantize(16), format="PNG")
  table = ImageTable([write_tsv(tmp_path / "a.tsv", [("1", palette)])])
  for rgb_first in (True, False):
    reader = ImageReader(table, size=16, rgb_first=rgb_first, cache_dir=tmp_path / "cache")
    for _ in range(2):  # decoded, then from the cache
      expected = decode(palette, size=16, rgb_first=rgb_first)
      np.testing.assert_array_equal(reader.read(0, None), expected)
    reader.close()


def test_reader_augments_in_training_only(tmp_path, table):
  reader = ImageReader(table, size=32, augment="crop", cache_dir=tmp_path / "cache")
  crops = {reader.read(0, np.random.default_rng(i)).tobytes() for i in range(40)}
  assert len(crops) > 20
  larger = decode(table.encoded(0), size=37)
  windows = np.lib.stride_tricks.sliding_window_view(larger, (32, 32), axis=(0, 1))
  windows = windows.transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3)
  allowed = {w.tobytes() for w in windows} | {w[:, ::-1].tobytes() for w in windows}
  assert crops <= allowed
  np.testing.assert_array_equal(reader.read(0, None), decode(table.encoded(0), size=32))
  reader.close()


@pytest.mark.parametrize("call", ["posix_fallocate", "ftruncate"])
def test_a_disk_without_room_for_the_flags_is_not_mapped(tmp_path, monkeypatch, call):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, call, full)
  with pytest.warns(UserWarning, match="stores no more images .No space left"):
    opened = open_cache(tmp_path)
  opened.put(0, picture(0))
  assert opened.get(0) is None
  opened.close()


def test_a_row_written_in_part_is_not_claimed(tmp_path, monkeypatch):
  opened = open_cache(tmp_path)
  opened.put(0, picture(0))
  write = os.pwrite
  with monkeypatch.context() as patched:
    patched.setattr(os, "pwrite", lambda file, data, at: write(file, bytes(data)[:9], at))
    with pytest.warns(UserWarning, match="stores no more images"):
      opened.put(1, picture(1))
  assert opened.get(1) is None
  opened.close()
  assert stored(tmp_path) == [0]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="Expected a folder for the decode cache"):
    open_cache(tmp_path / "file" / "c")


def fill_large(folder):
  opened = open_cache(folder, rows=200_000)
  for i in range(ROWS):
    opened.put(i, picture(i))
    assert opened.get(199_999 - i) is None
  opened.close()
  os._exit(7)


@pytest.mark.parametrize("size", ["64k", "512k"])
def test_a_full_tmpfs_ends_in_no_bus_error(tmp_path, size):
  if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path]).returncode:
    pytest.skip("mounting needs to be allowed")
  try:
    process = SPAWN.Process(target=fill_large, args=(tmp_path / "c",))
    process.start()
    process.join()
    assert process.exitcode == 7  # -7 is SIGBUS
  finally:
    subprocess.run(["umount", tmp_path], check=True)
