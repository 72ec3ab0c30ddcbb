"""What `verify` says: one coded finding for each problem. Codes are stable: scripts may rely on them."""

from collections.abc import Callable
from typing import Any, TypeVar

from llmt_shared.config import StrictModel
from llmt_shared.errors import LlmtError

Result = TypeVar("Result")

MEANINGS = {
    "F001": "the manifest cannot be read",
    "F002": "a file is missing",
    "F003": "a file is truncated or oversized",
    "F004": "a file's content is not what the manifest's sha256 says",
    "F005": "a file is not in the manifest",
    "F006": "a file cannot be read",
    "F010": "an array is not described as FORMAT.md says",
    "F011": "a chunk's CRC-32C does not match, or zarr cannot read it",
    "F012": "zarr and our reader give different numbers",
    "F020": "row_offsets or span_offsets do not ascend from 0 to the number of what they count",
    "F021": "a segment has no token",
    "F022": "a row's segments are longer than the row",
    "F023": "padding is not 0",
    "F024": "row_targets is not what the segments give",
    "F025": "a segment's source or document does not exist",
    "F026": "the manifest's sums are not the arrays'",
    "F027": "a span crosses a segment, holds its first token, overlaps another or is empty, or a segment has none",
    "F028": "a pair is not two neighbouring segments of its row, which follow each other in one document",
    "F030": "the mix cannot be read, or is not this dataset's",
    "F031": "files.parquet cannot be read, or is not this dataset's",
    "F032": "the ledger cannot be read",
    "F033": "a sum of the ledger does not close",
    "F034": "the ledger's numbers are not the arrays'",
    "F035": "the quarantine does not hold what the ledger says",
    "F040": "the tokenizer cannot be read, or is not the manifest's",
    "F041": "a token id is larger than any of the tokenizer's",
    "F042": "a control token stands where none may be",
    "F043": "a document does not begin with BOS or end with EOS",
    "F044": "the pieces of split documents do not join",
    "F050": "a document is in train and in validation",
}
"""What each code means."""


class Finding(StrictModel):
    """One problem."""

    code: str
    """A key of `MEANINGS`."""
    place: str
    """File of the dataset, or split and row."""
    message: str
    """Found and wanted."""


def finding(code: str, place: str, message: str) -> Finding:
    """Return a finding of a known code."""
    assert code in MEANINGS, code
    return Finding(code=code, place=place, message=message)


def attempt(
    code: str, place: str, function: Callable[..., Result], *arguments: Any
) -> tuple[Result | None, list[Finding]]:
    """Call a function that reads what may be damaged: its result, or a finding that says why there is none."""
    try:
        return function(*arguments), []
    except LlmtError as error:
        return None, [finding(code, place, str(error))]
    except Exception as error:  # damaged bytes make libraries raise anything, and verify must go on
        first_line = (str(error).splitlines() or [""])[0]
        return None, [finding(code, place, f"{type(error).__name__}: {first_line}")]
