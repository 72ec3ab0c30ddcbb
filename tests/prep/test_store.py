"""A unit of the store is there whole or not at all, and gives back what was written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_chats import chats, random_chats, targets_of, write_unit

from llmt_prep.documents import BadRecord
from llmt_prep.store import (
    COUNTED,
    Targets,
    hash_text,
    is_sound,
    open_unit,
    read_column,
    read_quarantine,
    token_dtype,
    writing_unit,
)
from llmt_shared.errors import FormatError

ids = st.lists(st.integers(0, 65_535), min_size=1, max_size=8)


def counts_of(documents: list[list[int]], quarantined: int = 0) -> dict[str, int]:
    return dict.fromkeys(COUNTED, 0) | {
        "records": len(documents) + quarantined,
        "documents": len(documents),
        "quarantined": quarantined,
        "tokens": sum(map(len, documents)),
        "lines": len(documents),
    }


def write(path: Path, documents: list[list[int]], dtype: str = "uint16") -> None:
    with writing_unit(path, np.dtype(dtype)) as writer:
        for record, tokens in enumerate(documents):
            writer.add(np.array(tokens, np.uint32), np.array([len(tokens)]), [record], [record * 2**40])
        writer.finish(counts_of(documents), "tokenizers 0")


@given(st.lists(ids, max_size=6))
def test_a_unit_gives_back_its_documents(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("store") / "unit"
    write(path, documents)
    unit = open_unit(path)
    borders = np.cumsum(unit.lengths[:-1].astype(np.int64)) if documents else []
    assert [part.tolist() for part in np.split(unit.tokens, borders)] == (documents or [[]])
    assert unit.records.tolist() == list(range(len(documents)))
    assert unit.text_hash.tolist() == [record * 2**40 for record in range(len(documents))]
    assert {name: getattr(unit.meta, name) for name in COUNTED} == counts_of(documents)
    assert not unit.meta.has_targets


def test_the_files_are_raw_little_endian_arrays(tmp_path):
    write(tmp_path / "unit", [[1, 258], [3]])
    assert (tmp_path / "unit/tokens").read_bytes() == bytes([1, 0, 2, 1, 3, 0])
    assert (tmp_path / "unit/lengths").read_bytes() == bytes([2, 0, 0, 0, 1, 0, 0, 0])


def test_ids_above_65535_are_stored_in_32_bits(tmp_path):
    assert [token_dtype(id_).name for id_ in (0, 65_535, 65_536)] == ["uint16", "uint16", "uint32"]
    write(tmp_path / "unit", [[70_000, 1]], dtype="uint32")
    assert open_unit(tmp_path / "unit").tokens.tolist() == [70_000, 1]


def test_bad_records_come_back(tmp_path):
    bad = [BadRecord(3, "a reason", "pre\x00view \n �"), BadRecord(9, "another", "")]
    with writing_unit(tmp_path / "unit", np.dtype("uint16")) as writer:
        for each in bad:
            writer.quarantine(each)
        writer.finish(counts_of([], quarantined=2), "tokenizers 0")
    assert list(read_quarantine(tmp_path / "unit")) == bad


def test_the_hash_of_a_text_never_changes():
    assert hash_text("naïve".encode()) == 10089246171632108558
    assert hash_text(b"a") != hash_text(b"b")


def write_and_fail(path: Path) -> None:
    with writing_unit(path, np.dtype("uint16")) as writer:
        writer.add(np.array([1], np.uint32), np.array([1]), [0], [0])
        raise KeyboardInterrupt


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(tmp_path / "unit")
    assert list(tmp_path.iterdir()) == []


def test_a_unit_that_was_not_finished_does_not_appear(tmp_path):
    with pytest.raises(ValueError, match="was not finished"), writing_unit(tmp_path / "unit", np.dtype("uint16")):
        pass
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from llmt_prep.store import writing_unit
with writing_unit(Path(sys.argv[1]), np.dtype("uint16")) as writer:
    writer.add(np.arange(100_000, dtype=np.uint32) % 50_000, np.array([100_000]), [0], [0])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_unit_and_its_leftovers_go_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    path = tmp_path / "unit"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FormatError, match="not a unit of the token store"):
        open_unit(path)
    write(path, [[1, 2]])
    assert [each.name for each in tmp_path.iterdir()] == ["unit"]


def test_another_process_at_work_on_the_same_unit_is_left_alone(tmp_path):
    with writing_unit(tmp_path / "unit", np.dtype("uint16")) as writer:
        (temporary,) = tmp_path.iterdir()
        neighbour = temporary.with_name(temporary.name.replace(str(os.getpid()), str(os.getppid())))
        neighbour.mkdir()
        writer.finish(counts_of([]), "tokenizers 0")
    write(tmp_path / "unit", [])
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "unit", neighbour])


def test_the_first_of_two_writers_of_one_unit_wins(tmp_path):
    path = tmp_path / "unit"
    write(path, [[1, 2]])
    before = (path / "tokens").stat().st_ino
    write(path, [[1, 2]])
    assert (path / "tokens").stat().st_ino == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["tokens", "lengths", "records", "text_hash"])
@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_a_damaged_unit_is_not_opened(tmp_path, name, damage):
    write(tmp_path / "unit", [[1, 2], [3]])
    file = tmp_path / "unit" / name
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(content[:-1] if damage == "short" else content + b"x")
    with pytest.raises(FormatError, match="delete this folder"):
        open_unit(tmp_path / "unit")


@pytest.mark.parametrize("name", ["tokens", "lengths", "records", "text_hash", "quarantine.jsonl"])
def test_a_flipped_bit_makes_a_unit_unsound(tmp_path, name):
    write(tmp_path / "unit", [[1, 2], [3]])
    assert is_sound(tmp_path / "unit")
    file = tmp_path / "unit" / name
    content = file.read_bytes() or b"x"
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert not is_sound(tmp_path / "unit")


def test_what_is_no_unit_is_not_sound(tmp_path):
    assert not is_sound(tmp_path / "unit")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"records": 1}'])
def test_a_unit_with_broken_counts_is_not_opened(tmp_path, content):
    write(tmp_path / "unit", [[1]])
    (tmp_path / "unit/meta.json").write_text(content)
    with pytest.raises(FormatError, match="not a unit of the token store"):
        open_unit(tmp_path / "unit")


PAIRS = random_chats(9, 2, 24, seed=1)


@given(st.integers(1, 2).flatmap(chats))
def test_a_unit_gives_back_its_targets(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("store") / "unit"
    write_unit(path, found)
    unit, wanted = open_unit(path), targets_of(found)
    assert unit.meta.has_targets
    for name, values in wanted._asdict().items():
        assert getattr(unit.targets, name).tolist() == values.tolist()
    assert (unit.span_start.tolist(), unit.span_length.tolist()) == (
        wanted.span_start.tolist(), wanted.span_length.tolist(),
    )  # fmt: skip
    assert unit.first_span.tolist() == [0, *np.cumsum(wanted.num_spans).tolist()]


def test_a_unit_of_chats_may_hold_nothing(tmp_path):
    write_unit(tmp_path / "unit", [])
    unit = open_unit(tmp_path / "unit")
    assert unit.meta.has_targets
    assert [len(column) for column in unit.targets] == [0] * 5
    assert unit.first_span.tolist() == [0]


def test_targets_come_in_parts_and_are_raw_little_endian_arrays(tmp_path):
    with writing_unit(tmp_path / "unit", np.dtype("uint16"), has_targets=True) as writer:
        for record in range(2):
            targets = Targets(*(np.array(column) for column in ([3], [2**32 - 1], [2], [3, 300], [1, 2])))
            writer.add(np.arange(5), np.array([5]), [record], [0], targets)
        writer.finish(counts_of([[0] * 5] * 2) | {"spans": 4}, "tokenizers 0")
    assert is_sound(tmp_path / "unit")
    assert (tmp_path / "unit/first_target").read_bytes() == bytes([3, 0, 0, 0] * 2)
    assert (tmp_path / "unit/chosen_length").read_bytes() == b"\xff" * 8
    assert (tmp_path / "unit/num_spans").read_bytes() == bytes([2, 0, 0, 0] * 2)
    assert (tmp_path / "unit/span_start").read_bytes() == bytes([3, 0, 0, 0, 44, 1, 0, 0] * 2)
    assert (tmp_path / "unit/span_length").read_bytes() == bytes([1, 0, 0, 0, 2, 0, 0, 0] * 2)


@pytest.mark.parametrize("name", Targets._fields)
@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_a_unit_whose_targets_have_another_size_is_not_opened(tmp_path, name, damage):
    write_unit(tmp_path / "unit", PAIRS)
    file = tmp_path / "unit" / name
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(content[:-4] if damage == "short" else content + content)
    with pytest.raises(FormatError, match=f"{name}.*delete this folder"):
        open_unit(tmp_path / "unit")


@pytest.mark.parametrize("name", Targets._fields)
def test_a_flipped_bit_in_targets_makes_a_unit_unsound(tmp_path, name):
    write_unit(tmp_path / "unit", PAIRS)
    assert is_sound(tmp_path / "unit")
    file = tmp_path / "unit" / name
    content = file.read_bytes()
    file.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    assert not is_sound(tmp_path / "unit")


def test_targets_that_were_promised_and_not_given_make_no_unit(tmp_path):
    with writing_unit(tmp_path / "unit", np.dtype("uint16"), has_targets=True) as writer:
        writer.add(np.arange(5), np.array([5]), [0], [0])
        writer.finish(counts_of([[0] * 5]), "tokenizers 0")
    with pytest.raises(FormatError, match="first_target: not of the 4 bytes"):
        open_unit(tmp_path / "unit")


@pytest.mark.parametrize("name", ["first_target", "chosen_length", "num_spans"])
def test_a_part_of_a_column_is_read(tmp_path, name):
    write_unit(tmp_path / "unit", PAIRS)
    whole = getattr(targets_of(PAIRS), name)
    for first in range(len(PAIRS) + 1):
        for last in range(first, len(PAIRS) + 1):
            assert read_column(tmp_path / "unit", name, first, last - first).tolist() == whole[first:last].tolist()
    with pytest.raises(FormatError, match=f"{name}: ends before document 10"):
        read_column(tmp_path / "unit", name, 9, 1)
