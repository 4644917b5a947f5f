#!/usr/bin/env bash
# A TPU slice from nothing: asks for it, installs this checkout on every worker, runs one command.
#
#   NAME=muge ZONE=us-west4-a TYPE=v5litepod-256 launch/tpu_vm.sh create
#   NAME=muge ZONE=us-west4-a launch/tpu_vm.sh install
#   NAME=muge ZONE=us-west4-a launch/tpu_vm.sh run \
#     python3 -m ofa_jax.train --distributed --config=configs/cnclip_vith14.py:pod --workdir=gs://BUCKET/muge
#   NAME=muge ZONE=us-west4-a launch/tpu_vm.sh delete
#
# PROJECT chooses the project, VERSION the TPU software, SPOT=1 a machine that may be taken away.
set -euo pipefail

usage() {
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[[ -n ${NAME:-} && -n ${ZONE:-} && $# -gt 0 ]] || usage
where=(--zone="$ZONE")
if [[ -n ${PROJECT:-} ]]; then where+=(--project="$PROJECT"); fi
action=$1
shift

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

case $action in
  create)
    [[ -n ${TYPE:-} ]] || usage
    options=()
    if [[ -n ${SPOT:-} ]]; then options+=(--spot); fi
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" \
      --accelerator-type="$TYPE" --runtime-version="${VERSION:-v2-alpha-tpuv5-lite}" \
      ${options[@]+"${options[@]}"}
    until state=$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
      --format='value(state.state)') && [[ $state == ACTIVE ]]; do
      echo "waiting for $NAME: $state"
      [[ $state != FAILED && $state != SUSPENDED ]] || exit 1
      sleep 30
    done
    ;;
  install)
    archive=$(mktemp -d)/ofa_jax.tar.gz
    git -C "$(dirname "$0")/.." archive --format=tar.gz -o "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME":ofa_jax.tar.gz "${where[@]}" --worker=all
    on_all_workers 'mkdir -p ofa_jax && tar -xzf ofa_jax.tar.gz -C ofa_jax &&
      pip install --quiet -e "./ofa_jax[tpu]"'
    ;;
  run)
    (($# > 0)) || usage
    on_all_workers "cd ofa_jax && $(printf '%q ' "$@")"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
    ;;
  *)
    usage
    ;;
esac
