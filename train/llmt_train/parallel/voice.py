"""Of all the processes that do the same, one speaks."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from llmt_shared.progress import silent
from llmt_train.parallel.board import Board
from llmt_train.parallel.started import name_of

_DELAY = 5.0
"""Seconds that rank 0 has to give a warning first."""


@contextmanager
def one_voice(board: Board, rank: int, host: str) -> Iterator[None]:
    """Let rank 0 speak for all; of warnings, which may differ, each text is shown once, with the rank if not 0."""
    shown = warnings.showwarning
    waiting: list[_Late] = []

    def show_once(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
        text = f"{category.__name__}: {message}"
        show = _Late(board, text, lambda: shown(f"{name_of(rank, host)}: {message}", category, *place, **options))
        waiting.append(show)
        show.start()

    def claim_and_show(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
        _is_first(board, f"{category.__name__}: {message}")
        shown(message, category, *place, **options)

    with ExitStack() as stack:
        stack.callback(setattr, warnings, "showwarning", shown)
        warnings.showwarning = show_once if rank else claim_and_show
        if rank:
            stack.enter_context(silent())
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)  # libraries' loggers, which say the same on every rank
        yield
        for late in waiting:
            late.finish()


class _Late:
    """A warning that is shown if nobody has shown it when its time has come."""

    def __init__(self, board: Board, text: str, show: Any) -> None:
        self._board, self._text, self._show = board, text, show
        self._timer = threading.Timer(_DELAY, self._show_if_first)
        self._timer.daemon = True

    def start(self) -> None:
        self._timer.start()

    def finish(self) -> None:
        if self._timer.is_alive():
            self._timer.cancel()
            self._show_if_first()

    def _show_if_first(self) -> None:
        if _is_first(self._board, self._text):
            self._show()


def _is_first(board: Board, text: str) -> bool:
    try:
        return board.is_first_to(f"warn/{text}")
    except RuntimeError:  # whoever keeps the store has gone
        return True
