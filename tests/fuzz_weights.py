"""Mutated weight files: each is refused with a ValueError, or read with the numbers it holds.

    python -m tests.fuzz_weights [--seed=0] [--count=300]

Nothing else may happen: no other exception, no hang above 5 s of computing, no file written, no
memory beyond a bound, and where the container has checksums no other number. A quick part of it is
a test.
"""

import argparse
import collections
import contextlib
import json
import logging
import pathlib
import resource
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
import safetensors.numpy

from ofa_jax import checksums, hub, trees
from ofa_jax.convert import safetensors_files, torch_files
from ofa_jax.convert.cnclip import huggingface
from ofa_jax.convert.cnclip import table as cnclip
from tests import cnclip_files
from tests.cnclip_golden import micro_config, micro_state_dict

SECONDS, MEGABYTES = 5, 600
UNCHECKED = "without checksums: "  # as a folder of an older version, or one made by hand
Read = Callable[[pathlib.Path], dict[str, np.ndarray]]


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--count", type=int, default=300, help="mutations of each kind")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells what it raises
    for kind in KINDS:
      results = run(kind, pathlib.Path(folder), count=args.count, seed=args.seed)
      print(f"{kind}: {dict(results)}")
  print(f"peak memory {peak():,.0f} MB")


def run(kind: str, folder: pathlib.Path, *, count: int, seed: int = 0) -> collections.Counter:
  """Tries `count` mutations; returns how many were refused, read alike, and read otherwise.

  Raises:
    AssertionError: one that does what it may not.
  """
  make, mutate, read, has_checksums = KINDS[kind]
  rng = np.random.default_rng((seed, *kind.encode()))
  whole = folder / f"{kind}.whole"
  make(whole)
  expected, before = read(whole), peak()
  results = collections.Counter()
  for i in range(count):
    path = folder / f"{kind}.{i}"
    what = mutate(whole, path, rng)
    case = f"{kind} {i} ({what})"
    try:
      with stopped_after(SECONDS):
        arrays = read(path)
    except ValueError as error:
      results["refused"] += 1
      assert 0 < len(str(error)) < 20_000, case
    except Exception as error:
      raise AssertionError(f"{case}: {error!r}") from error
    else:
      alike = same(arrays, expected)
      results["read alike" if alike else "read otherwise"] += 1
      checked = has_checksums and not what.startswith(UNCHECKED)
      assert alike or not checked, f"{case}: other numbers"
    finally:
      shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert peak() - before < MEGABYTES, f"{case}: {peak() - before:,.0f} MB more"
  return results


def same(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
  """Whether these are the same arrays to the bit."""
  return arrays.keys() == expected.keys() and all(
    np.array_equal(np.asarray(arrays[name]), np.asarray(x)) for name, x in expected.items()
  )


def peak() -> float:
  """The largest memory of this process so far, in MB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


@contextlib.contextmanager
def stopped_after(seconds: int) -> Iterator[None]:
  """Ends what computes longer, or waits for something that does not come."""

  def stop(*_):
    raise AssertionError(f"not done after {seconds} s")

  before = [signal.signal(kind, stop) for kind in (signal.SIGPROF, signal.SIGALRM)]
  signal.setitimer(signal.ITIMER_PROF, seconds)
  signal.alarm(40 * seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    for kind, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
      signal.signal(kind, handler)


def mutate_bytes(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
  """Changes a few bytes, or many."""
  data, at = bytearray(data), int(rng.integers(len(data)))
  size = int(min(len(data) - at, rng.integers(1, 200)))
  way = rng.choice(["bit", "bit", "bytes", "zeros", "cut", "insert", "remove", "repeat", "number"])
  if way == "bit":
    data[at] ^= 1 << int(rng.integers(8))
  elif way == "bytes":
    data[at : at + size] = rng.bytes(size)
  elif way == "zeros":
    data[at : at + size] = bytes(size)
  elif way == "cut":
    del data[at:]
  elif way == "insert":
    data[at:at] = rng.bytes(size)
  elif way == "remove":
    del data[at : at + size]
  elif way == "repeat":
    data[at:at] = data[at : at + size]
  else:
    data[at : at + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\xff" * 4, b"\0" * 4, b"\0\0\0\x80"])
  return f"{way} at {at}", bytes(data)


def mutate_file(whole: pathlib.Path, path: pathlib.Path, rng: np.random.Generator) -> str:
  """A file with changed bytes."""
  what, data = mutate_bytes(whole.read_bytes(), rng)
  path.write_bytes(data)
  return what


def mutate_pickle(whole: pathlib.Path, path: pathlib.Path, rng: np.random.Generator) -> str:
  """An archive with another pickle, whose checksum is right."""
  with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
    for info in old.infolist():
      data = old.read(info)
      if info.filename.endswith("/data.pkl"):
        what, data = mutate_bytes(data, rng)
      new.writestr(info.filename, data)
  return f"pickle: {what}"


def mutate_header(whole: pathlib.Path, path: pathlib.Path, rng: np.random.Generator) -> str:
  """A safetensors file with another header, whose length is right, or with changed bytes."""
  if rng.random() < 0.3:
    return mutate_file(whole, path, rng)
  data = whole.read_bytes()
  length = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + length])
  what, header = mutate_json(header, rng)
  path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
  return what


HOSTILE = (
  *(None, True, -1, 0, 1, 3, 10**9, 10**30, 1.5, -0.0, "", "x", "F8_E4M3", "I64", [], {}),
  *([0, 10**12], [-1, 4], [[]], {"a": None}, "\ud800", 1e308),
)


def mutate_json(content: dict, rng: np.random.Generator) -> tuple[str, bytes]:
  """Text of a JSON object of which one value is another, or is gone, or which is no JSON."""
  way = rng.choice(["value", "value", "value", "value", "gone", "extra", "text", "special"])
  if way == "text":
    what, data = mutate_bytes(json.dumps(content).encode(), rng)
    return what, data
  if way == "special":
    i = int(rng.integers(len(SPECIAL)))
    return f"special {i}", SPECIAL[i]
  content = json.loads(json.dumps(content))
  place, trace = content, []
  while True:
    key = rng.choice(list(place)) if isinstance(place, dict) else int(rng.integers(len(place)))
    trace.append(str(key))
    inner = place[key]
    if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
      break
    place = inner
  if way == "gone":
    del place[key]
  elif way == "extra" and isinstance(place, dict):
    place[str(rng.integers(1000))] = HOSTILE[rng.integers(len(HOSTILE))]
  else:
    place[key] = HOSTILE[rng.integers(len(HOSTILE))]
  return f"{way} {'.'.join(trace)}", json.dumps(content).encode()


SPECIAL = (
  b"[" * 100_000,
  b'{"a":' * 100_000,
  b"[]",
  b"null",
  b"NaN",
  b'{"embed_dim": NaN}',
  b'{"embed_dim": 1e999}',
  b'{"a": 1, "a": 2}',
  b"\xff\xfe{\x00}\x00",
  b"{\xff}",
  b"",
  b" " * 9_000_000 + b"{}",
  b'{"a": ' + b"9" * 100_000 + b"}",
)


def mutate_directory(whole: pathlib.Path, path: pathlib.Path, rng: np.random.Generator) -> str:
  """A folder with another config.json, or in which another file is changed or gone."""
  shutil.copytree(whole, path)
  files = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
  config = path / "config.json"
  if rng.random() < 0.6:
    what, text = mutate_json(json.loads(config.read_bytes()), rng)
    (path / "checksums.json").unlink(missing_ok=True)
    config.write_bytes(text)
    return f"{UNCHECKED}{what}"
  file = files[rng.integers(len(files))]
  start = ""
  if rng.random() < 0.3:
    (path / "checksums.json").unlink(missing_ok=True)
    start = UNCHECKED
  if rng.random() < 0.1:
    file.unlink(missing_ok=True)
    return f"{start}{file.relative_to(path)} gone"
  what, data = mutate_bytes(file.read_bytes() if file.exists() else b"{}", rng)
  file.write_bytes(data)
  return f"{start}{file.relative_to(path)} {what}"


def make_torch(path: pathlib.Path) -> None:
  """A Chinese-CLIP's `.pt`."""
  options = {"args": argparse.Namespace(arch="x"), "lr": np.float64(1)}
  cnclip_files.save(path, micro_state_dict("micro_vit"), **options)


def make_safetensors(path: pathlib.Path) -> None:
  """A file with tensors of three dtypes."""
  tensors = dict(list(micro_state_dict("micro_vit").items())[:6])
  tensors |= {"half": np.ones(5, np.float16), "ids": np.arange(4)}
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def make_directory(path: pathlib.Path) -> None:
  """A model directory."""
  config = micro_config("micro_vit")
  hub.save_directory(path, config, *cnclip.from_torch(micro_state_dict("micro_vit"), config))


def make_huggingface(path: pathlib.Path) -> None:
  """A folder of transformers."""
  config = micro_config("micro_vit")
  params, _ = cnclip.from_torch(micro_state_dict("micro_vit"), config)
  huggingface.save(path, config, params, context_length=24)
  checksums.write(path)


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Everything that is read of a `.pt`."""
  options = torch_files.load_options(path)
  tensors = torch_files.load_state_dict(path)
  for family in hub.FAMILIES:
    with contextlib.suppress(ValueError):  # the micro model's heads cannot be inferred
      family.infer(tensors, options)
  return tensors


def read_directory(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The parameters of a folder."""
  return trees.flatten(hub.open_model(path).load()[0])


# kind: how it is made, changed and read, and whether every changed number must be found.
KINDS: dict[str, tuple[Callable, Callable, Read, bool]] = {
  "torch": (make_torch, mutate_file, read_torch, True),
  "torch-pickle": (make_torch, mutate_pickle, read_torch, False),
  "safetensors": (make_safetensors, mutate_header, safetensors_files.read, False),
  "directory": (make_directory, mutate_directory, read_directory, True),
  "huggingface": (make_huggingface, mutate_directory, read_directory, True),
}

if __name__ == "__main__":
  main()
