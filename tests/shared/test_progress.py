"""The log of a run on stderr."""

import os
import subprocess
import sys

CLOSED = """
import os
from llmt_shared.progress import say

reading, writing = os.pipe()
os.dup2(writing, 2)
os.close(reading)
say("one")
say("two")
print("done")
"""


def test_a_log_that_nobody_reads_ends_no_run() -> None:
    """As in `llmt-prep pack 2>&1 | head -1`, which else would end the run, with exit code 0."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CLOSED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "done\n")
