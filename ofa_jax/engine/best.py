"""Which checkpoints of a run stay: the newest ones, and the best one by a metric."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class Best:
  """Which step is the best one by a metric of the evaluations; of equal ones the last (as fairseq).

  Args:
    metric: its name in `metrics.jsonl`, such as "valid/cider".
    mode: "max" or "min".
    rows: those of `metrics.jsonl` so far.
  """

  def __init__(self, metric: str, mode: str, rows: Iterable[Mapping[str, float]] = ()):
    self.metric, self.mode = metric, mode
    self._values: dict[int, float] = {}
    for row in rows:
      self.add(int(row["step"]), row)

  def add(self, step: int, metrics: Mapping[str, float]) -> None:
    """Notes an evaluation; one without the metric, or with NaN for it, counts for nothing."""
    value = metrics.get(self.metric)
    if value is not None and math.isfinite(value):
      self._values[step] = value

  def of(self, steps: Iterable[int]) -> int | None:
    """The best of these steps; None where none of them has been evaluated."""
    sign = 1 if self.mode == "max" else -1
    known = [step for step in steps if step in self._values]
    return max(known, key=lambda step: (sign * self._values[step], step), default=None)

  def describe(self, step: int) -> str:
    """Such as "step 8, valid/cider 0.9132"."""
    return f"step {step}, {self.metric} {self._values[step]:.6g}"


class Keep:
  """Orbax's question which checkpoints stay: the newest ones and the best one."""

  def __init__(self, newest: int, best: Callable[[Iterable[int]], int | None]):
    self._newest, self._best = newest, best

  def of(self, steps: Sequence[int]) -> set[int]:
    """Those of these steps that stay."""
    return {*sorted(steps)[-self._newest :], self._best(steps)} & {*steps}

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    stay = self.of(steps)
    return [step in stay for step in steps]
