#!/usr/bin/env bash
# Runs a command until it is finished, where no scheduler does: on a TPU VM, on a machine of one's own.
#
#   launch/supervise.sh FOLDER COMMAND...
#
# FOLDER receives log.txt, all that the command prints, and status: empty while it runs, its exit
# status at the end. 75 (interrupted, and saved) and an end by a signal start the same command
# again; 0 is the end, and so is everything else, such as a fault of the config (1) and Ctrl-C
# (130). SIGTERM goes to the command, which saves, and is then the end. RESTARTS is how often it is
# started again at most (100), DELAY the seconds before (10).
set -uo pipefail

if (($# < 2)); then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
folder=$1
shift
mkdir -p "$folder" || exit 1
# One supervisor a folder: the lock goes with the process, however it ends.
exec 9>>"$folder/pid"
if ! flock --nonblock 9; then
  echo "$folder: expected no other supervisor here, found process $(cat "$folder/pid")" >&2
  exit 2
fi
echo $$ >"$folder/pid"
: >"$folder/status"
exec >>"$folder/log.txt" 2>&1

# What our commands then end with when they were told to stop and have saved.
export OFA_JAX_INTERRUPTED_STATUS=75

say() {
  echo "[supervise $(date -u +%Y-%m-%dT%H:%M:%SZ) $(hostname)] $*"
}

process=
told=
# shellcheck disable=SC2329  # called by the trap
stop() {
  told=1
  [[ -z $process ]] || kill -TERM "$process" 2>/dev/null
}
trap stop TERM INT

restarts=0
while true; do
  say "start $restarts: $*"
  "$@" 9>&- &
  process=$!
  [[ -z $told ]] || kill -TERM "$process" 2>/dev/null
  # A signal interrupts `wait`; the process is then waited for again.
  while true; do
    status=0
    wait "$process" || status=$?
    kill -0 "$process" 2>/dev/null || break
  done
  process=
  if [[ -n $told ]]; then
    say "told to stop; the command ended with $status"
    break
  elif ((status == 0)); then
    say "finished"
    break
  elif (((status != 75 && status < 128) || status == 130)); then
    say "ended with $status, which the same command would again: not started again"
    break
  elif ((restarts >= ${RESTARTS:-100})); then
    say "ended with $status after $restarts restarts: not started again"
    break
  fi
  restarts=$((restarts + 1))
  say "ended with $status: started again in ${DELAY:-10} s"
  sleep "${DELAY:-10}" 9>&- &
  wait $! # `sleep` by itself would keep a signal waiting
  [[ -z $told ]] || break
done
echo "$status" >"$folder/status"
exit "$status"
