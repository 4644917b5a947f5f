"""What a killed run has left belongs to the work that it did: only the very same takes it up.

Beside `F.partial` stands `F.partial.json`, which says what the work is: its input files, its model,
the options that change what is written. Where any of it differs the work starts anew.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ofa_jax import files, storage

CONTENT = 64 << 20  # bytes of files that are told apart by their content; of more by size and time


def place_of(output: str | os.PathLike) -> pathlib.Path:
  """Where an output is written until it is whole: beside it, or locally for one in a bucket.

  Objects do not grow: what a killed run has left for one is in the cache folder of its machine.
  """
  if storage.in_bucket(output):
    name = os.fspath(output)
    own = hashlib.sha256(name.encode()).hexdigest()[:16]
    return storage.cache_home() / "partial" / own / f"{os.path.basename(name)}.partial"
  output = pathlib.Path(output)
  return output.with_name(f"{output.name}.partial")


def fingerprint(paths: Iterable[str | os.PathLike]) -> dict[str, Any]:
  """What tells files from those that may take their place, as JSON.

  Up to `CONTENT` bytes it is their content, so that copies are the same; of more their sizes and
  times. The names count too. Of objects in a bucket it is their sizes and generations.

  Args:
    paths: files, and folders, which are all files in them; what is missing counts as that.
  """
  named = [(name, *_stat(name)) for path in paths for name in _names(path)]
  total = sum(size for _, size, _ in named)
  digest = hashlib.sha256()
  for name, size, stamp in named:
    by_content = total <= CONTENT and not storage.in_bucket(name)
    digest.update(json.dumps([name, size, None if by_content else stamp]).encode())
    if by_content:
      with contextlib.suppress(OSError):
        digest.update(pathlib.Path(name).read_bytes())
  return {"files": len(named), "bytes": total, "sha256": digest.hexdigest()}


def digest(rows: Iterable[str | int]) -> str:
  """What tells ids and texts from others, which may come from files that no `fingerprint` sees."""
  made = hashlib.sha256()
  for row in rows:
    made.update(json.dumps(row).encode() + b"\n")
  return made.hexdigest()


def taken_up(
  partial: pathlib.Path, work: Mapping[str, Any], *, say: Callable[[str], None] = print
) -> bool:
  """Whether what was left is of this very work; otherwise it is removed, and the work noted down.

  Args:
    partial: from `place_of`.
    work: what the output depends on, by names that a person understands; JSON.
    say: takes a line if something is left that is of another work.
  """
  note = _note_of(partial)
  work = json.loads(json.dumps(work))
  left = partial.exists()
  before = _read(note) if left else None
  if left and before == work:
    return True
  if left and partial.stat().st_size:
    names = sorted(name for name in work.keys() | (before or {}).keys()
                   if (before or {}).get(name) != work.get(name))  # fmt: skip
    why = f"with another {', '.join(names)}" if before else "that left no note of its work"
    say(f"Starting anew: {partial} was left by a run {why}")
  partial.unlink(missing_ok=True)  # first: with the new note it would seem to be of this work
  files.write_text(note, json.dumps(work, indent=1, ensure_ascii=False) + "\n")
  return False


@contextlib.contextmanager
def tidied(partial: pathlib.Path, *, header: int = 0) -> Iterator[None]:
  """What is left by work that ends with an error goes away again if no row is in it.

  Args:
    partial: from `place_of`; closed by then.
    header: bytes before the first row.
  """
  try:
    yield
  except BaseException:
    with contextlib.suppress(OSError):
      if partial.stat().st_size <= header:
        partial.unlink()
        _note_of(partial).unlink(missing_ok=True)
    raise


def finish(
  partial: pathlib.Path, output: str | os.PathLike, *, made: pathlib.Path | None = None
) -> None:
  """Gives what is whole now, and closed, its name.

  Args:
    partial: from `place_of`.
    output: its name.
    made: a file beside it that gets the name instead; until then `partial` stays as it is.
  """
  made = made or partial
  if storage.in_bucket(output):
    storage.upload(made, output)
    made.unlink()
  else:
    with open(made, "rb") as file:
      os.fsync(file.fileno())  # else a power cut may leave the name without the bytes
    os.replace(made, output)
  partial.unlink(missing_ok=True)
  _note_of(partial).unlink(missing_ok=True)


def _note_of(partial: pathlib.Path) -> pathlib.Path:
  return partial.with_name(f"{partial.name}.json")


def _read(note: pathlib.Path) -> dict[str, Any] | None:
  try:
    work = json.loads(note.read_bytes())
  except (OSError, ValueError, RecursionError):
    return None
  return work if isinstance(work, dict) else None


def _names(path: str | os.PathLike) -> list[str]:
  """The file, or all files in the folder."""
  if not storage.is_dir(path):
    return [os.fspath(path) if storage.in_bucket(path) else str(pathlib.Path(path))]
  if storage.in_bucket(path):
    return [f"{os.fspath(path).rstrip('/')}/{name}" for name in storage.files_below(path)]
  return list(map(str, sorted(x for x in pathlib.Path(path).rglob("*") if x.is_file())))


def _stat(path: str) -> tuple[int, int]:
  try:
    return storage.stat(path)
  except OSError:
    return -1, 0
