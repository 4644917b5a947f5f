#!/usr/bin/env bash
# The smoke job: the quickstart is trained, interrupted, goes on and is evaluated.
#
#   launch/smoke.sh WORKDIR [FLAG...]
#
# WORKDIR is a new folder or gs:// or s3:// place; FLAGs go to all commands, such as --distributed.
# Run it as every process of the job. It takes three minutes on two CPU cores and ends with 0
# when all of it worked.
set -euo pipefail

if (($# == 0)) || [[ $1 == -* ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
workdir=$1
shift
config=(--config=configs/quickstart.py --config.steps="${STEPS:-150}")
config+=("--config.evals[0].every=0" "--config.evals[1].every=0" "$@") # only at the end
train=(python3 -m ofa_jax.train "${config[@]}" --workdir="$workdir" --interrupted-status=75)
began=$SECONDS

say() {
  echo "[smoke $((SECONDS - began)) s] $*"
}

fail() {
  say "FAILED: $*" >&2
  exit 1
}

say "training, to be interrupted after the first steps"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/lines"
PYTHONUNBUFFERED=1 "${train[@]}" >"$folder/lines" &
process=$!
# Only process 0 of a job prints, so that only it interrupts; all of them agree on the step.
told=
while IFS= read -r line; do
  echo "$line"
  if [[ -z $told && $line == *" | Rows/s: "* ]]; then
    told=$SECONDS
    kill -TERM "$process"
  fi
done <"$folder/lines"
status=0
wait "$process" || status=$?
((status == 75)) || fail "expected status 75 of an interrupted run, found $status (a new WORKDIR?)"
[[ -z $told ]] || say "saved and ended $((SECONDS - told)) s after SIGTERM"

say "the same command goes on"
"${train[@]}" || fail "going on ended with $?"

say "evaluating what was trained"
python3 -m ofa_jax.evaluate "${config[@]}" --checkpoint="$workdir" || fail "evaluate ended with $?"
say "PASSED"
