#!/usr/bin/env bash
# Runs a command as N processes of one job on this machine, to try what a cluster does.
#
#   launch/local.sh 2 python -m ofa_jax.train --config=configs/quickstart.py --workdir=runs/two
#
# Ends with the first status that is not 0; SIGTERM and SIGINT go to all processes.
set -euo pipefail

if (($# < 2)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
num=$1
shift

free_port='import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
JAX_COORDINATOR_ADDRESS="localhost:${PORT:-$(python3 -c "$free_port")}"
JAX_NUM_PROCESSES=$num
export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES

processes=()
for ((i = 0; i < num; i++)); do
  JAX_PROCESS_ID=$i "$@" &
  processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT

status=0
for process in "${processes[@]}"; do
  # A signal interrupts `wait`; the process is then waited for again.
  while true; do
    code=0
    wait "$process" || code=$?
    kill -0 "$process" 2>/dev/null || break
  done
  ((status != 0)) || status=$code
done
exit "$status"
