# Sourced by the other scripts: makes .venv where it is missing and installs llmt into it, once.
# The stamp holds the hash of what was installed, so that a second run installs nothing.

python_of_machine() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
    return 1
}

set_up() {
    local wanted python
    [ -x .venv/bin/python ] || { python=$(python_of_machine) && "$python" -m venv .venv; } || return 1
    wanted=$(.venv/bin/python -c '
import hashlib, pathlib, sys
parts = [sys.version, str(pathlib.Path.cwd()), *(pathlib.Path(name).read_text() for name in ("pyproject.toml", "constraints.txt"))]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())') || return 1
    if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
        echo "installing llmt into .venv (once)" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --constraint constraints.txt --editable '.[prep,train,report,peft,smollm2,ray,dev]' >&2 || return 1
        echo "$wanted" > .venv/installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
