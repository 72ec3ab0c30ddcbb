"""Do the files beside the arrays belong to the dataset, and do their numbers agree with what the arrays hold."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from llmt_prep import ledger as ledgers
from llmt_prep.companions import InputFiles
from llmt_prep.config import MixConfig
from llmt_prep.finish import tokenizer_entry
from llmt_prep.ledger import Ledger
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer
from llmt_prep.verify.findings import Finding, finding
from llmt_prep.verify.rows import Counted
from llmt_shared.manifest import Manifest


def load_stored_tokenizer(directory: Path, mix: MixConfig) -> LoadedTokenizer:
    """Load the dataset's own copy, with the BOS and EOS that the mix names."""
    return load_tokenizer(str(directory / "tokenizer"), None, mix.tokenizer.eos_token, mix.tokenizer.bos_token)


def mix_findings(mix: MixConfig, manifest: Manifest) -> Iterator[Finding]:
    """Compare the mix with the manifest."""
    pairs = (
        ("kind", mix.kind, manifest.kind),
        ("sequence.length", mix.sequence.length, manifest.length),
        ("sources", list(mix.sources), list(manifest.sources)),
    )
    for key, found, wanted in pairs:
        if found != wanted:
            yield finding("F030", "mix.json", f"{key} is {found}; the manifest says {wanted}")


def tokenizer_findings(tokenizer: LoadedTokenizer, manifest: Manifest) -> Iterator[Finding]:
    """Compare the stored tokenizer with what the manifest says of it."""
    found, said = tokenizer_entry(tokenizer).model_dump(), manifest.tokenizer.model_dump()
    for key, value in found.items():
        if value != said[key]:
            yield finding("F040", "tokenizer", f"{key} is {value}; the manifest says {said[key]}")


def file_findings(files: InputFiles, ledger: Ledger | None, manifest: Manifest) -> Iterator[Finding]:
    """Compare the list of input files with the sources and with the ledger's number of files."""
    counts = Counter(files.source)
    unknown = sorted(set(counts) - set(manifest.sources))
    if unknown:
        yield finding("F031", "files.parquet", f"lists sources {unknown}; the manifest has {list(manifest.sources)}")
    for name, books in ledger.sources.items() if ledger else ():
        if counts[name] != books.files:
            yield finding("F031", "files.parquet", f"lists {counts[name]} files of {name}; the ledger {books.files}")


def sum_findings(ledger: Ledger, length: int) -> Iterator[Finding]:
    """Check that the ledger's sums close."""
    yield from (finding("F033", "ledger.json", mistake) for mistake in ledgers.mistakes(ledger, length))


def quarantine_findings(directory: Path, ledger: Ledger) -> Iterator[Finding]:
    """Count the quarantined records of every source."""
    counts: Counter[str] = Counter()
    with (directory / "quarantine.jsonl").open("rb") as lines:
        counts.update(str(json.loads(line)["source"]) for line in lines)
    for name in sorted(counts.keys() | ledger.sources.keys()):
        wanted = ledger.sources[name].quarantined if name in ledger.sources else 0
        if counts[name] != wanted:
            yield finding("F035", "quarantine.jsonl", f"{counts[name]} records of {name}; the ledger says {wanted}")


def manifest_sum_findings(counted: Counted, manifest: Manifest, split: str) -> Iterator[Finding]:
    """Compare the manifest's tokens and targets with the arrays; rows and segments are shapes."""
    said = manifest.splits[split]
    for key, value in (("tokens", int(counted.tokens_of_source.sum())), ("targets", counted.targets)):
        if value != getattr(said, key):
            yield finding("F026", "MANIFEST.json", f"{split}: {key} says {getattr(said, key)}; the rows hold {value}")


def ledger_findings(counted: Mapping[str, Counted], ledger: Ledger, manifest: Manifest) -> Iterator[Finding]:
    """Compare the ledger with what the arrays of each split hold."""
    for split, sums in counted.items():
        per_source = zip(
            manifest.sources, sums.tokens_of_source.tolist(), sums.documents_of_source.tolist(), strict=True
        )
        for name, tokens, documents in per_source:
            books = ledger.sources[name]
            amount = books.train if split == "train" else books.validation
            said = {"tokens": amount.in_rows, "documents": amount.selected.documents - amount.dropped.documents}
            for key, value in (("tokens", tokens), ("documents", documents)):
                if value != said[key]:
                    message = f"{name}: {said[key]} {key} in {split} rows; the arrays hold {value}"
                    yield finding("F034", "ledger.json", message)
        if ledger.splits[split].rows != manifest.splits[split].rows:
            yield finding("F034", "ledger.json", f"{ledger.splits[split].rows} {split} rows; the arrays hold others")
