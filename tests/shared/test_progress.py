"""The log of a run on stderr."""

import os
import subprocess
import sys

from llmt_shared.progress import keep, kept_by, say

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


def test_what_is_said_is_kept_while_someone_keeps_it(capsys) -> None:
    lines: list[str] = []
    with kept_by(lines.append):
        say("one")
        keep("two")
    say("three")
    assert lines == ["one", "two"]
    assert capsys.readouterr().err == "one\nthree\n"
