"""Names of a step of a run: `W@8`, `W@best`, `W@latest` and `W/checkpoints/8` in the folder W."""

import os

from etils import epath

from ofa_jax import storage

LATEST, BEST = "latest", "best"


def split_step(name: str) -> tuple[str, str | None]:
  """The folder and the step that a name means: of "W@8" and "W/checkpoints/8" ("W", "8").

  A local folder that is called so wins; a name without a step has None.
  """
  path = epath.Path(name)
  if path.parent.name == "checkpoints" and path.name.isdigit():
    return str(path.parent.parent), path.name
  folder, at, step = name.rpartition("@")
  if at and folder and (step.isdigit() or step in (BEST, LATEST)) and not _is_local(name):
    return folder, step
  return name, None


def _is_local(name: str) -> bool:
  return not storage.in_bucket(name) and os.path.exists(name)
