"""How long a step will take, by the TPU compiler's own estimate: a prediction, nothing is run.

Operations of an optimised TPU program carry `"estimated_cycles"`; here they are summed, the body of
a loop as often as it runs. What waits between devices and custom calls (Pallas kernels) have no
estimate and are left out: a step takes at least as long. GPU programs carry none at all.
"""

import collections
import dataclasses
import re

from ofa_jax.ahead import hlo

# What an operation belongs to: the innermost of these scopes in the name that JAX gave it.
PARTS = ("attention", "linear", "norm", "activation", "dropout", "embed", "loss", "optimizer")

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'\bop_name="([^"]*)"')
_SCOPE = re.compile(rf"\b({'|'.join(PARTS)})\b")
_PASSES = (("rematted_computation", "computed again"), ("transpose(", "backward"))


@dataclasses.dataclass(kw_only=True)
class Cost:
  """The estimate of one step on one device.

  Attributes:
    cycles: of all operations that have an estimate.
    parts: share of the cycles by part of the model, the largest first.
    passes: share by "forward", "backward" and "computed again".
    operations: share of the operations that lead, by the end of their names.
    without: operations that wait or call a kernel of somebody's, which have no estimate.
  """

  cycles: int
  parts: dict[str, float]
  passes: dict[str, float]
  operations: dict[str, float]
  without: int


@dataclasses.dataclass(kw_only=True)
class Prediction:
  """What the cycles mean on one device, if nothing else takes time.

  Attributes:
    seconds: a step.
    rows_per_second: rows of the batch.
    share_of_peak: of its operations a second without recomputation.
  """

  seconds: float
  rows_per_second: float
  share_of_peak: float


def estimate(text: str, *, num: int = 8) -> Cost | None:
  """Sums the estimates of a compiled program; None where it has none.

  Args:
    text: `compiled.as_text()`.
    num: operations to name.
  """
  parts, passes, operations = (collections.Counter() for _ in range(3))
  without = 0
  for line, times in hlo.operations(text):
    cycle_note = _CYCLES.search(line)
    if not cycle_note:
      without += times * (" custom-call(" in line)
      continue
    cycles = times * int(cycle_note[1])
    named = _NAME.search(line)
    name = named[1] if named else ""
    scopes = _SCOPE.findall(name)
    parts[scopes[-1] if scopes else "other"] += cycles
    passes[next((p for key, p in _PASSES if key in name), "forward")] += cycles
    operations["/".join(name.split("/")[-2:]) or "(no name)"] += cycles
  total = parts.total()
  if not total:
    return None
  return Cost(
    cycles=total,
    parts=_shares(parts, total),
    passes=_shares(passes, total),
    operations=_shares(operations, total, num=num),
    without=without,
  )


def predict(
  cost: Cost | None, *, clock: float | None, peak: float, rows: float, model_flops: float
) -> Prediction | None:
  """Turns cycles into times; None without an estimate or a known clock.

  Args:
    cost: of one step, or None.
    clock: cycles a second.
    peak: operations a second of a device.
    rows: of the batch, on one device.
    model_flops: operations of one step on one device, without recomputation.
  """
  if cost is None or clock is None:
    return None
  seconds = cost.cycles / clock
  return Prediction(
    seconds=seconds,
    rows_per_second=rows / seconds,
    share_of_peak=model_flops / seconds / peak,
  )


def _shares(counter, total, *, num=None):
  return {name: cycles / total for name, cycles in counter.most_common(num)}
