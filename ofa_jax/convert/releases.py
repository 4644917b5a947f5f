"""Released models and their download: from the Hugging Face Hub, ModelScope or a mirror.

`HF_ENDPOINT` names another Hugging Face Hub, `MODELSCOPE_DOMAIN` another ModelScope, as in their
own libraries. `OFA_JAX_SOURCE` chooses for all commands: "huggingface", "modelscope", or the URL of
a folder that holds the files as `<URL>/<repository's name>/<file>`. Some models are in no hub, but
at addresses of their own.
"""

import fcntl
import hashlib
import os
import pathlib
import shutil
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from typing import NamedTuple

from ofa_jax.convert import json_files
from ofa_jax.files import written_whole

HUGGINGFACE, MODELSCOPE = "huggingface", "modelscope"
ROOT = "~/.cache/ofa_jax"  # where downloads go
_VARIABLE = "OFA_JAX_SOURCE"
_SECONDS = 30  # without a byte
_CHUNK = 1 << 20


class DamagedError(ValueError):
  """A download is not what its source says that it is."""


class Address(NamedTuple):
  """Where a file is that no hub has.

  Attributes:
    folder: URL of the folder that it is in; a mirror has the last part of it.
    sha256: of the file, as hexadecimal digits; "": nobody tells it.
    archive: the `.zip` in that folder that holds it; "": it is a file of its own.
  """

  folder: str
  sha256: str = ""
  archive: str = ""


class Release(NamedTuple):
  """A released model.

  Attributes:
    repo: its repository on the Hugging Face Hub; on GitHub where there are `addresses`.
    files: the file of its weights, then what belongs to it.
    modelscope: its repository there, empty if it has none.
    addresses: where each of the files is; empty: all are in the repository.
    finetuned: it is trained for one task, and is the moving average of its weights where its file
      holds one, as the original evaluates it.
  """

  repo: str
  files: tuple[str, ...]
  modelscope: str = ""
  addresses: tuple[Address, ...] = ()
  finetuned: bool = False


def folder_of(name: str, release: Release, root: pathlib.Path) -> pathlib.Path:
  """The folder for the released files of a model: `root` itself for a single one."""
  return root if len(release.files) == 1 else root / f"{name}-released"


def download(release: Release, folder: pathlib.Path, *, source: str | None = None) -> pathlib.Path:
  """Returns the file of the weights in `folder`, with the others beside it.

  A file that is there is used, a download that was cut short goes on where it ended. Files are
  compared with the SHA-256 that the source keeps of them: the hub of large ones, ModelScope of all,
  a mirror where it has `<file>.sha256`; and with the one that an `Address` tells.

  Args:
    release: which.
    folder: made if it is not there.
    source: "huggingface", "modelscope" or the URL of a mirror; None is what `OFA_JAX_SOURCE` says,
      or the Hugging Face Hub. Files with an `Address` are there or on a mirror.

  Raises:
    ValueError: the source cannot be reached or does not have it; a file is not the one that it
      should be and was removed. One line, with what to do.
  """
  source = source or os.environ.get(_VARIABLE) or HUGGINGFACE
  addresses = release.addresses or (None,) * len(release.files)
  for file, address in zip(release.files, addresses, strict=True):
    if (folder / file).is_file():
      continue
    folder.mkdir(parents=True, exist_ok=True)
    if source == MODELSCOPE:
      _from_modelscope(release, file, folder)
    elif source != HUGGINGFACE and not source.startswith(("https://", "http://")):
      raise ValueError(
        f"Expected {HUGGINGFACE}, {MODELSCOPE} or the https:// URL of a mirror as the source of "
        f"models ({_VARIABLE}), found {source!r}"
      )
    elif address is not None:
      _from_address(address, file, folder, mirror=None if source == HUGGINGFACE else source)
    elif source == HUGGINGFACE:
      _from_huggingface(release.repo, file, folder)
    else:
      _from_mirror(source, release.repo.rpartition("/")[2], file, folder)
  return folder / release.files[0]


def _from_huggingface(repo: str, file: str, folder: pathlib.Path) -> None:
  import huggingface_hub  # half a second that other uses need not wait for

  try:
    (info,) = huggingface_hub.HfApi().get_paths_info(repo, [file])
    huggingface_hub.hf_hub_download(repo, file, local_dir=folder)
  except Exception as error:  # of the system or of whichever HTTP library is under it
    url = f"{huggingface_hub.constants.ENDPOINT}/{repo}/resolve/main/{file}"
    raise ValueError(_unreachable(file, repo, error, url=url, folder=folder)) from None
  _check(folder / file, info.lfs.sha256 if info.lfs else None)


def _from_modelscope(release: Release, file: str, folder: pathlib.Path) -> None:
  if not release.modelscope:
    raise ValueError(
      f"Expected a model that ModelScope has, found {file} of {release.repo}, which is on "
      f"{'the server of its authors' if release.addresses else 'the Hugging Face Hub'} only; leave "
      "use_modelscope out"
    )
  domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
  root = domain if "://" in domain else f"https://{domain}"
  url = f"{root}/models/{release.modelscope}/resolve/master/{urllib.parse.quote(file)}"
  listing = f"{root}/api/v1/models/{release.modelscope}/repo/files?Revision=master&Recursive=True"
  try:
    with _opened(listing) as reply:
      described = json_files.parse(reply.read(json_files.MAX_BYTES))
    data = described.get("Data")
    entries = data.get("Files") if isinstance(data, dict) else None
    sums = [e.get("Sha256") for e in entries or [] if isinstance(e, dict) and e["Path"] == file]
    if not sums:
      raise ValueError("no such file in its list")
    _get(url, folder / file, sha256=sums[0])
  except DamagedError:
    raise
  except (OSError, ValueError, KeyError) as error:
    repo = f"ModelScope's {release.modelscope}"
    raise ValueError(_unreachable(file, repo, error, url=url, folder=folder)) from None


def _from_address(address: Address, file: str, folder: pathlib.Path, *, mirror: str | None) -> None:
  """Downloads a file, or the archive that it is in, from its own place or from a mirror."""
  whole = address.archive or file
  if not (folder / whole).is_file():
    if mirror is not None:
      _from_mirror(mirror, address.folder.rpartition("/")[2], whole, folder)
    else:
      url = f"{address.folder}/{urllib.parse.quote(whole)}"
      try:
        _get(url, folder / whole, sha256=None if address.archive else address.sha256)
      except DamagedError:
        raise
      except (OSError, ValueError) as error:
        ways = f"{_VARIABLE}=<a mirror's URL>"
        message = _unreachable(whole, address.folder, error, url=url, folder=folder, ways=ways)
        raise ValueError(message) from None
  if address.archive:
    _unpack(folder / whole, folder / file)
  if address.archive or mirror is not None:
    _check(folder / file, address.sha256)


def _unpack(archive: pathlib.Path, path: pathlib.Path) -> None:
  """Writes the one file of an archive that has the name of `path`, wherever it is in it."""
  try:
    with zipfile.ZipFile(archive) as content:
      named = [x for x in content.infolist() if pathlib.PurePosixPath(x.filename).name == path.name]
      if len(named) != 1:
        raise DamagedError(f"{archive}: expected one {path.name} in it, found {len(named)}")
      with (
        content.open(named[0]) as source,
        written_whole(path, replace=True) as made,
        made.open("wb") as target,
      ):
        shutil.copyfileobj(source, target, _CHUNK)
  except (zipfile.BadZipFile, zlib.error, EOFError) as error:
    archive.unlink()
    raise DamagedError(
      f"{archive}: expected a whole .zip, found: {error}; the damaged file was removed, start again"
    ) from None
  except RuntimeError as error:  # it is encrypted, or packed by a method that Python has not
    raise ValueError(
      f"{archive}: expected a .zip that can be unpacked, found: {error}; put {path.name} beside it "
      "yourself"
    ) from None


def _from_mirror(mirror: str, repo: str, file: str, folder: pathlib.Path) -> None:
  mirror = mirror.rstrip("/")
  url = f"{mirror}/{repo}/{urllib.parse.quote(file)}"
  try:
    try:
      with _opened(f"{url}.sha256") as reply:
        expected = (reply.read(1000).decode("ascii", "replace").split() or [None])[0]
    except urllib.error.HTTPError:
      expected = None  # a mirror need not have one
    _get(url, folder / file, sha256=expected)
  except DamagedError:
    raise
  except (OSError, ValueError) as error:
    raise ValueError(_unreachable(file, mirror, error, url=url, folder=folder)) from None


def _get(url: str, path: pathlib.Path, *, sha256: str | None) -> None:
  """Downloads one file; what there is of it stays in `<path>.part` until it is whole."""
  part = path.with_name(f"{path.name}.part")
  with part.open("ab") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # another process may be downloading it
    if path.is_file():
      return
    try:
      reply = _opened(url, start=file.tell())
    except urllib.error.HTTPError as error:
      if error.code != 416:  # nothing is left to send, or the file there is another one now
        raise
      file.truncate(0)
      reply = _opened(url)
    with reply:
      if reply.status != 206:
        file.truncate(0)
      length = reply.headers.get("Content-Length")
      wanted = None if length is None else file.seek(0, os.SEEK_END) + int(length)
      while chunk := reply.read(_CHUNK):
        file.write(chunk)
    if wanted is not None and file.tell() != wanted:
      raise ValueError(f"{file.tell():,} of {wanted:,} bytes came")
    file.flush()
    _check(part, sha256)
    part.rename(path)


def _opened(url: str, *, start: int = 0):
  headers = {"User-Agent": "ofa_jax"} | ({"Range": f"bytes={start}-"} if start else {})
  request = urllib.request.Request(url, headers=headers)
  return urllib.request.urlopen(request, timeout=_SECONDS)


def _check(path: pathlib.Path, expected: str | None) -> None:
  if not expected:
    return
  with path.open("rb") as content:
    digest = hashlib.file_digest(content, "sha256").hexdigest()
  if digest != expected.lower():
    path.unlink()
    raise DamagedError(
      f"{path}: expected SHA-256 {expected:.64}, found {digest}; the damaged file was removed, "
      "start again"
    )


def _unreachable(
  file: str,
  repo: str,
  error: Exception,
  *,
  url: str,
  folder: pathlib.Path,
  ways: str = f"{_VARIABLE}=modelscope or HF_ENDPOINT=<a mirror's URL>",
) -> str:
  return (
    f"Expected to download {file} from {repo}, found: {_cause(error)}. Start again to go on where "
    f"it ended, try another source ({ways}), or put {url} into {folder} yourself."
  )


def _cause(error: BaseException) -> str:
  """What was at the start of a chain of errors, in one line."""
  seen = set()
  while id(error) not in seen:
    seen.add(id(error))
    inner = error.__cause__ or error.__context__ or getattr(error, "reason", None)
    if not isinstance(inner, BaseException):
      break
    error = inner
  lines = str(error).splitlines() or [type(error).__name__]
  return lines[0].strip().rstrip(".")[:200] or type(error).__name__
