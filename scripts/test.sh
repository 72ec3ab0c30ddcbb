#!/usr/bin/env bash
# Runs the tests; makes .venv first where it is missing. Arguments go to pytest: bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
set_up
[ $# -gt 0 ] || set -- -m "not slow"
exec python -m pytest -q "$@"
