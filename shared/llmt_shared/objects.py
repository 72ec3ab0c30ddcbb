"""Files in object stores, by URL: what of `pathlib.Path` datasets and their inputs are read and written with.

Every request is tried again with growing pauses, for `PATIENCE` seconds after its first failure; what then still fails
is one `StoreError`. Long objects are read in pieces, a few at a time, so that a failure costs one piece.

The stores are those of the library obstore: it takes credentials, region and endpoint from the environment, such as
AWS_ACCESS_KEY_ID, AWS_REGION and AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME.
"""

import errno
import io
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from llmt_shared.credentials import aws_profile
from llmt_shared.errors import ConfigError, ShortObjectError, StoreError
from llmt_shared.progress import say

T = TypeVar("T")

PATIENCE = 180.0
"""Seconds for which a request that fails is tried again."""
PIECE = 16 << 20
"""Bytes of one request for a long object."""

PART = 16 << 20
"""Bytes of one request of an upload; S3 takes no less than 5 MiB."""

_given_up = threading.Event()
"""Of the requests that begin now."""
_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")
_AT_ONCE = 4
"""Pieces of one object on their way."""
_PAUSES = (0.1, 10.0)
"""Seconds before the first and, doubling, at most before any further try."""
_QUIET = 10.0
"""Seconds of failures before the user is told."""
_BUFFER = 1 << 20
_CREDENTIALS = (
    "set the credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
    "AWS_SKIP_SIGNATURE=true reads public objects without any"
)


class ObjectStat(NamedTuple):
    """What a store says of an object; the names of sizes and times are those of `os.stat`."""

    st_size: int
    st_mtime_ns: int
    etag: str
    """Another content has another one; empty where the store has none."""


class ObjectFile(NamedTuple):
    """One object of a listing."""

    path: "ObjectPath"
    stat: ObjectStat


@dataclass(frozen=True, order=True)
class ObjectPath:
    """The URL of an object, or of all objects below it."""

    url: str
    """Scheme, bucket (or host) and key, as text: nothing in it is percent-encoded."""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def root(self) -> str:
        """Scheme and bucket, or host."""
        match = re.match(r"[a-z0-9]+://[^/]*", self.url)
        assert match is not None, self.url
        return match[0]

    @property
    def key(self) -> str:
        """What follows the root."""
        return self.url[len(self.root) :].strip("/")

    @property
    def can_list(self) -> bool:
        """Whether the store tells which objects it has: a web server does not."""
        return not self.url.startswith(("http://", "https://"))

    def stat(self) -> ObjectStat:
        """Ask for size, time and etag.

        Raises:
            FileNotFoundError: no such object.
        """
        return _stat(_patient(self, lambda library, store: library.head(store, self.key)))

    def exists(self) -> bool:
        """Whether there is an object of this very name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def read_range(self, start: int, stop: int) -> bytes:
        """Return bytes ``start`` to ``stop``, all of which the object must have."""
        if start == stop:
            return b""

        def read(library: Any, store: Any) -> bytes:
            content = bytes(library.get_range(store, self.key, start=start, end=stop))
            if len(content) != stop - start:
                if (size := library.head(store, self.key)["size"]) < stop:
                    raise ShortObjectError(f"{self}: has {size} bytes; wanted those from {start} to {stop}")
                raise _ShortAnswerError(f"{len(content)} bytes came of {stop - start}")
            return content

        return _patient(self, read)

    def read_bytes(self) -> bytes:
        """Return all of it."""
        return b"".join(self.pieces(self.stat().st_size))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return all of it as text."""
        return self.read_bytes().decode(encoding)

    def pieces(self, stop: int, start: int = 0) -> Iterator[bytes]:
        """Yield bytes ``start`` to ``stop`` in order; the next pieces are on their way meanwhile."""
        starts = iter(range(start, stop, PIECE))
        with ThreadPoolExecutor(_AT_ONCE, "llmt-object") as pool:
            waiting: deque[Future[bytes]] = deque()
            try:
                while True:
                    while len(waiting) < _AT_ONCE and (first := next(starts, None)) is not None:
                        waiting.append(pool.submit(self.read_range, first, min(first + PIECE, stop)))
                    if not waiting:
                        return
                    yield waiting.popleft().result()
            except KeyboardInterrupt:
                give_up()
                raise
            finally:
                for future in waiting:
                    future.cancel()

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open to read; what is read is fetched, with at least 1 MiB at once."""
        assert mode == "rb", mode
        return io.BufferedReader(_Reader(self), _BUFFER)

    def files(self) -> Iterator[ObjectFile]:
        """Yield all objects below this one, in the order of their keys."""
        found = _patient(self, lambda library, store: [each for page in library.list(store, self.key) for each in page])
        prefix = f"{self.key}/" if self.key else ""
        for each in sorted(found, key=lambda each: each["path"]):
            if each["path"].startswith(prefix):
                yield ObjectFile(ObjectPath(f"{self.root}/{each['path']}"), _stat(each))

    def write_bytes(self, content: bytes, *, is_new: bool = False) -> None:
        """Write an object, whole.

        Args:
            content: all of it.
            is_new: only where none has this name yet.

        Raises:
            FileExistsError: ``is_new``, and there is one.
        """
        mode = "create" if is_new else "overwrite"
        _patient(self, lambda library, store: library.put(store, self.key, content, mode=mode, use_multipart=False))

    def upload(self, path: Path) -> str:
        """Write an object from a file, in parts where it is longer than one; returns its etag."""
        options = {"use_multipart": path.stat().st_size > PART, "chunk_size": PART, "max_concurrency": _AT_ONCE}
        result = _patient(self, lambda library, store: library.put(store, self.key, path, **options))
        return (result["e_tag"] or "").strip('"')

    def unlink(self) -> None:
        """Remove an object; without one, nothing happens."""
        try:
            _patient(self, lambda library, store: library.delete(store, self.key))
        except FileNotFoundError:
            return


Location = Path | ObjectPath
"""Where a dataset or an input lies."""


def location_of(text: str | Path) -> Location:
    """Return a path, or the path of an object where the text is a URL; ``file://`` is a path.

    Raises:
        ValueError: a URL of no store that we know, without a bucket or host, or with a password, which would be told.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", str(text), re.DOTALL) if isinstance(text, str) else None
    if match is None:
        return Path(os.path.expanduser(text))
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        return Path(rest if rest.startswith("/") else f"/{rest.partition('/')[2]}")
    if scheme not in _SCHEMES:
        raise ValueError(f"found {text!r}; wanted a path, or a URL that begins with one of {_known()}")
    if re.match(r"[^/]*:[^/]*@", rest):
        raise ValueError(f"wanted no password in a URL; {_CREDENTIALS}")
    if not rest.partition("/")[0]:
        raise ValueError(f"found {text!r}; wanted {scheme}://BUCKET/KEY")
    return ObjectPath(f"{scheme}://{rest.rstrip('/')}")


def named_location(text: str) -> Location:
    """Return `location_of` what a user wrote.

    Raises:
        ConfigError: it is no location.
    """
    try:
        return location_of(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def give_up() -> None:
    """Have the requests of this process that are under way not tried again: a process ends when their threads do."""
    global _given_up
    before, _given_up = _given_up, threading.Event()
    before.set()


def store_below(path: ObjectPath) -> Any:
    """Return obstore's own store of all objects below a path, for libraries that read through one."""
    _library()
    return _store(path.url)


def is_url(text: str) -> bool:
    """Whether a text is the URL of an object, as far as its beginning tells."""
    return re.match(rf"({'|'.join(_SCHEMES)})://", text) is not None


def is_encrypted(url: str) -> bool:
    """Whether requests go over TLS, which notices every bit that changes on the way."""
    endpoints = (os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    return not url.startswith("http://") and not any(each.startswith("http://") for each in endpoints)


def _known() -> str:
    return ", ".join(f"{scheme}://" for scheme in (*_SCHEMES, "file"))


class _ShortAnswerError(Exception):
    """The store sent less than was asked for."""


class _Reader(io.RawIOBase):
    """An object as a file that can be read from any place."""

    def __init__(self, path: ObjectPath) -> None:
        self.name = str(path)
        self._path = path
        self._size = path.stat().st_size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._size, self._place + len(buffer))
        if stop <= self._place:
            return 0
        content = self._path.read_range(self._place, stop)
        buffer[: len(content)] = content
        self._place = stop
        return len(content)


def _patient(path: ObjectPath, ask: Callable[[Any, Any], T]) -> T:
    """Return ``ask(library, store)``; what may pass is tried again, and what remains is told."""
    library, store, given_up = _library(), _opened(path), _given_up
    pause, most = _PAUSES
    failed_at: float | None = None
    is_told = False
    while True:
        try:
            return ask(library, store)
        except Exception as error:
            _raise_final(path, error)
            now = time.monotonic()
            failed_at = now if failed_at is None else failed_at
            if now - failed_at + pause > PATIENCE:
                raise StoreError(
                    f"{path}: no right answer for {now - failed_at:.0f} s; the last failure: {_reason(error)}. "
                    f"Nothing is lost: run the same command again when the store can be reached"
                ) from None
            if now - failed_at > _QUIET and not is_told:
                is_told = True
                say(f"{path}: {_reason(error)}; trying again, for up to {PATIENCE:.0f} s")
            if given_up.wait(pause):
                raise StoreError(f"{path}: given up, for nobody waits for it any more: {_reason(error)}") from None
        pause = min(2 * pause, most)


def _raise_final(path: ObjectPath, error: Exception) -> None:
    """Raise what another try will not mend, in the words of a file system where it has them."""
    from obstore import exceptions

    has_no_bucket = "NoSuchBucket" in str(error)
    if has_no_bucket or isinstance(error, FileNotFoundError):  # as is obstore's own, which does not know the URL
        missing = "no such bucket" if has_no_bucket else "no such object"
        raise FileNotFoundError(errno.ENOENT, missing, str(path)) from None
    if isinstance(error, exceptions.AlreadyExistsError):
        raise FileExistsError(errno.EEXIST, "is there already", str(path)) from None
    if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)) or _is_refusal(error):
        raise ConfigError(f"{path}: the store refuses access: {_reason(error)}; {_CREDENTIALS}") from None
    if isinstance(error, ValueError):
        raise ConfigError(f"{path}: not the URL of an object: {_reason(error)}") from None
    if isinstance(error, exceptions.NotSupportedError) or "405 Method Not Allowed" in str(error):
        raise ConfigError(f"{path}: this store cannot do that: {_reason(error)}") from None
    if re.search(r"status code: 4(?!08|29)\d\d", str(error)):
        raise StoreError(f"{path}: the store refuses the request: {_reason(error)}") from None
    if not isinstance(error, (exceptions.BaseError, _ShortAnswerError, TimeoutError)):
        raise error


def _is_refusal(error: Exception) -> bool:
    """Whether credentials are wrong or missing, which obstore has no class for."""
    text = str(error)
    return "169.254.169.254" in text or any(code in text for code in (" 401 ", " 403 ", "InvalidAccessKeyId"))


def _reason(error: Exception) -> str:
    """The part of obstore's many lines that says what happened."""
    text = str(error).partition("\n\nDebug source")[0].strip()
    code = re.search(r"<Code>(.*?)</Code>", text)
    first = re.sub(r": <.*", "", (text.splitlines() or [type(error).__name__])[0])  # the body of the answer
    return f"{first} ({code[1]})" if code and code[1] not in first else first


def _stat(meta: Any) -> ObjectStat:
    modified = meta["last_modified"]
    return ObjectStat(meta["size"], int(modified.timestamp() * 1_000_000) * 1000, (meta["e_tag"] or "").strip('"'))


def _library() -> Any:
    try:
        import obstore
    except ImportError:
        raise ConfigError(
            "URLs are read through the package obstore, which is not installed; pip install 'llmt[cloud]'"
        ) from None
    return obstore


def _opened(path: ObjectPath) -> Any:
    from obstore.exceptions import BaseError

    try:
        return _store(path.root)
    except (BaseError, ValueError) as error:
        raise ConfigError(f"{path}: the store cannot be opened: {_reason(error)}; {_CREDENTIALS}") from None


@lru_cache(maxsize=32)
def _store(url: str) -> Any:
    from obstore.store import from_url

    options: Any = {"timeout": "60s", "connect_timeout": "10s"} | ({} if is_encrypted(url) else {"allow_http": True})
    retries: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
    provider = aws_profile() if url.startswith("s3") else None
    return from_url(url, client_options=options, retry_config=retries, credential_provider=provider)
