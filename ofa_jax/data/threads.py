"""How many threads read and decode rows."""

import os

# Of a host. Some threads a core help where rows come from far away; beyond this number they only
# take memory, and work that is handed out ahead by their number is all of a data set at once.
MOST = 1024


def number(workers: int | None) -> int:
  """The threads that a person asks for.

  Args:
    workers: None for one a core.

  Raises:
    ValueError: less than one, or more than `MOST`.
  """
  if workers is None:
    return os.cpu_count() or 1
  if not 1 <= workers <= MOST:
    raise ValueError(f"workers: expected None (one a core) or 1 to {MOST:,}, found {workers}")
  return workers
