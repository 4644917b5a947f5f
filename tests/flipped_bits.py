"""One bit flipped in whatever holds weights: refused, or the older whole checkpoint taken.

    python -m tests.flipped_bits [--seed=0] [--count=15]

prints a table of them: of `.pt` files, safetensors of transformers' folders as they are written
here, model directories and checkpoints. A quick part of it is a test. A safetensors file of others
has no checksums: a flipped bit that leaves a finite number in one cannot be seen.
"""

import argparse
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ofa_jax import hub
from ofa_jax.convert import torch_files
from ofa_jax.engine import checkpoint
from ofa_jax.engine.step import State
from tests import fuzz_weights


class Flip(NamedTuple):
  """One flipped bit.

  Attributes:
    form: of `FORMS`.
    place: the file, the byte and the bit.
    outcome: "refused", "older taken", or what happened instead.
    told: the message.
  """

  form: str
  place: str
  outcome: str
  told: str


def run(form: str, folder: pathlib.Path, *, count: int, seed: int = 0) -> Iterator[Flip]:
  """Flips `count` random bits, one at a time, in new copies of one whole file or folder."""
  make, read = FORMS[form]
  rng = np.random.default_rng((seed, *form.encode()))
  whole = folder / f"{form}.whole"
  make(whole)
  read(whole)
  for i in range(count):
    path = folder / f"{form}.{i}"
    (shutil.copytree if whole.is_dir() else shutil.copy)(whole, path)
    place = flip(form, path, rng)
    try:
      outcome, told = "older taken", read(path)
      if form != "checkpoint" or told is None:
        outcome, told = "READ", "nothing"
    except ValueError as error:
      outcome, told = "refused", str(error)
    yield Flip(form, place, outcome, told.replace(str(path), "…"))
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def flip(form: str, path: pathlib.Path, rng: np.random.Generator) -> str:
  """Flips a bit; says where.

  Of a `.pt` in what its entries hold, of a transformers' folder in its safetensors, of checkpoints
  in the arrays of the newest: the markers of Orbax beside these are not read.
  """
  if path.is_dir():
    pattern = {"checkpoint": "checkpoints/3/*/**/*", "safetensors": "*.safetensors"}.get(
      form, "**/*"
    )
    files = sorted(p for p in path.glob(pattern) if p.is_file() and p.stat().st_size)
    file = files[rng.integers(len(files))]
    at = int(rng.integers(file.stat().st_size))
  else:
    file = path
    with zipfile.ZipFile(path) as archive:
      entries = [info for info in archive.infolist() if info.file_size]
      sizes = np.array([info.file_size for info in entries])
      info = entries[rng.choice(len(entries), p=sizes / sizes.sum())]
    data = path.read_bytes()
    names = (int.from_bytes(data[info.header_offset + at :][:2], "little") for at in (26, 28))
    at = info.header_offset + 30 + sum(names) + int(rng.integers(info.file_size))
  data, bit = bytearray(file.read_bytes()), int(rng.integers(8))
  data[at] ^= 1 << bit
  file.write_bytes(data)
  name = "" if file == path else f"{file.relative_to(path)} "
  return f"{name}byte {at} bit {bit}"


def make_checkpoints(path: pathlib.Path) -> None:
  """A run's checkpoints at steps 2 and 3."""
  with checkpoint.Checkpoints(path, keep=2) as checkpoints:
    for step in (2, 3):
      checkpoints.save(_state(step))


def take_newest(path: pathlib.Path) -> str | None:
  """Opens the newest checkpoint that is whole; what was told of the one that is not."""
  layout = {
    "abstract": jax.eval_shape(lambda: _state(0)),
    "shardings": jax.tree.map(lambda x: x.sharding, _state(0)),
  }
  told: list[str] = []
  with checkpoint.Checkpoints(path, keep=2) as checkpoints:
    state = checkpoints.restore_newest(**layout, warn=told.append)
  step = int(state.step)
  np.testing.assert_array_equal(state.params["x"], _state(step).params["x"])
  assert [step, len(told)] in ([3, 0], [2, 1])
  return told[0] if told else None


def _state(step: int) -> State:
  x = jnp.arange(5_000, dtype=jnp.float32) + step
  return State(
    step=jnp.int32(step), params={"x": x}, opt={"mu": x}, rest={}, ema=None, bad=jnp.zeros(2)
  )


def read_directory(path: pathlib.Path) -> None:
  """Loads the weights of a folder."""
  hub.open_model(path).load()


# How each is made, and read; of checkpoints it gives what was told.
FORMS = {
  "pt": (fuzz_weights.make_torch, torch_files.load_state_dict),
  "safetensors": (fuzz_weights.make_huggingface, read_directory),
  "directory": (fuzz_weights.make_directory, read_directory),
  "checkpoint": (make_checkpoints, take_newest),
}


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--count", type=int, default=15, help="bits of each form")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    for form in FORMS:
      flips = list(run(form, pathlib.Path(folder), count=args.count, seed=args.seed))
      for _, place, outcome, told in flips:
        print(f"{form:11} | {place:55} | {outcome:11} | {told.splitlines()[0][:100]}", flush=True)
      print(f"{form}: {sum(x.outcome != 'READ' for x in flips)} of {len(flips)}", flush=True)


if __name__ == "__main__":
  main()
