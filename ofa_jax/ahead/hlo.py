"""What a compiled program does, read from its HLO text: what runs how often, collectives."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

# "send" is what goes to other TPU slices.
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")

_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_OP = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")
_CALLS = re.compile(r"\b(body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"?known_trip_count"?:\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_SCATTER = "all-reduce-scatter"  # how the TPU's compiler names a reduce-scatter made of two


@dataclasses.dataclass
class Collective:
  """All collectives of one kind: how often a device runs one in a step, and what it receives."""

  calls: int = 0
  num_bytes: int = 0


def collectives(text: str) -> dict[str, Collective]:
  """Collectives by kind, as one device runs them; the body of a loop counts once a round.

  A loop whose number of rounds is not in the text counts as one round. Bytes are those of the
  results on one device.

  Args:
    text: `compiled.as_text()`.
  """
  computations, results, entry = _computations(text)
  by_kind = collections.defaultdict(Collective)
  channels = set()
  for name, times in _times_run(computations, entry).items():
    for line in computations[name]:
      op = _OP.match(line)
      kind = op and op[2].removesuffix("-start")
      if kind not in KINDS:
        continue
      # One that overlaps with products is written once in each of the parts it is spread over.
      channel = _CHANNEL.search(line)
      if channel and (kind, channel[1]) in channels:
        continue
      channels.add(channel and (kind, channel[1]))
      if name.startswith(_SCATTER):
        kind, size = "reduce-scatter", _result_bytes(results[name], "")
      else:
        size = _result_bytes(op[1], op[2])
      by_kind[kind].calls += times
      by_kind[kind].num_bytes += times * size
  return dict(by_kind)


def operations(text: str) -> Iterator[tuple[str, int]]:
  """The lines that one device runs, fusions as one, each with how often it runs in a step.

  Args:
    text: `compiled.as_text()`.
  """
  computations, _, entry = _computations(text)
  for name, times in _times_run(computations, entry, roles=("body", "branch_computations")).items():
    for line in computations[name]:
      if _OP.match(line):
        yield line, times


def _computations(text):
  """Lines and result of every computation by its name, and the name of the first one to run."""
  computations, results, entry, lines = {}, {}, None, []
  for line in text.splitlines():
    start = _COMPUTATION.match(line)
    if start:
      name = start[2]
      lines = computations[name] = []
      results[name] = line.rpartition("->")[2]
      entry = name if start[1] else entry
    else:
      lines.append(line)
  return computations, results, entry


def _times_run(computations, entry, *, roles=None):
  """How often each computation runs in a call of the program; only those called in some roles."""
  times = collections.Counter()

  def visit(name, count):
    times[name] += count
    for line in computations[name]:
      op = _OP.match(line)
      if op is None or op[2].endswith(("-done", "-update")):
        continue
      calls = _CALLS.findall(line)
      for role, names in calls:
        if roles is not None and role not in roles:
          continue
        rounds = _rounds(line, dict(calls), computations) if role == "body" else 1
        for called in re.findall(r"[\w.\-]+", names):
          if called in computations:
            visit(called, count * rounds)

  if entry is not None:
    visit(entry, 1)
  return times


def _rounds(line, calls, computations):
  """Rounds of a `while`: as annotated, or the one number that its condition compares with."""
  trips = _TRIPS.search(line)
  if trips:
    return int(trips[1])
  condition = computations.get(calls.get("condition", "").lstrip("%"), ())
  numbers = _CONSTANT.findall("\n".join(condition))
  return int(numbers[0]) if len(numbers) == 1 else 1


def _result_bytes(shape, op):
  """Bytes of a result; an asynchronous start returns its operands and what it will give."""
  sizes = []
  for dtype, dims in _SHAPE.findall(shape):
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
    sizes.append(bits * math.prod(int(n) for n in dims.split(",") if n) // 8)
  if op == "all-gather-start":
    sizes = sizes[len(sizes) // 2 :]
  elif op == "collective-permute-start":
    sizes = sizes[1:2]
  elif op == "send":
    sizes = sizes[:1]
  return sum(sizes)
