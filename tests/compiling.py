"""How programs are compiled in the tests: most of them quickly, some as those of users are.

Compiling is most of the time of the tests. In their process and in the commands that they start
with `QUICK` XLA optimises little, and takes the older of its two ways to emit the code of fused
operations: a training step then compiles in 40% of the processor time. Other commands, and what is
compiled with `AS_USERS`, are compiled as without any flags.
"""

import os
from unittest import mock

import jax

# XLA ends the process at a flag that it does not know: whatever is not known is compiled as for
# users.
_KNOWN = jax.__version_info__ < (0, 11)
# Eight devices share two cores: a collective may wait longer for its peers than XLA's 40 s.
_PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=300" if _KNOWN else ""
_PLAIN = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_FLAGS = f"{os.environ.get('XLA_FLAGS', _PATIENT)}{f' {_PLAIN}' if _KNOWN else ''}"

# The environment of commands whose compiled code is not what is tested.
QUICK = {
  "JAX_PLATFORMS": "cpu",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(_KNOWN)),
  "XLA_FLAGS": _FLAGS,
}

# Options of `lowered.compile` that undo all of it: XLA's defaults.
AS_USERS = (
  {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
  }
  if _KNOWN
  else {}
)


def compile_quickly() -> None:
  """In this process from now on, in its commands not; to be called before JAX has devices."""
  jax.config.update("jax_disable_most_optimizations", _KNOWN)
  os.environ["XLA_FLAGS"] = _FLAGS
  # By default there are as many threads as devices: where all wait for each other in a collective,
  # none is left for what one of them waits for.
  with mock.patch.dict(os.environ, NPROC=os.environ.get("NPROC", "32")):
    jax.devices()  # reads the flags
  os.environ["XLA_FLAGS"] = _FLAGS.removesuffix(_PLAIN).strip()
