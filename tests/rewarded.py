"""A small run that learns from a reward: --config=tests/rewarded.py:PROCESS.

The reward raises on that process of the job, at its third update; none: on no process.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax

from ofa_jax.config import Config
from ofa_jax.data import quickstart_ofa
from ofa_jax.decode.beam import Search
from ofa_jax.tasks.reward import SelfCritical
from tests import tiny

MESSAGE = "the judge has left"
UPDATES = 2  # that go well


def letters(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
  """A reward of one's own: what no text is without."""
  return [len(text) / 10 + text.count("a") for text in texts]


@dataclasses.dataclass(kw_only=True)
class Letters:
  """The same, until it raises."""

  process: int | None = None
  calls: int = dataclasses.field(default=0, init=False, repr=False, compare=False)

  def __call__(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    self.calls += 1
    if self.calls > UPDATES and jax.process_index() == self.process:
      raise KeyError(MESSAGE)
    return letters(texts, references)


def get_config(argument: str = "none") -> Config:
  """See above; the data are in OFA_JAX_DATA."""
  base = tiny.caption_config(quickstart_ofa.shapes(os.environ["OFA_JAX_DATA"]))
  fields = {f.name: getattr(base.task, f.name) for f in dataclasses.fields(base.task)}
  fields["smoothing"] = 0.0
  task = SelfCritical(
    sampling=Search(num_beams=2, max_length=6),
    reward=Letters(process=None if argument == "none" else int(argument)),
    **fields,
  )
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, freeze_resnet=True),
    task=task,
    batch_size=8,
    steps=5,
    log_every=1,
    save_every=0,
  )
