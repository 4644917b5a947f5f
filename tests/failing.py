"""A small run in which one process of a job fails: --config=tests/failing.py:PLACE,PROCESS.

PLACE is data, score, evaluate, save or none. With slow in its place evaluations take their time.
"""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import jax

from ofa_jax.config import Eval
from ofa_jax.data import quickstart
from ofa_jax.engine import checkpoint
from ofa_jax.tasks.contrastive import Contrastive
from tests import tiny

MESSAGE = "the wheel has come off"


class Rows:
  """Rows that raise from the `after`-th one on, or take `seconds` each."""

  def __init__(self, rows: Any, *, after: int | None = None, seconds: float = 0.0):
    self._rows, self._after, self._seconds = rows, after, seconds
    self._count = 0

  def __len__(self) -> int:
    return len(self._rows)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._rows, name)

  def example(self, i: int, rng: Any) -> Any:
    self._count += 1
    if self._after is not None and self._count > self._after:
      raise TypeError(MESSAGE)
    time.sleep(self._seconds)
    return self._rows.example(i, rng)


@dataclasses.dataclass(kw_only=True)
class Failing(Contrastive):
  """The contrastive task, until something happens."""

  place: str = "none"
  process: int = 0

  def _here(self, place: str) -> bool:
    return self.place == place and jax.process_index() == self.process

  def examples(self, split: str) -> Any:
    rows = super().examples(split)
    return Rows(rows, after=50) if self._here("data") else rows

  def streams(self, split: str) -> dict[str, Any]:
    streams = super().streams(split)
    if self._here("evaluate"):
      streams["image"] = Rows(streams["image"], after=20)
    if self.place == "slow":
      streams["image"] = Rows(streams["image"], seconds=0.1)
    return streams

  def score(self, predictions: Any, streams: Any) -> dict[str, float]:
    if self._here("score"):
      raise TypeError(MESSAGE)
    return super().score(predictions, streams)


def get_config(arg: str = "none,0") -> Any:
  """See above; the data are in OFA_JAX_DATA."""
  place, process = arg.split(",")
  base = tiny.config(quickstart.digits(Path(os.environ["OFA_JAX_DATA"])))
  values = {f.name: getattr(base.task, f.name) for f in dataclasses.fields(base.task) if f.init}
  task = Failing(**values, place=place, process=int(process))
  if place == "save":
    really = checkpoint.Checkpoints.save

    def save(self: checkpoint.Checkpoints, state: Any) -> None:
      if jax.process_index() == int(process):
        raise OSError(28, "No space left on device", str(self.folder))
      really(self, state)

    checkpoint.Checkpoints.save = save
  return dataclasses.replace(
    base,
    task=task,
    batch_size=16,
    steps=30,
    log_every=1,
    save_every=3,
    evals=(Eval(name="valid", task=task, every=2, batch_size=16 if place == "slow" else 128),)
    if place in ("score", "evaluate", "slow")
    else (),
  )
