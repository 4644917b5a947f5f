"""Every test sees eight CPU devices, so that meshes are tested wherever the tests run."""

import importlib.util
import os
import secrets
import shutil
import tempfile

import jax
import pytest

from ofa_jax.data import quickstart, quickstart_ofa
from tests import bucket_servers

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
if jax.__version_info__ < (0, 11):  # XLA ends the process at a flag that it does not know
  # Eight devices share two cores: a collective may wait longer for its peers than XLA's 40 s.
  os.environ.setdefault("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=300")
# Compiling is most of the time of these tests. The commands that they start as processes of their
# own are optimised in full.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
  """The quickstart's data set."""
  return quickstart.digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
  """The data set of OFA's quickstart."""
  return quickstart_ofa.shapes(tmp_path_factory.mktemp("shapes"))


def pytest_configure(config):
  """Equal programs are compiled once, by whichever worker or command of a test meets them first.

  The folder is the session's own unless JAX_COMPILATION_CACHE_DIR names one. A limit of its size
  makes JAX lock it: without one, a process may read what another has half written.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="ofa_jax-compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # workers and commands inherit all three
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(8 << 30)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
  for name, kind in (
    ("jax_compilation_cache_dir", str),
    ("jax_compilation_cache_max_size", int),
    ("jax_persistent_cache_min_compile_time_secs", float),
  ):
    if name.upper() in os.environ:
      jax.config.update(name, kind(os.environ[name.upper()]))


@pytest.fixture(scope="session")
def services():
  """Emulated GCS and S3 with an empty bucket each, by scheme."""
  for name in ("gcp_storage_emulator", "moto", "gcsfs", "s3fs"):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f"no {name}, which is of the extra [test]")
  with bucket_servers.running() as services:
    yield services


@pytest.fixture(params=bucket_servers.SCHEMES)
def bucket(request, services, monkeypatch, tmp_path):
  """A new folder in a bucket, of GCS and then of S3; nothing may be written where we stand."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  yield f"{request.param}://{bucket_servers.BUCKET}/{secrets.token_hex(4)}"
  services[request.param].rule = None
  assert not list((tmp_path / "here").iterdir())
