#!/usr/bin/env bash
# Runs the tests, those of a file in one process, as many files at once as there are cores (at most 8); makes .venv first
# where it is missing. Arguments go to pytest: bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
set_up
[ $# -gt 0 ] || set -- -m "not slow"
exec python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
