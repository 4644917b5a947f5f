"""Memory in pages of 2 MiB, where Linux gives them to who asks.

XLA takes the memory of a step from malloc anew in every step on a CPU. In pages of 4 KiB, which the
kernel hands out and clears one by one, that was a quarter of the small world's time.
"""

import os
import pathlib
import sys

_OF_LINUX = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"  # read by glibc as a program starts
_ASKS = "glibc.malloc.hugetlb"


def restart_with() -> None:
  """Starts this program anew, as the same process, with malloc asking for them.

  For the first line of a command. Nothing happens where they are given or refused anyway, where
  GLIBC_TUNABLES tells about them already, and in the program that was started.
  """
  told = os.environ.get(_TUNABLES, "")
  if _ASKS in told or not _only_who_asks():
    return
  os.environ[_TUNABLES] = ":".join([*filter(None, [told]), f"{_ASKS}=1"])
  sys.stdout.flush()
  sys.stderr.flush()
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _only_who_asks() -> bool:
  try:
    return "[madvise]" in _OF_LINUX.read_text()
  except OSError:
    return False
