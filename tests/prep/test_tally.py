"""The tally counts what passes, and each distinct document once, however often and in whatever order it comes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_corpus import of_lengths, write_corpus

from llmt_prep import tally
from llmt_prep.packing import split_documents
from llmt_prep.tally import Tally, counting

LENGTHS = [list(range(1, 22)), [5], list(range(30, 70))]
WHOLE = np.concatenate(LENGTHS)
BORDERS = [0, 21, 22, 62]


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(0, 61), max_size=80), max_size=4), st.sampled_from(["split", "truncate", "drop"]))
def test_a_tally_counts_what_a_loop_counts(tmp_path_factory, windows, overflow):
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "_PIECE", 16)
        found = counted(folder, windows, overflow)
    for source, mine in enumerate(found):
        passed = [d for window in windows for d in window if BORDERS[source] <= d < BORDERS[source + 1]]
        long = [WHOLE[d] for d in passed if WHOLE[d] > 40]
        assert mine == Tally(
            documents=len(passed),
            tokens=sum(WHOLE[passed]),
            distinct_documents=len(set(passed)),
            distinct_tokens=sum(WHOLE[list(set(passed))]),
            truncated=sum(length - 40 for length in long) if overflow == "truncate" else 0,
            dropped_documents=len(long) if overflow == "drop" else 0,
            dropped=sum(long) if overflow == "drop" else 0,
        )


def counted(folder: Path, windows: list[list[int]], overflow: str) -> list[Tally]:
    corpus = write_corpus(folder / "store", LENGTHS, 9)
    with counting(folder / "seen", corpus) as counter:
        assert (folder / "seen").stat().st_size == 8
        for window in windows:
            documents = of_lengths(WHOLE[window].astype(np.int64), np.array(window, np.int64))
            counter.add(documents, split_documents(documents.length, 40, overflow))
        found = counter.totals()
    assert not (folder / "seen").exists()
    return found
