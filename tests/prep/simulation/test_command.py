"""`pack --simulate` on the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(mix: dict[str, Any], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = folder / "mix.json"
    path.write_text(json.dumps(mix))
    command = [sys.executable, "-m", "llmt_prep", "pack", "--mix", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_implies_a_dry_run_and_says_what_is_measured_and_what_extrapolated(
    mix: dict[str, Any], tmp_path: Path
) -> None:
    done = run(mix, tmp_path, "--simulate", "documents=1e9,machines=8,cores=16,disk=1GB/s")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("MEASURED HERE") < done.stdout.index("EXTRAPOLATED")
    assert "on 8 machines of 16 cores (disk 1.0 GB/s)" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mix.json"]


def test_json_holds_the_question_and_both_parts_of_the_answer(mix: dict[str, Any], tmp_path: Path) -> None:
    done = run(mix, tmp_path, "--dry-run", "--simulate", "documents=1000", "--json", "--workers", "1")
    answer = json.loads(done.stdout)
    assert list(answer) == ["asked", "measured", "forecast"]
    assert answer["asked"]["documents"] == 1000
    assert answer["forecast"]["cluster"]["cores"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--simulate", "documents=abc,machnes=2"], "did you mean 'machines'"),
        (["--simulate", "", "--explain-cache"], "different questions"),
    ],
)
def test_what_cannot_be_asked_ends_in_one_message(
    arguments: list[str], message: str, mix: dict[str, Any], tmp_path: Path
) -> None:
    done = run(mix, tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
