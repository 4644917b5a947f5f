"""Every test sees eight CPU devices, so that meshes are tested wherever the tests run."""

import gc
import importlib.util
import os
import pathlib
import secrets
import shutil
import tempfile

import jax
import pytest

from ofa_jax.data import quickstart, quickstart_ofa
from tests import bucket_servers, drawings
from tests.compiling import compile_quickly

# The numbers of models, losses and searches can be tested on a GPU as well: docs/training.md.
PLATFORM = os.environ.get("OFA_JAX_TEST_PLATFORM", "cpu")
jax.config.update("jax_platforms", PLATFORM)
if PLATFORM == "cpu":
  jax.config.update("jax_num_cpu_devices", 8)
  compile_quickly()
# For xdist's workers and the commands that tests start, which need not start anew for it then.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# Tracing makes objects by the hundred thousand: Python's defaults look through them so often for
# garbage that it takes a tenth of the time.
gc.freeze()
gc.set_threshold(20_000, 20, 20)

# The files that take longest, from half a minute of processor time on. They are begun first: at the
# end, the others would wait for one of them.
LONG = (
  "test_processes.py",
  "test_train.py",
  "test_parity.py",
  "test_vqa_training.py",
  "test_ofa_training.py",
  "test_ofa_tasks.py",
  "test_ofa_pretraining.py",
  "test_stopping.py",
  "tasks/test_options.py",
  "engine/test_step.py",
  "test_configs.py",
  "test_custom.py",
  "test_evaluate.py",
  "launch/test_launch.py",
  "models/test_cnclip.py",
  "test_compile_ahead.py",
  "models/ofa/test_options.py",
)


def pytest_collection_modifyitems(items):
  """Long files first; within a file the order stays."""
  folder = pathlib.Path(__file__).parent
  rank = {folder / name: i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: rank.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
  """The quickstart's data set."""
  return quickstart.digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
  """The data set of OFA's quickstart, with the first 80 of its 400 pictures to validate with.

  They are two batches of most searches, the second of which is padded.
  """
  folder = quickstart_ofa.shapes(tmp_path_factory.mktemp("shapes"))
  table = folder / "valid.tsv"
  table.write_text("".join(table.read_text(encoding="utf-8").splitlines(True)[:80]), "utf-8")
  return folder


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
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  for name, kind in (
    ("jax_compilation_cache_dir", str),
    ("jax_compilation_cache_max_size", int),
    ("jax_persistent_cache_min_compile_time_secs", float),
  ):
    if name.upper() in os.environ:
      jax.config.update(name, kind(os.environ[name.upper()]))


@pytest.fixture(scope="session", autouse=True)
def no_drawings():
  """Of runs and evaluations; `drawn` brings them back."""
  with drawings.left_out():
    yield


@pytest.fixture
def drawn(no_drawings):
  """Curves and pages are drawn, as they are for users."""
  with drawings.made():
    yield


@pytest.fixture(scope="module")
def two_devices():
  """For runs whose mesh is not what is tested: JAX has the first two of the eight devices.

  Each device initialises, and updates, all that is not split, on the same two cores.
  """
  devices = jax.devices()[:2]
  with pytest.MonkeyPatch.context() as patch:
    for name in ("devices", "local_devices"):
      patch.setattr(jax, name, lambda *_, **__: list(devices))
    for name in ("device_count", "local_device_count"):
      patch.setattr(jax, name, lambda *_, **__: len(devices))
    yield


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
