"""Released models on the Hugging Face Hub, and their download."""

import hashlib
import pathlib
from typing import NamedTuple


class Release(NamedTuple):
  """A released model: its repository, the file of its weights, then what belongs to it."""

  repo: str
  files: tuple[str, ...]


def download(release: Release, folder: pathlib.Path) -> pathlib.Path:
  """Returns the file of the weights in `folder`, with the others beside it.

  A file that is there is used, a download that was cut short goes on where it ended. Large files
  are compared with the SHA-256 that the hub keeps of them.

  Raises:
    ValueError: the hub cannot be reached; a file is not the one on the hub and was removed.
  """
  for file in release.files:
    if not (folder / file).is_file():
      _download(release.repo, file, folder)
  return folder / release.files[0]


def _download(repo: str, file: str, folder: pathlib.Path) -> None:
  import huggingface_hub  # half a second that other uses need not wait for

  path = folder / file
  try:
    (info,) = huggingface_hub.HfApi().get_paths_info(repo, [file])
    huggingface_hub.hf_hub_download(repo, file, local_dir=folder)
  except Exception as error:  # of the system or of whichever HTTP library is under it
    raise ValueError(
      f"Expected to download {file} from {repo}, found: {error}. Start again to go on where it "
      f"ended, or put https://huggingface.co/{repo}/resolve/main/{file} into {folder} yourself."
    ) from error
  if info.lfs is None:
    return
  with path.open("rb") as content:
    found = hashlib.file_digest(content, "sha256").hexdigest()
  if found != info.lfs.sha256:
    path.unlink()
    raise ValueError(
      f"{path}: expected SHA-256 {info.lfs.sha256}, found {found}; the damaged file was removed, "
      "start again"
    )
