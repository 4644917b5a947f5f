"""A command that is started anew for its memory is the same command."""

import os
import pathlib
import subprocess
import sys

import pytest

from ofa_jax.engine import huge_pages

MODULE = """
import os, sys
from ofa_jax.engine import huge_pages
if __name__ == "__main__":
  huge_pages.restart_with()
  filled = bytearray(b"x") * (1 << 26)
  with open("/proc/self/smaps_rollup") as lines:
    kib = next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
  print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], kib >> 10)
"""


def run(folder, tunables):
  (folder / "module.py").write_text(MODULE)
  root = str(pathlib.Path(__file__).parents[2])
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join((root, str(folder)))}
  environment.pop("GLIBC_TUNABLES")
  process = subprocess.Popen(
    [sys.executable, "-m", "module", "--a=b c", ""],
    env=environment | ({} if tunables is None else {"GLIBC_TUNABLES": tunables}),
    stdout=subprocess.PIPE,
    text=True,
  )
  told, _ = process.communicate(timeout=60)
  assert process.returncode == 0
  number, rest = told.strip().split(" ", 1)
  assert int(number) == process.pid  # who started it can still stop it
  return rest.rsplit(" ", 1)


@pytest.mark.skipif(not huge_pages._only_who_asks(), reason="Linux gives them to all or to none")
@pytest.mark.parametrize("told", [None, "glibc.malloc.check=0"])
def test_the_same_command_has_huge_pages(tmp_path, told):
  expected = ":".join([*filter(None, [told]), "glibc.malloc.hugetlb=1"])
  found, mib = run(tmp_path, told)
  assert found == f"{expected} ['--a=b c', '']"
  assert int(mib) >= 62


def test_who_refuses_them_has_none(tmp_path):
  assert run(tmp_path, "glibc.malloc.hugetlb=0")[0] == "glibc.malloc.hugetlb=0 ['--a=b c', '']"
