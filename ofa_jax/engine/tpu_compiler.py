"""The stack of the TPU's compiler, which has to be in the environment before libtpu is loaded."""

import importlib.util
import os
from collections.abc import MutableMapping

_VARIABLE = "LIBTPU_INIT_ARGS"
_FLAG = "fibers_default_thread_stack_size"
_SIZE = 2**20  # bytes; twice libtpu's own 64 KiB are enough for what was seen to crash


def deepen_stack(environ: MutableMapping[str, str] = os.environ) -> None:
  """Gives the threads of the TPU's compiler 1 MiB of stack; to be called before JAX has devices.

  To weigh a product that is fused into a product, libtpu (0.0.42.1) calls itself, some 10 KiB deep
  each time, on stacks of 64 KiB: some ordinary train steps end it with SIGSEGV. A size that is in
  LIBTPU_INIT_ARGS already stays, and a libtpu that does not know this flag passes over it.

  Args:
    environ: of this process; unchanged where there is no libtpu.
  """
  args = environ.get(_VARIABLE, "")
  if _FLAG in args or not (environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu")):
    return
  environ[_VARIABLE] = f"--{_FLAG}={_SIZE} --undefok={_FLAG} {args}".strip()
