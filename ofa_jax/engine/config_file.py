"""`config.json` of a run."""

import json
from collections.abc import Callable
from typing import Any

from etils import epath

from ofa_jax import files, storage, trees
from ofa_jax.config import Config, to_dict


def save(config: Config, workdir: str, *, warn: Callable[[str], None]) -> None:
  """Writes `config.json`, and the files that make the workdir a model.

  Args:
    config: of the run.
    workdir: its folder.
    warn: takes a line on each field that differs in the run that is being continued.
  """
  path = storage.of(workdir) / "config.json"
  new = to_dict(config)
  for name, old, now in _changes(path, new, warn):
    warn(f"config.{name} was {old!r} before this start and is now {now!r}")
  files.write_text(path, json.dumps(new, indent=2, ensure_ascii=False) + "\n")
  for name, content in config.task.model_files().items():
    place = storage.of(workdir) / name
    stored = storage.read_bytes(place) if storage.exists(place) else None
    if stored == content:
      continue
    if stored is not None:
      warn(f"{name} differs from the one that this run began with")
    files.write_bytes(place, content)


def _changes(path: epath.Path, new: Any, warn: Callable[[str], None]) -> list[tuple[str, Any, Any]]:
  """(name, before, now) of the fields that differ from a `config.json` that is there."""
  if not storage.exists(path):
    return []
  try:
    stored = json.loads(storage.read_bytes(path))
  except ValueError:  # empty after a full disk, or cut short
    stored = None
  if not isinstance(stored, dict):
    warn(f"{path} was damaged and is written anew from --config")
    return []
  old, now = trees.flatten(stored), trees.flatten(json.loads(json.dumps(new)))
  return [
    (name.replace("/", "."), old.get(name), now.get(name))
    for name in sorted(old.keys() | now.keys())
    if old.get(name) != now.get(name)
  ]
