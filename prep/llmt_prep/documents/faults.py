"""A file that the system cannot read: one message that names it, whichever library met the fault."""

from collections.abc import Iterator
from contextlib import contextmanager

from llmt_shared.errors import DataError


@contextmanager
def reading_from(path: str) -> Iterator[None]:
    """Turn an OSError of the block into DataError: a read that fails in the middle does not know of which file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}; "
            f"what is done stays: run the same command again when the file can be read"
        ) from None
