"""The corpus is one sequence of documents, however its units were cut; nothing of it stays in memory."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_chats import random_chats, targets_of, write_chats
from synthetic_corpus import hashes, write_corpus

from llmt_prep import corpus as corpora
from llmt_shared.errors import FormatError

LENGTHS = [[5, 1, 8, 3, 3, 9, 4], [2, 7, 1]]


@settings(max_examples=20)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any))
def test_a_part_reads_the_same_however_units_are_cut(tmp_path_factory, unit_documents):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), LENGTHS, unit_documents)
    whole = np.concatenate(LENGTHS)
    assert corpus.num_documents == 10
    assert corpus.source_borders.tolist() == [0, 7, 10]
    for first in range(10):
        for last in range(first + 1, 11):
            assert corpus.lengths(first, last).tolist() == whole[first:last].tolist()
            assert corpus.text_hashes(first, last).tolist() == hashes(10)[first:last].tolist()


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("unit_documents", [[20], [3], [1, 4]])
def test_outlines_are_read_however_units_are_cut(tmp_path: Path, sides: int, unit_documents: list[int]) -> None:
    chats = random_chats(10, sides, 20, seed=2)
    corpus = write_chats(tmp_path, [chats[:7], chats[7:]], unit_documents)
    wanted = np.stack([targets_of(chats).first_target, targets_of(chats).chosen_length], axis=1)
    for first in range(10):
        for last in range(first + 1, 11):
            assert corpus.outlines(first, last).tolist() == wanted[first:last].tolist()


def test_outlines_of_text_are_zeros_that_take_no_memory(tmp_path: Path) -> None:
    outlines = write_corpus(tmp_path, LENGTHS, 3).outlines(2, 9)
    assert outlines.tolist() == [[0, 0]] * 7
    assert outlines.strides == (0, 0)


def test_borders_of_units_say_where_their_documents_and_tokens_begin(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, LENGTHS, 3)
    assert corpus.document_borders.tolist() == [0, 3, 6, 7, 10]
    assert corpus.token_borders.tolist() == [0, 14, 29, 33, 43]
    assert [corpus.open_unit(u).meta.documents for u in range(4)] == [b - a for a, b in pairwise([0, 3, 6, 7, 10])]


def test_a_document_has_a_place_in_its_file(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, LENGTHS, 20)
    assert corpus.place(6) == "file-0:7"
    assert corpus.place(7) == "file-1:1"


def test_a_column_that_ends_early_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, LENGTHS, 20)
    (corpus.directory(0) / "lengths").write_bytes(b"1234" * 6)
    assert len(corpus.lengths(0, 6)) == 6
    with pytest.raises(FormatError, match=r"00/lengths: ends before document 7; delete this folder"):
        corpus.lengths(5, 8)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("name", ["units.bin", "documents.bin", "tokens.bin", "corpus.json"])
def test_a_saved_corpus_that_is_damaged_is_not_taken_for_the_same(tmp_path: Path, name: str, damage: str) -> None:
    corpus, path = write_corpus(tmp_path, LENGTHS, 4), tmp_path / "saved" / name
    corpora.save(corpus, tmp_path / "saved")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    assert not corpora.is_saved(corpus, tmp_path / "saved")
    corpora.save(corpus, tmp_path / "saved")
    assert corpora.is_saved(corpus, tmp_path / "saved")


def test_another_corpus_is_not_the_saved_one(tmp_path: Path) -> None:
    corpora.save(write_corpus(tmp_path / "one", LENGTHS, 4), tmp_path / "saved")
    assert not corpora.is_saved(write_corpus(tmp_path / "other", LENGTHS, 4), tmp_path / "saved")
    assert not corpora.is_saved(write_corpus(tmp_path / "third", LENGTHS, 5), tmp_path / "saved")


def test_a_saved_corpus_loads_the_same(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, LENGTHS, 4)
    assert not corpora.is_saved(corpus, tmp_path / "saved")
    corpora.save(corpus, tmp_path / "saved")
    assert corpora.is_saved(corpus, tmp_path / "saved")
    loaded = corpora.load(tmp_path / "saved")
    for name in ("folders", "num_sources", "has_targets"):
        assert getattr(loaded, name) == getattr(corpus, name)
    for name in ("units", "document_borders", "token_borders", "source_borders"):
        assert np.array_equal(getattr(loaded, name), getattr(corpus, name))
