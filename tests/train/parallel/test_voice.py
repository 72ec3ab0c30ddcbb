"""Rank 0 speaks; of warnings nothing is lost and nothing is said twice."""

import warnings
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from llmt_shared.progress import is_silent, kept_by, say
from llmt_train.parallel.board import Board
from llmt_train.parallel.voice import one_voice


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a terminal would show of warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        texts: list[str] = []
        monkeypatch.setattr(warnings, "showwarning", lambda message, *others, **more: texts.append(str(message)))
        yield texts


def test_other_ranks_say_and_keep_nothing(capfd: pytest.CaptureFixture[str]):
    kept: list[str] = []
    with kept_by(kept.append), one_voice(Board(HashStore(), 2), 1, "node"):
        assert is_silent()
        say("something")
    assert kept == []
    assert capfd.readouterr().err == ""


def test_a_warning_of_all_ranks_is_shown_by_rank_0(shown: list[str]):
    board = Board(HashStore(), 2)
    for rank in (0, 1):
        with one_voice(board, rank, "node"):
            warnings.warn("alike", stacklevel=1)
    assert shown == ["alike"]


def test_a_warning_of_another_rank_alone_is_shown_with_its_name(shown: list[str]):
    with one_voice(Board(HashStore(), 2), 1, "node"):
        warnings.warn("mine", stacklevel=1)
        assert shown == []
    assert shown == ["rank 1 (node): mine"]


def test_what_was_there_before_comes_back(shown: list[str]):
    before = warnings.showwarning
    for rank in (0, 1):
        with one_voice(Board(HashStore(), 2), rank, "node"):
            assert warnings.showwarning != before
        assert warnings.showwarning == before
    assert not is_silent()
