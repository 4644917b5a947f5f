"""Places, local or in a bucket: whatever is opened under a name that a person gave comes by here.

`gs://bucket/name` is an object of Google Cloud Storage, `s3://bucket/name` one of Amazon's S3 or of
a service that speaks its protocol. One layer reads and writes them all: fsspec, with gcsfs or s3fs
below it. `epath.Path`, the path type of Orbax, stands on the same, so that there is one set of
credentials, end points and retries; fsspec itself is used where ranges of bytes, conditions and the
services' own checksums count. TensorStore alone opens the arrays of checkpoints by itself, see
`ofa_jax.engine.bucket_arrays`.

Local paths come near none of this: they are what they were, pathlib, os and open. No name is
resolved against the current folder. A fault that passes (429, 5xx, a lost connection) is tried
again a few times, with one line.
"""

import contextlib
import functools
import glob as local_glob
import hashlib
import io
import logging
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

if TYPE_CHECKING:
  import fsspec

T = TypeVar("T")

WAITS = (1.0, 3.0, 10.0)  # seconds before each further try, besides the libraries' own
BUFFER = 8 << 20  # bytes that are asked for at once where a file is read from front to back
_SCHEMES = {"gs://": ("gcsfs", "gcs"), "s3://": ("s3fs", "s3")}  # library, extra
_RIGHTS = {
  "gs://": "Run gcloud auth application-default login, or give this machine's service account the "
  "role Storage Object User",
  "s3://": "Set AWS_PROFILE or AWS_ACCESS_KEY_ID, with s3:ListBucket, GetObject, PutObject and "
  "DeleteObject",
}
_PASSING = {408, 429, 500, 502, 503, 504}
_log = logging.getLogger(__name__)


def cache_home() -> pathlib.Path:
  """The user's cache folder of this package (`$XDG_CACHE_HOME/ofa_jax`, `~/.cache/ofa_jax`).

  Of a user without a home directory it is one in the folder for temporary files.
  """
  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  if base.startswith("~"):
    return pathlib.Path(tempfile.gettempdir()) / f"ofa_jax-{os.getuid()}"
  return pathlib.Path(base) / "ofa_jax"


class Stat(NamedTuple):
  """What tells a file from one that took its place.

  Attributes:
    size: in bytes.
    stamp: its time of change in ns; in a bucket a number made of its generation or ETag.
  """

  size: int
  stamp: int


class Object(NamedTuple):
  """An object in a bucket.

  Attributes:
    stat: its size and stamp.
    crc32c: the checksum that the service has of its content, in base64; None: it tells none.
  """

  stat: Stat
  crc32c: str | None


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether a name is one of an object, or of many, in a bucket."""
  return os.fspath(path).startswith(tuple(_SCHEMES))


def of(path: str | os.PathLike) -> pathlib.Path:
  """The path; of a bucket it is an `epath.Path`, which has pathlib's methods.

  Raises:
    ValueError: it is in a bucket, and the library for that is missing.
  """
  if not in_bucket(path):
    return pathlib.Path(path)
  from etils import epath  # not of those who read local files only

  check_library(path)
  return epath.Path(os.fspath(path))


def check_library(path: str | os.PathLike) -> None:
  """Raises ValueError where the library that opens a bucket is not installed."""
  library, extra = _SCHEMES[os.fspath(path)[:5]]
  try:
    __import__(library)
  except ImportError as error:
    raise ValueError(
      f"Expected the package {library} to open {os.fspath(path)}, found none. "
      f"pip install {library} (the extra [{extra}] has it)"
    ) from error


def absolute(path: str | os.PathLike) -> str:
  """The name without regard to the current folder; that of a bucket has none."""
  return os.fspath(path) if in_bucket(path) else os.path.abspath(path)


def normal(path: str) -> str:
  """`os.path.normpath`, which would take a slash from `gs://`."""
  scheme = path[:5] if in_bucket(path) else ""
  return scheme + os.path.normpath(path[len(scheme) :])


def is_file(path: str | os.PathLike) -> bool:
  """Is there a file or object of this name?"""
  return _kind(path) == "file" if in_bucket(path) else os.path.isfile(path)


def is_dir(path: str | os.PathLike) -> bool:
  """Is there a folder, or are there objects below this name?"""
  return _kind(path) == "directory" if in_bucket(path) else os.path.isdir(path)


def exists(path: str | os.PathLike) -> bool:
  """Is there anything of this name?"""
  return _kind(path) is not None if in_bucket(path) else os.path.exists(path)


def stat(path: str | os.PathLike) -> Stat:
  """Size and stamp of a file; OSError where there is none."""
  if not in_bucket(path):
    status = os.stat(path)
    return Stat(status.st_size, status.st_mtime_ns)
  return _stat_of(_retried(path, lambda fs: fs.info(os.fspath(path))))


def glob(pattern: str) -> list[str]:
  """The names of a pattern's files, sorted."""
  if not in_bucket(pattern):
    return sorted(local_glob.glob(pattern, recursive=True))
  return sorted(f"{pattern[:5]}{name}" for name in _retried(pattern, lambda fs: fs.glob(pattern)))


def files_below(folder: str | os.PathLike) -> dict[str, Object]:
  """The objects below a name in a bucket, by their names relative to it, sorted; perhaps none."""
  root = os.fspath(folder).rstrip("/")
  infos: dict[str, dict[str, Any]] = {}
  with contextlib.suppress(FileNotFoundError):
    infos = _retried(root, lambda fs: fs.find(root, detail=True))
  begin = len(root) - 5 + 1  # names are given without the scheme
  files = {i["name"][begin:]: Object(_stat_of(i), i.get("crc32c")) for i in infos.values()}
  return {name: files[name] for name in sorted(files) if name and not name.endswith("/")}


def looker() -> Callable[[str], bool]:
  """A function that says whether a file is there; of a bucket it lists every folder once."""
  listed: dict[str, set[str]] = {}

  def there(path: str) -> bool:
    if not in_bucket(path):
      return os.path.isfile(path)
    folder, name = os.path.split(path)
    if folder not in listed:
      listed[folder] = _names_in(folder)
    return name in listed[folder]

  return there


def _names_in(folder: str) -> set[str]:
  try:
    infos = _retried(folder, lambda fs: fs.ls(folder, detail=True))
  except FileNotFoundError:
    return set()
  return {os.path.basename(info["name"]) for info in infos if info["type"] == "file"}


def read_bytes(path: str | os.PathLike) -> bytes:
  """The content of a file."""
  if not in_bucket(path):
    return pathlib.Path(path).read_bytes()
  return _retried(path, lambda fs: fs.cat_file(os.fspath(path)))


def read_range(path: str | os.PathLike, start: int, size: int) -> bytes:
  """Some bytes of an object, fewer at its end."""
  if size <= 0:
    return b""
  return _retried(path, lambda fs: fs.cat_file(os.fspath(path), start=start, end=start + size))


def opened(path: str | os.PathLike) -> BinaryIO:
  """A file or object to be read, with `peek` and `seek`."""
  if not in_bucket(path):
    return open(path, "rb")
  return io.BufferedReader(_Ranges(os.fspath(path)), BUFFER)


def write_bytes(path: str | os.PathLike, content: bytes, *, new: bool = False) -> None:
  """Writes an object, which appears whole.

  Args:
    path: in a bucket.
    content: of it.
    new: it must not be there.

  Raises:
    FileExistsError: with `new`, where it is there. Services that know no conditions do not say.
    OSError: it cannot be written.
  """
  name, mode = os.fspath(path), "create" if new else "overwrite"
  _retried(name, lambda fs: fs.pipe_file(name, content, mode=mode))


def remove(path: str | os.PathLike) -> None:
  """Removes an object, or all below a name, of a bucket; what is not there is no fault."""
  with contextlib.suppress(FileNotFoundError):
    _retried(path, lambda fs: fs.rm(os.fspath(path), recursive=True))


def make_folder(path: str | os.PathLike) -> None:
  """Makes a local folder with its parents; a bucket has none."""
  if not in_bucket(path):
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)


def move_folder(path: str | os.PathLike, to: str | os.PathLike) -> None:
  """Gives another name to all objects below a name, in place of what is below that one."""
  old, new = (os.fspath(p).rstrip("/") for p in (path, to))
  remove(new)
  for name in files_below(old):
    _retried(old, lambda fs, name=name: fs.copy(f"{old}/{name}", f"{new}/{name}"))
  remove(old)


def download(path: str | os.PathLike, local: str | os.PathLike) -> None:
  """Copies an object to a local file."""
  _retried(path, lambda fs: fs.get_file(os.fspath(path), os.fspath(local)))


def upload(local: pathlib.Path, path: str | os.PathLike) -> None:
  """Copies a local file, or a folder with all in it, to a bucket; `config.json` as the last one.

  A folder is what it says it is by its `config.json`: a copy that was cut short is none.
  """
  name = os.fspath(path).rstrip("/")
  if local.is_file():
    _retried(name, lambda fs: fs.put_file(os.fspath(local), name))
    return
  below = sorted(p for p in local.rglob("*") if p.is_file())
  for file in sorted(below, key=lambda p: p == local / "config.json"):
    upload(file, f"{name}/{file.relative_to(local).as_posix()}")


class _Ranges(io.RawIOBase):
  """An object as a file: every read is a request for a range."""

  def __init__(self, path: str):
    self._path, self._size, self._at = path, stat(path).size, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    self._at = offset + (0, self._at, self._size)[whence]
    return self._at

  def readinto(self, buffer: memoryview) -> int:
    data = read_range(self._path, self._at, min(len(buffer), self._size - self._at))
    buffer[: len(data)] = data
    self._at += len(data)
    return len(data)


def _kind(path: str | os.PathLike) -> str | None:
  """ "file", "directory" or None; a fault is raised, and never taken for "nothing there"."""
  try:
    return _retried(path, lambda fs: fs.info(os.fspath(path).rstrip("/")))["type"]
  except FileNotFoundError:
    return None


def _stat_of(info: dict[str, Any]) -> Stat:
  marks = [str(info.get(name)) for name in ("generation", "etag", "ETag", "md5Hash")]
  if set(marks) == {"None"}:
    marks = [str(info.get("LastModified") or info.get("mtime"))]
  digest = hashlib.sha256("|".join(marks).encode()).digest()
  return Stat(int(info["size"] or 0), int.from_bytes(digest[:7], "big"))


def _filesystem(path: str | os.PathLike) -> "fsspec.AbstractFileSystem":
  scheme = os.fspath(path)[:5]
  _configure(scheme)
  import fsspec

  return fsspec.filesystem(scheme[:2])


@functools.cache
def _configure(scheme: str) -> None:
  """Once: no list of a folder is remembered, for other hosts write there, too."""
  # It asks for the type of the bucket at every turn, which wants a right of its own; only zonal
  # ("Rapid") buckets need it.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  import fsspec

  for name in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
  # What cannot be mended here is raised and told once, by us.
  for name in ("gcsfs", "s3fs", "aiobotocore", "fsspec"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  check_library(scheme)


def _retried(path: str | os.PathLike, function: Callable[["fsspec.AbstractFileSystem"], T]) -> T:
  """What a function of a file system gives, tried again where the fault may pass.

  Raises:
    FileNotFoundError, FileExistsError, PermissionError, OSError: with the object's name.
    ValueError: the library is missing.
  """
  fs = _filesystem(path)
  for wait in (*WAITS, None):
    try:
      return function(fs)
    except Exception as error:
      told = explained(path, error)
      if wait is None or not _passes(error):
        raise told from error
      _log.warning("%s; trying again in %g s", told, wait)
      time.sleep(wait)
  raise AssertionError


def explained(path: str | os.PathLike, error: BaseException) -> OSError | ValueError:
  """An error of the libraries as one that names the object and the cure."""
  name, text = os.fspath(path), " ".join(str(error).split()) or type(error).__name__
  bucket = "/".join(name.split("/")[:3])
  if isinstance(error, FileExistsError):
    return FileExistsError(f"{name}: expected no such object, found one")
  if isinstance(error, FileNotFoundError):
    missing = " (or no such bucket)" if name.rstrip("/") != bucket else ""
    return FileNotFoundError(f"{name}: expected an object{missing}, found none")
  denied = isinstance(error, PermissionError) or "Forbidden" in text or _code(error) in (401, 403)
  unknown = any(kind in type(error).__name__ for kind in ("Credentials", "NoAuth"))
  if denied or unknown or "Anonymous caller" in text:
    return PermissionError(
      f"{name}: expected the right to use {bucket}, found: {text:.200}. {_RIGHTS[name[:5]]}"
    )
  if isinstance(error, ValueError | NotImplementedError) and not _passes(error):
    return ValueError(f"{name}: {text:.300}")
  return OSError(f"{name}: {text:.300}")


def _code(error: BaseException) -> int | None:
  code = getattr(error, "code", None) or getattr(error, "status", None)
  if code is None and isinstance(getattr(error, "response", None), dict):
    code = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
  return int(code) if str(code).isdecimal() else None


def _passes(error: BaseException | None) -> bool:
  """Whether an error, or what led to it, is one that another try may not meet."""
  while error is not None:
    module = type(error).__module__.partition(".")[0]
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
      return False
    if _code(error) in _PASSING or isinstance(error, ConnectionError | TimeoutError):
      return True
    kind = type(error).__name__
    if module in ("aiohttp", "requests", "urllib3", "botocore") and "Credentials" not in kind:
      return kind != "ClientError"
    error = error.__cause__
  return False


def chunks(path: str | os.PathLike, size: int = BUFFER) -> Iterator[bytes]:
  """The content of a file, piece by piece."""
  with opened(path) as file:
    while piece := file.read(size):
      yield piece
