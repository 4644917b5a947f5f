#!/usr/bin/env bash
# Writes requirements-tpu.txt and requirements-cuda.txt: what pyproject.toml asks for, in the versions
# of the Python environment that is active, which should be one that the tests have passed in.
#
#   launch/lock.sh          # pip install uv
set -euo pipefail
cd "$(dirname "$0")/.."

tested=$(mktemp)
trap 'rm -f "$tested"' EXIT
# Builds from elsewhere have no place in an image, and CUDA's own libraries follow JAX.
uv pip freeze | grep -v -e '^-e' -e '@' -e '^ofa-jax' -e '^nvidia' -e '^python-dateutil' -e '^wrapt' >"$tested"
for kind in tpu cuda; do
  file=launch/requirements-$kind.txt
  uv pip compile --quiet pyproject.toml --extra=$kind --extra=gcs --extra=s3 --constraint="$tested" \
    --python-version=3.12 --python-platform=x86_64-manylinux_2_31 \
    --no-annotate --no-header --output-file="$file"
  printf '%s\n' "# Python 3.12 on Linux, x86-64; written by launch/lock.sh" | cat - "$file" >"$tested.$kind"
  mv "$tested.$kind" "$file"
done
