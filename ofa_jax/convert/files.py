"""Files and folders that appear whole or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a path to write a file or folder to, which becomes `path` if nothing is raised.

  Raises:
    ValueError: `path` exists, now or at the end.
  """
  path = pathlib.Path(path).resolve()
  made = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
  _check_free(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield made
    _check_free(path)
    made.rename(path)
  finally:
    if made.is_dir():
      shutil.rmtree(made)
    else:
      made.unlink(missing_ok=True)


def _check_free(path: pathlib.Path) -> None:
  if path.exists():
    raise ValueError(f"{path} exists already; remove it or choose another name")
