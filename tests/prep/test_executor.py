"""Tasks in processes: a stop reaches the parent only, and nothing outlives it."""

import os
import subprocess
import sys
from pathlib import Path

INTERRUPTED = """
import os, signal, sys, threading, time
from llmt_prep import executor

signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupt():
    while True:
        time.sleep(0.005)
        os.killpg(0, signal.SIGINT)

if __name__ == "__main__":
    seen = 0
    def count(*_):
        global seen
        seen += 1
    signal.signal(signal.SIGINT, count)
    threading.Thread(target=interrupt, daemon=True).start()
    done = sorted(executor.run(abs, [(-1,), (-2,), (-3,)], 2))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert done == [(0, 1), (1, 2), (2, 3)] and seen
"""


def test_interrupts_never_reach_a_worker_not_even_while_it_starts(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(INTERRUPTED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
