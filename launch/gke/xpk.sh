#!/usr/bin/env bash
# The run of tpu.yaml through xpk (pip install xpk), which writes the JobSet itself.
#
#   CLUSTER=c ZONE=us-west4-a PROJECT=p IMAGE=i BUCKET=b launch/gke/xpk.sh [TPU_TYPE [SLICES]]
set -euo pipefail

if [[ -z ${CLUSTER:-} || -z ${ZONE:-} || -z ${PROJECT:-} || -z ${IMAGE:-} || -z ${BUCKET:-} ]]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

# By itself xpk starts again what ended with 42 or 127 to 255; 75 is interrupted and saved.
exec xpk workload create --workload=ofa-jax \
  --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
  --tpu-type="${1:-v5litepod-256}" --num-slices="${2:-1}" --docker-image="$IMAGE" \
  --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=120 \
  --command="python -m ofa_jax.train --distributed --config=configs/cnclip_vith14.py:pod \
--config.init=gs://$BUCKET/models/ViT-H-14 --workdir=gs://$BUCKET/runs/muge \
--config.step_timeout=300 --interrupted-status=75"
