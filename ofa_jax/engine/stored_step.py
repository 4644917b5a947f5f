"""One step of a run's checkpoints on disk, and what is wrong with it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ofa_jax import checksums, trees
from ofa_jax.engine import faults

ITEMS = ("model", "ema", "ema_rest", "train")
OPTIONAL = ("ema", "ema_rest")


class Damaged(ValueError):  # noqa: N818 (named after what it reports)
  """A stored checkpoint is not what was written."""


@dataclasses.dataclass(frozen=True)
class StoredStep:
  """A complete step.

  Attributes:
    manager: of the run's checkpoints.
    directory: of the step, with a folder an item.
    step: which one it is.
  """

  manager: ocp.CheckpointManager
  directory: epath.Path
  step: int

  def has(self, item: str) -> bool:
    """Is there such an item, or was the step written with one?"""
    if (self.directory / item).exists():
      return True
    try:
      written = json.loads((self.directory / "_CHECKPOINT_METADATA").read_text())
      return item in written["item_handlers"]
    except (OSError, ValueError, KeyError, TypeError):
      return False

  def damaged(self, reason: str) -> Damaged:
    """The error that says so."""
    return Damaged(f"The checkpoint at step {self.step} is damaged: {self.directory}/{reason}")

  def fault(self) -> str | None:
    """What shows of damage without reading the arrays, the same on all processes; all must ask."""
    return self.fault_of_checksums(ITEMS) or self._fault_of_metadata()

  def fault_of_checksums(self, items: Iterable[str]) -> str | None:
    """What the checksums of these items' files say; every process reads its share, and must ask."""
    share = jax.process_index(), jax.process_count()
    under = [f"{name}/" for name in items]
    lines = checksums.faults(self.directory, part=share, under=under)
    if jax.process_count() > 1:
      total = np.sum(multihost_utils.process_allgather(np.asarray(len(lines))))
      if total and not lines:
        lines = ["a file has another content, which another process has read and names"]
    if not lines:
      return None
    return str(self.damaged(f"{'; '.join(lines[:5])} ({checksums.ADVICE})"))

  def _fault_of_metadata(self) -> str | None:
    fault = None
    if jax.process_index() == 0:
      try:
        self.metadata()
      except Damaged as error:
        fault = str(error)
    if jax.process_count() == 1:
      return fault
    if multihost_utils.broadcast_one_to_all(np.asarray(fault is not None)):
      return fault or f"The checkpoint at step {self.step} is damaged (process 0 has the reason)"
    return None

  def metadata(self) -> Mapping[str, Any]:
    """The items' trees; Damaged where one cannot be read or is gone."""
    try:
      metadata = self.manager.item_metadata(self.step)
    except (OSError, ValueError, KeyError, TypeError) as error:
      for name in ITEMS:
        if not _is_json(self.directory / name / "_METADATA"):
          raise self.damaged(f"{name}/_METADATA cannot be read") from error
      raise self.damaged(faults.unreadable(self.directory, error)) from error
    for name in ITEMS:
      wanted = name not in OPTIONAL or self.has(name)
      if wanted and (metadata.get(name) is None or metadata[name].tree is None):
        raise self.damaged(f"{name}/_METADATA is missing; was it copied in part?")
    return metadata

  def check(self, parts: Mapping[str, Any]) -> None:
    """Raises ValueError, with every difference, where the step holds other arrays than these."""
    metadata = self.metadata()
    lines = []
    for name, expected in parts.items():
      if metadata.get(name) is None:
        lines.append(f"no {name} in the checkpoint (the run that wrote it had it switched off)")
        continue
      lines += [f"{name}/{line}" for line in trees.difference(expected, metadata[name].tree)]
    if lines:
      shown = "\n".join(f"  {line}" for line in lines[:20])
      more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
      raise ValueError(
        f"The checkpoint at step {self.step} in {self.manager.directory} is not of this config:\n"
        f"{shown}{more}\nUse the config that wrote it, or another --workdir."
      )


def _is_json(path: epath.Path) -> bool:
  try:
    json.loads(path.read_text())
  except (OSError, ValueError):
    return not path.parent.exists()
  return True
