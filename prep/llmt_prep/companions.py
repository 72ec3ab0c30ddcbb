"""What lies beside the arrays of a dataset and is read back: the input files, the mix, the ledger."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from llmt_prep.config import MixConfig, SourceConfig
from llmt_prep.documents import reader_for
from llmt_prep.ledger import Ledger
from llmt_shared.errors import FormatError
from llmt_shared.manifest import Manifest

_WAY_OUT = "run `llmt-prep verify`, and copy the dataset again or pack it again"
_COLUMNS = {
    "source": pa.string(), "path": pa.string(), "bytes": pa.uint64(), "sha256": pa.string(),
    "first_document": pa.uint64(), "records": pa.uint64(),
}  # fmt: skip


class InputFiles(NamedTuple):
    """files.parquet: the files that the documents come from, in order; F of them."""

    source: list[str]
    """[F] name of the source."""
    path: list[str]
    first_document: NDArray[np.uint64]
    """[F] provenance number of the file's record 0."""
    num_records: int
    """Lines and rows of all files; provenance numbers are below it."""


class Place(NamedTuple):
    """Where a document comes from."""

    source: str
    path: str
    record: int
    """Physical line or row of the file, from 0."""


def read_files(dataset: Path) -> InputFiles:
    """Read files.parquet.

    Raises:
        FormatError: it cannot be read, or lacks what FORMAT.md says.
    """
    path = dataset / "files.parquet"
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path}: cannot be read: {_first_line(error)}; {_WAY_OUT}") from None
    found = {field.name: field.type for field in table.schema}
    if found != _COLUMNS or any(column.null_count for column in table.columns):
        raise FormatError(f"{path}: columns {', '.join(found)}; wanted {', '.join(_COLUMNS)} without nulls; {_WAY_OUT}")
    first, records = table["first_document"].to_numpy(), table["records"].to_numpy()
    if not len(first) or (first != np.cumsum(records) - records).any():
        raise FormatError(f"{path}: first_document is not the number of records of the files before; {_WAY_OUT}")
    return InputFiles(table["source"].to_pylist(), table["path"].to_pylist(), first, int(records.sum()))


def place_of(files: InputFiles, document: int) -> Place:
    """Return the file and record of a provenance number."""
    index = int(file_of(files, np.array([document], np.uint64))[0])
    return Place(files.source[index], files.path[index], document - int(files.first_document[index]))


def file_of(files: InputFiles, documents: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the index of each document's file; a file without records owns none."""
    return np.searchsorted(files.first_document, documents, "right") - 1


def described(place: Place, sources: Mapping[str, SourceConfig]) -> str:
    """Return a place as people look for it: ``path:line`` from 1, ``path row N`` from 0, or the path alone."""
    source = sources[place.source]
    reader = reader_for(place.path, "arrow" if source.hf else source.reader)
    if reader in ("parquet", "arrow"):
        return f"{place.path} row {place.record}"
    if reader == "text" and source.record == "file":
        return place.path
    return f"{place.path}:{place.record + 1}"


def read_mix(dataset: Path) -> MixConfig:
    """Read the resolved mix; its ``output`` says where the dataset lies.

    Raises:
        FormatError: it cannot be read.
    """
    path = dataset / "mix.json"
    try:
        stored = json.loads(path.read_bytes())
        return MixConfig.model_validate({**stored, "output": dataset})
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{path}: cannot be read: {_first_line(error)}; {_WAY_OUT}") from None


def read_ledger(dataset: Path, manifest: Manifest) -> Ledger:
    """Read the ledger.

    Raises:
        FormatError: it cannot be read, or is of other sources or splits than the manifest's.
    """
    path = dataset / "ledger.json"
    try:
        ledger = Ledger.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {_first_line(error)}; {_WAY_OUT}") from None
    for found, wanted in ((ledger.sources, manifest.sources), (ledger.splits, manifest.splits)):
        if sorted(found) != sorted(wanted):
            raise FormatError(f"{path}: is of {', '.join(found)}; the manifest of {', '.join(wanted)}; {_WAY_OUT}")
    return ledger


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        mistake = error.errors()[0]
        return f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]
