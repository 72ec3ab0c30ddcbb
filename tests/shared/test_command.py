"""One message and the right exit code for each way to fail; a traceback only when asked for."""

import subprocess
import sys

import pytest

from llmt_shared import command
from llmt_shared.errors import ConfigError, DataError, FormatError, LlmtError, Stopped


def fail_with(error: BaseException):
    def app() -> None:
        raise error

    return app


def exit_code(error: BaseException) -> int:
    with pytest.raises(SystemExit) as stopped:
        command.run(fail_with(error), extra="prep")
    return stopped.value.code


@pytest.fixture(autouse=True)
def plain_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llmt-prep"])
    monkeypatch.delenv("LLMT_TRACEBACK", raising=False)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("x"), 1), (ConfigError("x"), 2), (FormatError("x"), 3), (Stopped("x"), 4), (LlmtError("x"), 1),
        (KeyboardInterrupt(), 130), (OSError(13, "denied", "/data"), 1), (ModuleNotFoundError("x", name="x"), 2),
    ],
)  # fmt: skip
def test_every_failure_has_its_exit_code(error, code, capsys):
    assert exit_code(error) == code
    assert "Traceback" not in capsys.readouterr().err


def test_the_message_goes_to_stderr(capsys):
    exit_code(ConfigError("mix.yaml:3: seeed: unknown key"))
    assert capsys.readouterr() == ("", "error: mix.yaml:3: seeed: unknown key\n")


def test_a_stop_is_no_error(capsys):
    exit_code(Stopped("by SIGTERM"))
    assert capsys.readouterr().err == "stopped: by SIGTERM\n"


def test_a_missing_package_says_which_extra_has_it(capsys):
    exit_code(ModuleNotFoundError("no zarr", name="zarr"))
    assert capsys.readouterr().err == "error: zarr is not installed; run: pip install 'llmt[prep]'\n"


def test_a_missing_module_of_ours_is_a_bug_and_not_hidden():
    with pytest.raises(ModuleNotFoundError):
        command.run(fail_with(ModuleNotFoundError("gone", name="llmt_prep.gone")), extra="prep")


def test_an_os_error_names_the_file(capsys):
    exit_code(OSError(13, "Permission denied", "/data/x"))
    assert capsys.readouterr().err == "error: /data/x: Permission denied\n"


@pytest.mark.parametrize("way", ["option", "variable"])
def test_a_traceback_is_shown_when_asked_for(way, monkeypatch):
    if way == "option":
        monkeypatch.setattr(sys, "argv", ["llmt-prep", "pack", "--traceback"])
    else:
        monkeypatch.setenv("LLMT_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        command.run(fail_with(ConfigError("x")), extra="prep")


def test_the_app_does_not_see_the_traceback_option(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llmt-prep", "--traceback", "stats"])
    seen: list[str] = []
    command.run(lambda: seen.extend(sys.argv), extra="prep")
    assert seen == ["llmt-prep", "stats"]


def test_a_reader_that_leaves_early_is_no_failure():
    code = (
        "from llmt_shared import command\n"
        "def app():\n"
        "    for _ in range(100_000):\n"
        "        print('x' * 100)\n"
        "command.run(app, extra='prep')\n"
    )
    source = command.__file__.removesuffix("llmt_shared/command.py")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": source}
    )
    process.stdout.readline()
    process.stdout.close()
    message = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), message) == (0, b"")


def test_a_failure_that_another_process_tells_is_an_exit_code_alone(monkeypatch, capsys):
    def app():
        error = ConfigError("told elsewhere")
        error.is_told = True
        raise error

    monkeypatch.setattr(sys, "argv", ["llmt-train", "fit", "--traceback"])
    with pytest.raises(SystemExit) as caught:
        command.run(app, extra="train")
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")
