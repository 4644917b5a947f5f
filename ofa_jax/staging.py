"""Local copies of what lies in a bucket: data staged to a fast disk, files that are read whole.

With `--stage=DIR` (or the environment variable `OFA_JAX_STAGE`) every data file of a bucket is
copied to `DIR/gs/BUCKET/NAME` when it is first read, and is read there from then on, by this
process and by later ones. A copy is whole or not there; it counts as long as the object has the
size and the generation (or ETag) that it had. Of a data set in shards a host copies those that it
reads rows of.
"""

import fcntl
import os
import pathlib
import shutil
import sys

from ofa_jax import files, storage

VARIABLE = "OFA_JAX_STAGE"  # an environment variable, for the processes that a command starts
_SMALL = 64 << 20  # bytes of a file that is none of weights
_TOLD = 64 << 20  # bytes of a copy that is worth a line


def stage_to(folder: str | os.PathLike) -> None:
  """Reads data from copies in a local folder from now on.

  Raises:
    ValueError: nothing can be written there, or it is in a bucket itself.
  """
  from ofa_jax import outputs  # which needs this module through others

  if storage.in_bucket(folder):
    raise ValueError(f"Expected a folder of a local disk in --stage, found {os.fspath(folder)}")
  outputs.check_folder(folder, flag="--stage")
  os.environ[VARIABLE] = os.path.abspath(folder)


def staged(path: str | os.PathLike) -> str:
  """The name of a data file's copy where data is staged; otherwise its own."""
  if storage.in_bucket(path) and os.environ.get(VARIABLE):
    return str(local(path))
  return os.fspath(path)


def local(path: str | os.PathLike) -> pathlib.Path:
  """A file that is on a local disk: a copy of an object, made if there is none; or the file itself.

  Where data is not staged, copies are in the user's cache folder.

  Raises:
    OSError: the object is missing or cannot be read.
    ValueError: there is no room for it.
  """
  if not storage.in_bucket(path):
    return pathlib.Path(path)
  name = os.fspath(path)
  stage = os.environ.get(VARIABLE)
  root = pathlib.Path(stage) if stage else storage.cache_home() / "buckets"
  place = root / name[:2] / name[5:]
  size, stamp = storage.stat(name)
  note, mark = place.with_name(f".{place.name}.copied"), f"{size} {stamp}\n"
  place.parent.mkdir(parents=True, exist_ok=True)
  with open(place.with_name(f".{place.name}.lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a host copy it once
    if not _is_copy(place, note, size=size, mark=mark):
      note.unlink(missing_ok=True)
      free = shutil.disk_usage(place.parent).free + (place.stat().st_size if place.exists() else 0)
      if free < size:
        raise ValueError(
          f"Expected {size / 1e9:.1f} GB of room in {root} for a copy of {name}, found "
          f"{free / 1e9:.1f}. Make room, or choose another folder with --stage"
        )
      if size > _TOLD:
        print(f"Copying {name} ({size / 1e9:.2f} GB) to {place}", file=sys.stderr, flush=True)
      with files.written_whole(place, replace=True) as made:
        storage.download(name, made)
        if made.stat().st_size != size:
          raise OSError(f"{name}: expected {size:,} bytes, found {made.stat().st_size:,}")
      note.write_text(mark)
  return place


def local_folder(
  folder: str | os.PathLike, *, most: int | None = None, below: bool = True
) -> pathlib.Path:
  """Copies of the files of a folder of a bucket, under their names; a local folder is itself.

  Args:
    folder: it.
    most: files of more bytes are left out.
    below: with the folders in it.
  """
  if not storage.in_bucket(folder):
    return pathlib.Path(folder)
  root = os.fspath(folder).rstrip("/")
  copies = [
    (name, local(f"{root}/{name}"))
    for name, entry in storage.files_below(root).items()
    if (below or "/" not in name) and (most is None or entry.stat.size <= most)
  ]
  if not copies:
    raise FileNotFoundError(f"{root}: expected files, found none")
  name, copy = copies[0]
  return copy.parents[name.count("/")]


def tokenizer_files(folder: str | os.PathLike) -> pathlib.Path:
  """A folder with the files of a tokenizer; of a bucket one with copies, without any weights."""
  try:
    return local_folder(folder, most=_SMALL, below=False)
  except FileNotFoundError:
    return pathlib.Path(os.devnull)  # which has none, as its reader tells


def _is_copy(place: pathlib.Path, note: pathlib.Path, *, size: int, mark: str) -> bool:
  try:
    return place.stat().st_size == size and note.read_text() == mark
  except OSError:
    return False
