"""What a worker process does, whoever started it: it keeps to one thread, and errors travel as themselves."""

import os
import pickle
import textwrap
import traceback
from collections.abc import Callable
from typing import Any

Task = tuple[Any, ...]


def use_one_thread() -> None:
    """Keep tokenizers to one thread: a worker is one of as many as there are CPUs."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # where each thread would also grow a cache of words of its own


def outcome(function: Callable[..., Any], task: Task) -> tuple[Any, Exception | None]:
    """Return the result of a task, or the error that it raised."""
    try:
        return function(*task), None
    except Exception as error:
        return None, _portable(error)


def named(function: Callable[..., Any], index: int, task: Task) -> str:
    """Return a task as messages tell it."""
    return f"task {index}, {function.__name__}{textwrap.shorten(repr(task), 300)}"


def _portable(error: Exception) -> Exception:
    """Return an error that another process can read, with the place where it was raised for `--traceback`."""
    error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
