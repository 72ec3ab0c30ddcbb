"""The full check of a finished dataset: every file, chunk, row and sum. What is damaged becomes a finding.

What hangs on a damaged file is not checked further: one flipped bit is one finding, not a hundred.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.companions import InputFiles, read_files, read_ledger, read_mix
from llmt_prep.config import MixConfig
from llmt_prep.ledger import Ledger
from llmt_prep.report import as_json
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_prep.verify import arrays, books, files
from llmt_prep.verify.findings import MEANINGS, Finding, attempt, finding
from llmt_prep.verify.hits import Hit, merged
from llmt_prep.verify.rows import Counted, Expected, check_rows, offset_findings
from llmt_prep.verify.spans import pair_findings
from llmt_prep.verify.special import surroundings
from llmt_shared.chunks import ArrayFolder, DiskChunks
from llmt_shared.config import StrictModel
from llmt_shared.errors import FormatError
from llmt_shared.manifest import NAME, Manifest, SplitEntry, read_manifest
from llmt_shared.mirror import Mirror, RangedChunks, copy_small_files
from llmt_shared.objects import Location, ObjectPath
from llmt_shared.progress import stage
from llmt_shared.terminal import escaped

__all__ = ["MEANINGS", "Finding", "Verdict", "as_text", "find_problems", "to_json"]


class Verdict(StrictModel):
    """The JSON answer of `llmt-prep verify`."""

    is_sound: bool
    findings: tuple[Finding, ...]


class _Companions(NamedTuple):
    """What could be read of the files beside the arrays."""

    mix: MixConfig | None
    files: InputFiles | None
    ledger: Ledger | None
    tokenizer: LoadedTokenizer | None


def find_problems(dataset: Location) -> list[Finding]:
    """Check a dataset in full.

    Args:
        dataset: its folder or URL.

    Returns:
        One finding for each problem, in an order that does not change between runs; none when it is sound.
    """
    try:
        manifest, digest = read_manifest(dataset)
    except (FormatError, OSError) as error:
        return [finding("F001", NAME, str(error))]
    with tempfile.TemporaryDirectory(prefix="llmt-verify-") as temporary:
        folder = dataset if isinstance(dataset, Path) else Path(temporary)
        return _find_problems(Mirror(dataset, folder, manifest, digest))


def _find_problems(dataset: Mirror) -> list[Finding]:
    manifest = dataset.manifest
    with stage("files", sum(entry.bytes for entry in manifest.files), "bytes") as advance:
        found = list(files.damaged_files(dataset.location, manifest, advance))
    damaged = {each.place for each in found}
    found += files.unlisted_files(dataset.location, manifest)
    if isinstance(dataset.location, ObjectPath):
        copy_small_files(dataset.location, dataset.folder, manifest, without=damaged)
    companions, more = _read_companions(dataset.folder, manifest, damaged)
    found += more
    if "zarr.json" not in damaged:
        found += attempt("F010", "zarr.json", arrays.open_group, dataset.location)[1]
    counted: dict[str, Counted] = {}
    for split in sorted(manifest.splits, key=lambda name: name == "train"):  # what is held out is known before train
        held_out = counted["validation"].documents if "validation" in counted else np.empty(0, np.uint64)
        more, sums = _check_split(dataset, split, companions, held_out, damaged)
        found += more
        if sums is not None:
            counted[split] = sums
    if companions.ledger is not None:
        found += books.ledger_findings(counted, companions.ledger, manifest)
    return found


def as_text(path: Location, problems: Sequence[Finding]) -> str:
    """Return the findings as text, one a line, or that there are none."""
    if not problems:
        _, digest = read_manifest(path)
        return f"{path}: sound; digest {digest}"
    lines = [f"{each.code}  {escaped(each.place)}: {escaped(each.message)}" for each in problems]
    codes = sorted({each.code for each in problems})
    meanings = [f"{code}: {MEANINGS[code]}" for code in codes]
    return "\n".join([*lines, "", f"{path}: {len(problems)} problems; copy it again or pack it again", *meanings])


def to_json(problems: Sequence[Finding]) -> str:
    """Return the findings as one JSON object."""
    return as_json(Verdict(is_sound=not problems, findings=tuple(problems)))


def _read_companions(path: Path, manifest: Manifest, damaged: set[str]) -> tuple[_Companions, list[Finding]]:
    """Read what lies beside the arrays and is whole, and compare it with the manifest."""
    found: list[Finding] = []
    mix = inputs = ledger = tokenizer = None
    if "mix.json" not in damaged:
        mix, more = attempt("F030", "mix.json", read_mix, path)
        found += more
        found += books.mix_findings(mix, manifest) if mix else ()
    if "ledger.json" not in damaged:
        ledger, more = attempt("F032", "ledger.json", read_ledger, path, manifest)
        found += more
        found += books.sum_findings(ledger, manifest.length) if ledger else ()
    if "files.parquet" not in damaged:
        inputs, more = attempt("F031", "files.parquet", read_files, path)
        found += more
        found += books.file_findings(inputs, ledger, manifest) if inputs else ()
    if ledger is not None and "quarantine.jsonl" not in damaged:
        wrong, more = attempt("F035", "quarantine.jsonl", _listed, books.quarantine_findings(path, ledger))
        found += [*more, *(wrong or ())]
    if mix is not None and not any(place.startswith("tokenizer/") for place in damaged):
        tokenizer, more = attempt("F040", "tokenizer", books.load_stored_tokenizer, path, mix)
        found += more
        found += books.tokenizer_findings(tokenizer, manifest) if tokenizer else ()
    return _Companions(mix, inputs, ledger, tokenizer), found


def _listed(findings: Iterator[Finding]) -> list[Finding]:
    return list(findings)


def _check_split(
    dataset: Mirror, split: str, companions: _Companions, held_out: NDArray[np.uint64], damaged: set[str]
) -> tuple[list[Finding], Counted | None]:
    """Findings in one split, and its sums where its rows could be checked."""
    location, folder, manifest, _ = dataset
    chunks = RangedChunks(location, folder) if isinstance(location, ObjectPath) else DiskChunks()
    own = ArrayFolder(folder / split, chunks)
    mine = {place for place in damaged if place.startswith(f"{split}/")}
    found = _check_arrays(location, own, manifest, split, mine)
    if not found and not mine:
        found = _check_offsets(own, manifest.splits[split], manifest.kind)
    if found or mine:
        return found, None
    checked, failed = attempt("F010", split, _check_rows, own, manifest, split, companions, held_out)
    if checked is None:
        return failed, None
    findings, counted = checked
    return [*findings, *books.manifest_sum_findings(counted, manifest, split)], counted


def _check_offsets(split: ArrayFolder, sizes: SplitEntry, kind: str) -> list[Finding]:
    found = offset_findings(split, "row_offsets", sizes.segments)
    if kind != "pretrain":
        found += offset_findings(split, "span_offsets", sizes.spans)
    return found + (pair_findings(split) if kind == "preference" else [])


def _check_arrays(
    dataset: Location, own: ArrayFolder, manifest: Manifest, split: str, damaged: set[str]
) -> list[Finding]:
    if any(place.endswith("/zarr.json") for place in damaged):
        return []
    found = list(arrays.misdescribed_arrays(own, manifest, split))
    if found or not all((dataset / place).exists() for place in damaged):  # zarr reads a missing chunk as zeros
        return found
    with stage(f"{split} chunks", arrays.num_chunks(manifest, split)) as advance:
        return list(arrays.damaged_chunks(dataset, own, manifest, split, advance))


def _check_rows(
    own: ArrayFolder, manifest: Manifest, split: str, companions: _Companions, held_out: NDArray[np.uint64]
) -> tuple[list[Finding], Counted]:
    mix, tokenizer = companions.mix, companions.tokenizer
    expected = Expected(
        kind=manifest.kind,
        length=manifest.length,
        sources=manifest.sources,
        max_id=tokenizer.max_id if tokenizer else manifest.tokenizer.max_id,
        files=companions.files,
        surroundings=surroundings(mix, tokenizer) if mix and tokenizer and mix.kind == "pretrain" else None,
        held_out=held_out,
    )
    hits: list[Hit] = []
    counted = Counted.of(len(manifest.sources))
    with stage(f"{split} rows", manifest.splits[split].rows) as advance:
        for block_rows, block_hits in check_rows(own, expected, counted, split == "validation"):
            hits += block_hits
            advance(block_rows)
    found = merged(hits, split)
    if not found and counted.balance % 2**64:
        message = "a piece without EOS has no next piece, or a later piece none before it"
        found.append(finding("F044", split, message))
    return found, counted
