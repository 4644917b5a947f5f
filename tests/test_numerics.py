"""What a precision means, and where it is refused."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ofa_jax import config, numerics
from tests import test_parity


def test_parameters_are_cast_once_to_the_compute_dtype():
  params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(()), "count": jnp.ones((), jnp.int32)}
  with jax.enable_x64(True):
    found = {p: numerics.cast(params, p) for p in config.PRECISIONS}
  dtypes = {p: [str(found[p][k].dtype) for k in params] for p in found}
  assert dtypes == {
    "bf16": ["bfloat16", "float32", "int32"],
    "fp32": ["float32", "float32", "int32"],
    "fp64": ["float64", "float64", "int32"],
  }


def test_islands_are_never_narrower_than_float32():
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, bool):
    assert numerics.wide(dtype) == jnp.float32
  assert numerics.wide(jnp.float64) == jnp.float64
  assert numerics.widened(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32


def test_float64_is_refused_where_it_cannot_be():
  with pytest.raises(ValueError, match=r'jax.config.update\("jax_enable_x64", True\)'):
    test_parity.make_program("micro_vit", precision="fp64")
  with jax.enable_x64(True):
    numerics.check("fp64", platform="cpu")
    with pytest.raises(ValueError, match="Expected precision fp32 or bf16 on a TPU"):
      numerics.check("fp64", platform="tpu")
  for precision in ("bf16", "fp32"):
    numerics.check(precision, platform="tpu")


@pytest.mark.parametrize("precision", config.PRECISIONS)
def test_commands_turn_on_what_the_precision_of_their_config_needs(precision):
  code = (
    "import sys\nimport jax\nfrom ofa_jax import cli\ncli.define_config()\n"
    "cli.run(lambda: print(jax.config.jax_enable_x64), argv=['x', *sys.argv[1:]])"
  )
  flags = ["--config=configs/quickstart.py", f"--config.precision={precision}"]
  root = pathlib.Path(__file__).parent.parent
  done = subprocess.run(
    [sys.executable, "-c", code, *flags], cwd=root, capture_output=True, text=True
  )
  assert done.stdout == f"{precision == 'fp64'}\n", done.stderr
