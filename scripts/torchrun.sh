#!/usr/bin/env bash
# Trains on several machines without a scheduler. Run this on each of them, with the address of one of them in HEAD:
#   HEAD=10.0.0.1 NODES=2 bash scripts/torchrun.sh --config run.yaml [key.sub=value ..]
# `output` must be a folder that all machines share. One machine needs no script: `llmt-train fit` uses all its GPUs.
set -euo pipefail
: "${HEAD:?set HEAD to the name or address of one of the machines}"
: "${NODES:?set NODES to the number of machines}"

# SIGTERM or Ctrl-C to torchrun reaches the ranks, which then have so many seconds to finish their step and save.
# An older torch always gives 30: send SIGTERM to the process of one rank instead, and all ranks stop after that step.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# torchrun ends with 1 whatever the ranks end with; a line `stopped: ..` near the end says that the run was saved.
exec torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-llmt}" \
    -m llmt_train fit "$@"
