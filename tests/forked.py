"""Commands in processes of their own, forked from one that has imported the libraries already.

  python -m tests.forked '[{"command": ["train", "--workdir=w"], "environment": {}}, ...]'

prints of each command, one after the other, its status and what it said, as JSON.
"""

import json
import os
import pathlib
import resource
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent


def run(cases: Sequence[Mapping[str, Any]], *, timeout: int = 300) -> list[tuple[int, str]]:
  """Status and output of commands: a name of `ofa_jax` or a file of this repository, and flags.

  Args:
    cases: with "command", and perhaps "environment", in which None takes a variable away, "folder",
      where it is run, and "largest_file" in bytes, beyond which writing fails as on a full disk.
    timeout: seconds, for all of them.
  """
  result = subprocess.run(
    [sys.executable, "-m", "tests.forked", json.dumps(list(cases))],
    env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=ROOT, capture_output=True, text=True,
    timeout=timeout,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  return [tuple(json.loads(line)) for line in result.stdout.splitlines()]


def load() -> None:
  """Imports what commands import."""
  import ofa_jax.compile_ahead
  import ofa_jax.evaluate
  import ofa_jax.extract_features
  import ofa_jax.generate
  import ofa_jax.train  # noqa: F401


def start(
  command: Sequence[str],
  *,
  output: int,
  environment: Mapping[str, str | None] | None = None,
  folder: str | None = None,
  largest_file: int | None = None,
) -> int:
  """Starts a command in a child of this process, which has called `load`; returns its number.

  Args:
    command: a name or file, and flags.
    output: the file that its streams go to.
    environment: what differs.
    folder: where it is run, if not here.
    largest_file: bytes.
  """
  child = os.fork()
  if child:
    return child
  status = 99
  try:
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name, value in (environment or {}).items():
      os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if folder is not None:
      os.chdir(folder)
    if largest_file is not None:  # Python ignores the signal, so that writing is an OSError
      resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    name, *sys.argv[1:] = command
    if name.endswith(".py"):
      sys.argv[0] = name
      runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
      sys.modules.pop(f"ofa_jax.{name}", None)
      runpy.run_module(f"ofa_jax.{name}", run_name="__main__", alter_sys=True)
    status = 0
  except SystemExit as e:
    status = e.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(child: int) -> int:
  """The status that a child ends with; negative: the signal."""
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _main() -> None:
  load()
  for case in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as output:
      more = {name: value for name, value in case.items() if name != "command"}
      status = wait(start(case["command"], output=output.fileno(), **more))
      output.seek(0)
      print(json.dumps([status, output.read()]), flush=True)


if __name__ == "__main__":
  _main()
