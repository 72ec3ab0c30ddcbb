"""`llmt-prep stats --html`: what it writes, what it prints, and what it costs those who do not ask for it."""

import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "llmt_prep", "stats"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_page_is_written_and_the_text_printed_as_ever(hostile, tmp_path):
    target = tmp_path / "new" / "report.html"
    told = run(hostile, "--html", target)
    assert told.returncode == 0, told.stderr
    assert told.stdout == run(hostile).stdout
    assert target.read_text("utf-8").endswith("</html>\n")
    assert [each.name for each in target.parent.iterdir()] == ["report.html"]


def test_a_page_that_cannot_be_written_is_one_message(hostile, tmp_path):
    for target in (tmp_path, hostile / "report.html"):
        told = run(hostile, "--html", target)
        assert told.returncode == 2
        assert told.stderr.startswith("error: --html: ")
        assert told.stderr.count("\n") == 1


def test_plotly_is_loaded_only_for_a_page(hostile, tmp_path):
    script = "import sys; from llmt_prep.cli import app; sys.argv[0] = 'llmt-prep'; app(standalone_mode=False); "
    script += "print({'plotly', 'jinja2', 'llmt_prep.html.page'} & set(sys.modules))"
    plain = subprocess.run([sys.executable, "-c", script, "stats", hostile], capture_output=True, text=True, check=True)
    assert plain.stdout.splitlines()[-1] == "set()"
    helped = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout.splitlines()[-1] == "set()"
