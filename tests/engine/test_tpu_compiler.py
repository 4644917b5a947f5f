"""The TPU's compiler gets its stack from the environment, where there is such a compiler."""

import pytest

from ofa_jax.engine import tpu_compiler

LIBRARY = {"TPU_LIBRARY_PATH": "/lib/libtpu.so"}
STACK = "--fibers_default_thread_stack_size=1048576 --undefok=fibers_default_thread_stack_size"


@pytest.mark.parametrize(
  ("given", "args"),
  [
    (None, STACK),
    (" --xla_tpu_enable_x=true", f"{STACK}  --xla_tpu_enable_x=true"),
    ("--fibers_default_thread_stack_size=65536", "--fibers_default_thread_stack_size=65536"),
  ],
)
def test_the_stack_is_deepened_once_and_what_was_given_stays(given, args):
  environ = LIBRARY | ({} if given is None else {"LIBTPU_INIT_ARGS": given})
  for _ in range(2):
    tpu_compiler.deepen_stack(environ)
    assert environ == LIBRARY | {"LIBTPU_INIT_ARGS": args}


def test_without_the_compiler_nothing_is_set(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  environ = {}
  tpu_compiler.deepen_stack(environ)
  assert not environ
