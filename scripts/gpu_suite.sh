#!/usr/bin/env bash
# Runs the GPU suite with the python that is here, straight from this source tree: --help says what it does.
# PYTHON names another python; wheels that are missing there are what scripts/gpu_wheels.sh fetches.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/prep:$root/train:$root/shared:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m gpu.suite "$@"
