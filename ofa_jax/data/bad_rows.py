"""How many rows of a data set may be unreadable: counted, named and limited in one place."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ofa_jax.data.tsv import BadRow


class TooManyBadRows(ValueError):  # noqa: N818 (named after what it reports)
  """More rows are bad than the run allows."""


class Pass(NamedTuple):
  """How much there is to see of a data set.

  Attributes:
    rows: of it.
    share: how many of them this host sees in a pass.
  """

  rows: int
  share: int


class BadRows:
  """Counts and names the bad rows of a run; may be used from several threads.

  In the first pass over a data set a run stops as soon as more than `max_rate` of the rows seen are
  bad, the share being taken of at least `min_rows`, so that one bad row among the first ten stops
  nothing. From the end of that pass on it stops when more than `max_rate` of all rows are bad,
  however few they are: each has been named by then. The first rule is for 10^8 rows, the second
  for 12.

  Args:
    max_rate: the largest share of bad rows, of each stream.
    log: called with one message for each bad row, the first time it is met.
    min_rows: see above.
    known: names of bad rows that were told already; those met are added.

  Attributes:
    count: bad rows met so far, repetitions included.
    seen: rows met so far.
    reasons: why each distinct bad row is bad, by its name.
  """

  def __init__(
    self,
    max_rate: float = 0.01,
    log: Callable[[str], None] | None = None,
    *,
    min_rows: int = 1000,
    known: set[str] | None = None,
  ):
    self.count = 0
    self.seen = 0
    self.reasons = {}
    self._max_rate = max_rate
    self._min_rows = min_rows
    self._log = log
    self._known = set() if known is None else known
    self._of_stream = {}  # name -> (bad rows, rows seen)
    self._rows = {}  # name -> the numbers of different bad rows
    self._carried = 0, 0  # bad rows and rows of a run before
    self._lock = threading.Lock()

  @property
  def names(self) -> list[str]:
    """The distinct bad rows, as `name: reason`."""
    return [f"{name}: {reason}" for name, reason in list(self.reasons.items())]

  def carry(self, count: int, *, seen: int) -> None:
    """Counts what an interrupted run met before this one goes on; it has named them."""
    with self._lock:
      self.count, self.seen = self.count + count, self.seen + seen
      self._of_stream[None] = self._carried = count, seen

  def add(
    self,
    bad: Sequence[BadRow],
    *,
    seen: int,
    stream: str | None = None,
    rows: Sequence[int] = (),
    whole: Pass | None = None,
  ) -> None:
    """Notes `seen` rows of a stream, among them the bad ones.

    Args:
      bad: those.
      seen: how many rows were read.
      stream: of which.
      rows: the numbers of the bad ones, with `whole`.
      whole: how much a pass over the data set is; None: unknown.

    Raises:
      TooManyBadRows: the allowed rate is exceeded.
    """
    with self._lock:
      self.seen += seen
      self.count += len(bad)
      new = [row for row in bad if row.name not in self._known]
      self._known.update(row.name for row in new)
      self.reasons.update((row.name, row.reason) for row in bad)
      count, before = self._of_stream.get(stream, (0, 0))
      count, seen = self._of_stream[stream] = count + len(bad), before + seen
      self._rows.setdefault(stream, set()).update(rows)
      different = len(self._rows[stream])
    for row in new:
      if self._log is not None:
        self._log(f"Skipped a bad row: {row}")
    carried, done = self._carried
    if whole is not None and seen - done >= whole.share:
      count, seen = different + carried, whole.rows + done
      stop, among = count > self._max_rate * seen, f"all {seen}"
    else:
      stop, among = bad and count > self._max_rate * max(seen, self._min_rows), f"{seen}"
    if not stop:
      return
    raise TooManyBadRows(
      f"Expected at most {self._max_rate:.2%} bad rows{of_stream(stream)}, found {count} among "
      f"{among}: {'; '.join(self.names[:5])}. Repair the data, or allow a higher rate."
    )


def of_stream(stream: str | None) -> str:
  """The stream's name as the end of a phrase."""
  return "" if stream is None else f" of the stream {stream!r}"
