"""Every test sees eight CPU devices, so that meshes are tested wherever the tests run."""

import jax
import pytest

from ofa_jax.data import quickstart

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
  """The quickstart's data set."""
  return quickstart.digits(tmp_path_factory.mktemp("digits"))
