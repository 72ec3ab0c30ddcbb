"""What a command line owes its user: one message per failure, the right exit code, and no traceback unless asked."""

import os
import sys
from collections.abc import Callable
from typing import Any

from llmt_shared.errors import LlmtError


def run(app: Callable[..., Any], extra: str) -> None:
    """Run a Typer app and exit.

    Args:
        app: the Typer app.
        extra: extra of this distribution that the app's commands need; named when an import fails.

    ``--traceback`` anywhere on the command line (or ``LLMT_TRACEBACK=1``) shows where an error came from.
    """
    traceback = "--traceback" in sys.argv or os.environ.get("LLMT_TRACEBACK", "") not in ("", "0")
    sys.argv = [argument for argument in sys.argv if argument != "--traceback"]
    try:
        app()
    except LlmtError as error:
        if error.is_told:
            sys.exit(error.exit_code)
        if traceback:
            raise
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if traceback or (error.name or "").startswith("llmt_"):
            raise
        _fail(f"{error.name} is not installed; run: pip install 'llmt[{extra}]'", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `llmt-prep stats | head` is no failure
        sys.exit(0)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if traceback:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", 1)


def _fail(message: str, code: int) -> None:
    label = "stopped" if code == 4 else "error"
    print(f"{label}: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(code)
