"""The last stage: everything of a dataset that is not tokens, then the manifest, and with it the digest."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.lib import StringBuilder

from llmt_prep import arrays
from llmt_prep.corpus import Corpus
from llmt_prep.hashes import hash_file
from llmt_prep.inputs import InputFile
from llmt_prep.ledger import Ledger
from llmt_prep.store import read_quarantine
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_shared import durable, manifest
from llmt_shared.manifest import FileEntry, Manifest, TokenizerEntry

RUN_REPORT = "run.json"
"""What is true of one run only; neither the manifest nor the digest covers it."""


def write_companions(
    data: Path,
    mix: dict[str, Any],
    tokenizer: LoadedTokenizer,
    ledger: Ledger,
    files: Sequence[InputFile],
    corpus: Corpus,
) -> None:
    """Write the mix, the tokenizer, the ledger, the list of input files and the quarantine.

    Args:
        data: directory that becomes the dataset.
        mix: resolved mix.
        tokenizer: its files are copied.
        ledger: closed books.
        files: inputs, in order.
        corpus: units, whose quarantines are joined.
    """
    arrays.write_group(data, {})
    durable.write(data / "mix.json", _json(mix))
    durable.write(data / "ledger.json", _json(ledger.model_dump()))
    for name, content in tokenizer.files.items():
        durable.write(data / "tokenizer" / name, content)
    sources = list(mix["sources"])
    number_of = {named: number for number, named in enumerate(zip(*corpus.files[:2], strict=True))}
    numbers = [number_of[file.source, file.name] for file in files]
    first, records = corpus.files.first_record[:-1], np.diff(corpus.files.first_record)
    table = pa.table(
        {
            "source": _strings(sources[file.source] for file in files),
            "path": _strings(file.name for file in files),
            "bytes": _integers(file.bytes for file in files),
            "sha256": _strings(file.sha256 for file in files),
            "first_document": _integers(first[numbers]),
            "records": _integers(records[numbers]),
        }
    )
    with durable.writing(data / "files.parquet") as out:
        pq.write_table(table, out)
    _write_quarantine(data / "quarantine.jsonl", sources, corpus)


def _strings(values: Iterable[str]) -> pa.Array:
    """A column; `pyarrow.array` would import pandas, for 0.2 s, only to see that a list is no series of it."""
    builder = StringBuilder()
    builder.append_values(list(values))
    return builder.finish()


def _integers(values: Iterable[int]) -> pa.Array:
    content = np.fromiter(values, np.uint64)
    return pa.Array.from_buffers(pa.uint64(), len(content), [None, pa.py_buffer(content)])


def _write_quarantine(path: Path, sources: list[str], corpus: Corpus) -> None:
    """One line for each bad record: source, file, record (from 0: a line or row number), reason, preview."""
    with durable.writing(path) as out:
        for unit in map(int, np.flatnonzero(corpus.units["bad"])):
            for bad in read_quarantine(corpus.directory(unit)):
                line = {
                    "source": sources[corpus.units["source"][unit]],
                    "file": corpus.files.names[corpus.file(unit)],
                    "record": corpus.record_in_file(unit) + bad.record,
                    "reason": bad.reason,
                    "preview": bad.preview,
                }
                out.write(json.dumps(line).encode() + b"\n")


def write_manifest(
    data: Path, header: dict[str, Any], known: Mapping[Path, str], uploaded: Mapping[Path, int] | None = None
) -> None:
    """Write the manifest, last of all.

    Args:
        data: directory that becomes the dataset.
        header: all of `Manifest` but the files and the format.
        known: sha256 of the files that were hashed as they were written, all large ones; the others are read.
        uploaded: sizes of those that are not in ``data`` any more, but in a store.
    """
    for leftover in data.rglob("*.tmp"):
        leftover.unlink()  # of a process that was killed while it wrote
    outside = {data / manifest.NAME, data / RUN_REPORT}  # of an earlier try that was killed after writing them
    sizes = {path: path.stat().st_size for path in data.rglob("*") if _is_written(path)} | dict(uploaded or {})
    paths = {path.relative_to(data).as_posix(): path for path in sizes}
    entries = [
        FileEntry(path=name, bytes=sizes[path], sha256=known.get(path) or hash_file(str(path)))
        for name, path in sorted(paths.items())
        if path not in outside
    ]
    assert known.keys() <= sizes.keys(), "a file that was written is gone"
    content = Manifest(format=1, files=tuple(entries), **header)
    durable.write(data / manifest.NAME, _json(content.model_dump(mode="json")))


def _is_written(path: Path) -> bool:
    """Whether it is a file that is whole: a process that was taken for lost may write another even now."""
    return path.suffix != ".tmp" and path.is_file()


def tokenizer_entry(tokenizer: LoadedTokenizer) -> TokenizerEntry:
    """Return what the manifest says of the tokenizer."""
    return TokenizerEntry(
        digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        max_id=tokenizer.max_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
