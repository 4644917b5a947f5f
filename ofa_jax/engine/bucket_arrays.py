"""Checkpoints in buckets: what Orbax and TensorStore are told of `gs://` and `s3://`.

Orbax knows `gs://` and hands its arrays to TensorStore's own driver; of `s3://`, for which there is
a driver as well, it makes a local path. `prepare` teaches it the other scheme in the one place
that describes where arrays lie, so that both are written by the same code: objects below `STEP/`,
of which `commit_success.txt` is the last, as `options` says to the manager of checkpoints.

Emulators and other services: TENSORSTORE_GCS_HTTP_URL for GCS, AWS_ENDPOINT_URL_S3 or
AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION for S3.
"""

import functools
import os
from collections.abc import Iterable
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.path import atomicity, gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from ofa_jax import storage

# A request that fails is tried again with growing pauses, at most for about two minutes in a row.
RETRIES = {"max_retries": 8, "initial_delay": "0.5s", "max_delay": "30s"}


def path_of(path: str | os.PathLike) -> epath.Path:
  """A folder of checkpoints, local or in a bucket, as Orbax takes it: never below the current one.

  Raises:
    ValueError: it is in a bucket, and the library for that is missing.
  """
  if not storage.in_bucket(path):
    return epath.Path(path).resolve()
  prepare()
  return epath.Path(storage.of(path))


def options(path: str | os.PathLike) -> dict[str, Any]:
  """Options of a manager of checkpoints for a folder in a bucket; none for a local one."""
  if not storage.in_bucket(path):
    return {}
  return {"temporary_path_class": atomicity.CommitFileTemporaryPath}


def remove_but(whole: Iterable[int], folder: str | os.PathLike) -> None:
  """Removes the steps of a bucket that are not whole: they have their names from the beginning."""
  if storage.in_bucket(folder):
    steps = {name.partition("/")[0] for name in storage.files_below(folder)}
    for step in filter(str.isdigit, steps - set(map(str, whole))):
      storage.remove(f"{os.fspath(folder)}/{step}")


def reader() -> ocp.StandardCheckpointer:
  """Reads the arrays of a model directory, which is whole where its `config.json` is there."""
  return ocp.StandardCheckpointer(temporary_path_class=atomicity.AtomicRenameTemporaryPath)


def kvstore(path: str) -> dict[str, Any]:
  """TensorStore's description of a place in a bucket."""
  bucket, _, name = path[5:].partition("/")
  if path.startswith("gs://"):
    driver = os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs")
    return {"driver": driver, "bucket": bucket, "path": name, "gcs_request_retries": RETRIES}
  described = {"driver": "s3", "bucket": bucket, "path": name, "s3_request_retries": RETRIES}
  endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
  region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
  if endpoint:
    described["endpoint"] = endpoint
  if region or endpoint:
    described["aws_region"] = region or "us-east-1"
  return described


@functools.cache
def prepare() -> None:
  """Once: teaches Orbax both schemes, and not to ask what an account may not know."""
  normalized = tensorstore_utils._normalize_path
  has_folders = gcs_utils.is_hierarchical_namespace_enabled

  def normalize(path: str) -> str:
    return storage.normal(path) if storage.in_bucket(path) else normalized(path)

  @functools.cache
  def bucket_has_folders(bucket: str) -> bool:
    try:
      return has_folders(f"gs://{bucket}/")
    except Exception:  # wants storage.buckets.get, which reading and writing objects does not
      return False

  def asked(path: str | os.PathLike) -> bool:
    name = os.fspath(path)
    return name.startswith("gs://") and bucket_has_folders(name[5:].partition("/")[0])

  tensorstore_utils._normalize_path = normalize
  tensorstore_utils._use_gcs_driver = storage.in_bucket
  gcs_utils.get_kvstore_for_gcs = kvstore
  gcs_utils.is_hierarchical_namespace_enabled = asked
