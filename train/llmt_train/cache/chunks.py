"""Chunks of a dataset below a URL as training reads them: from the cache, where threads put them before their turn."""

import math
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_shared import objects
from llmt_shared.chunks import ArrayChunks, Layout
from llmt_shared.errors import ConfigError, FormatError, LlmtError, StoreError
from llmt_shared.manifest import FileEntry
from llmt_shared.mirror import Mirror, fetch, is_chunk
from llmt_shared.objects import ObjectPath
from llmt_shared.order import RowOrder, block_at
from llmt_train.cache.distance import Following, distances, shard_distances
from llmt_train.cache.folder import CacheFolder, Outcome
from llmt_train.cache.waits import Waits

_THREADS = 2
_AT_ONCE = 8
"""Small files."""
_AHEAD = 3
"""Blocks, this one counted, that are fetched as far as there is room."""
_PAUSE = 0.5
"""Seconds between two looks for room."""
_NOW = -1.0
"""Distance of a file that somebody waits for."""


def is_read_by_training(name: str) -> bool:
    """Whether a file is one of the training rows', and not only of where they come from."""
    split, array, *_ = name.split("/")
    return split == "train" and array not in ("segment_offset", "segment_document")


class CachedChunks:
    """Chunk files that are fetched when they are needed, or before; they stay as long as there is room."""

    def __init__(self, folder: CacheFolder, mirror: Mirror) -> None:
        """Join the readers of a cache.

        Args:
            folder: the cache.
            mirror: of the dataset, in a folder of the cache; its files need not be there yet.
        """
        assert isinstance(mirror.location, ObjectPath), "what lies on a disk is read there"
        self._folder, self._root, self._location = folder, mirror.folder, mirror.location
        self._entries: dict[str, FileEntry] = {each.path: each for each in mirror.manifest.files}
        chunks = [name for name, entry in self._entries.items() if is_chunk(entry) and is_read_by_training(name)]
        self._training = [name for name in chunks if f"{name.partition('/c/')[0]}/zarr.json" in self._entries]
        self._reader = folder.join(mirror.folder.name)
        self._waits = Waits(mirror.location)
        self._run: Following | None = None
        self._block: tuple[int, int] | None = None
        """Epoch and first place of the block that the run is in."""
        self._due = np.empty(0)
        """[shards] place from which each is needed, seen from the beginning of that block."""
        self._coming: list[tuple[float, str]] = []
        """Distance and name of what the run needs next, at the last look."""
        self._hints: deque[str] = deque(maxlen=64)
        self._failed: dict[str, LlmtError | OSError] = {}
        """Files that a thread could not fetch, and why; they are not tried again before their turn."""
        self._wake = threading.Condition()
        self._followers: list[None] = []
        """One for each that takes rows now; the threads end with the last."""
        weakref.finalize(self, self._reader.close)

    def of(self, array: Path, layout: Layout, *, is_read_in_order: bool) -> ArrayChunks:
        """Return the chunks of one array; they are fetched when they are not there."""
        return _Cached(self, array, layout)

    def copy_small_files(self) -> None:
        """Fetch all files that are no chunks; they stay as long as this lives."""
        names = [name for name, entry in self._entries.items() if not is_chunk(entry)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda name: os.close(self._get(self._root / name)), names))

    def hold(self, path: Path) -> int:
        """Return a descriptor of a file, fetched if it is not there; it stays in the cache until that is closed."""
        if (descriptor := self._folder.hold(path)) is not None:
            return descriptor
        with self._waits.waiting():
            return self._get(path)

    def _get(self, path: Path) -> int:
        name, deadline = self._name(path), time.monotonic() + objects.PATIENCE
        if isinstance(error := self._failed.pop(name, None), FormatError):  # else it may not fail now
            raise error
        while (descriptor := self._folder.hold(path)) is None:
            outcome = self._fetch(name, _NOW)
            if outcome is Outcome.BUSY:
                self._folder.wait_for(path)
                if (error := self._failed.pop(name, None)) is not None:
                    raise error
            elif outcome is Outcome.FULL:
                self._refuse_for_ever(name, deadline)
                time.sleep(0.05)
        return descriptor

    def hint(self, path: Path) -> None:
        """Have a file fetched in the background, if it is not there and the order does not say when its turn comes."""
        name = self._name(path)
        if (self._run is None or not is_read_by_training(name)) and not path.exists():
            self._hints.append(name)

    @contextmanager
    def follow(self, split: Path, order: RowOrder | None) -> Iterator[Callable[[int], None]]:
        """Fetch what comes next in training rows while the block runs, and what `will_need` names."""
        self._followers.append(None)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_THREADS)]
        for thread in threads if len(self._followers) == 1 else ():
            thread.start()
        try:
            yield partial(self._reached, order) if order is not None and split.name == "train" else lambda place: None
        finally:
            self._followers.pop()
            if order is not None:
                self._run, self._block, self._coming = None, None, []
                self._reader.tell(None)
            with self._wake:
                self._wake.notify_all()

    def _reached(self, order: RowOrder, place: int) -> None:
        assert order.blocks is not None, "what lies in shards is shuffled in blocks of them"
        run = Following(order.seed, order.num_rows, order.total_rows, *order.blocks, int(place))
        if self._run is None or run.place > self._run.place:
            self._stand(run)

    def _stand(self, run: Following) -> None:
        """See the run at a place, and what it needs from there, where it is in another block than before."""
        self._run = run
        epoch, inside = divmod(run.place, run.num_rows)
        block = epoch, block_at(run.seed, epoch, inside, run.num_rows, run.blocks).first
        is_new = block != self._block
        if is_new:
            self._block = block
            self._coming = []  # before others may remove what is over: no thread shall fetch it again
        self._reader.tell(run)
        if not is_new:
            return
        self._due = run.place + shard_distances(run)
        coming = self._ranked(run)
        with self._wake:
            self._coming = coming
            self._wake.notify_all()

    def enter(self, shard: int) -> None:
        """Rows of a shard of the training rows are read now: with the first of a block, the one before it is over."""
        run = self._run
        if run is not None and run.place < self._due[shard] < run.total_rows:
            self._stand(run._replace(place=int(self._due[shard])))

    def _refuse_for_ever(self, name: str, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"cache.size: {self._folder.limit} bytes are too few for all that reads from {self._folder.path} now: "
                f"nothing can go, and {name} ({self._entries[name].bytes} bytes) has no room; set a larger cache.size, "
                f"or another cache.path for this run"
            )

    def _fetch(self, name: str, distance: float, is_wanted: Callable[[], bool] = lambda: True) -> Outcome:
        entry = self._entries[name]

        def write(file: BinaryIO) -> None:
            if not is_wanted():  # since it was decided; what begins after `give_up` would be tried again for long
                raise StoreError(f"{self._location / name}: given up, for nobody waits for it any more")
            with self._waits.fetching(entry.bytes):
                fetch(self._location, entry, file)

        return self._folder.fetch(self._root / name, entry.bytes, write, distance, is_wanted)

    def _ranked(self, run: Following) -> list[tuple[float, str]]:
        horizon = _AHEAD * run.rows_per_shard * run.shuffle_shards
        names = self._training
        far = distances(names, self._root, run)
        # of what is needed at the same time first the small: a row needs all of its arrays
        ranked = sorted((far[name], name.startswith("train/tokens/"), name) for name in names if far[name] < horizon)
        return [(distance, name) for distance, _, name in ranked]

    def _work(self) -> None:
        """Fetch what comes, one file after another; wait where there is no room or nothing to do."""
        while self._followers:
            if not self._fetch_next():
                with self._wake:
                    self._wake.wait(_PAUSE)

    def _fetch_next(self) -> bool:
        """Whether to look again at once; what comes after a file without room has none either."""
        for distance, name, is_wanted in self._wanted():
            outcome = self._try(name, distance, is_wanted)
            if outcome in (Outcome.THERE, Outcome.UNWANTED, Outcome.FULL):
                return outcome is not Outcome.FULL
        return False

    def _wanted(self) -> Iterator[tuple[float, str, Callable[[], bool]]]:
        """Distance and name of what is not there, in the order of use, and whether it is still wanted."""
        while self._hints:
            yield 0.0, self._hints.popleft(), lambda: bool(self._followers)
        coming = self._coming
        for distance, name in coming:
            if not (self._root / name).exists():
                yield distance, name, lambda: bool(self._followers) and coming is self._coming

    def _try(self, name: str, distance: float, is_wanted: Callable[[], bool]) -> Outcome | None:
        """What became of it; ``None`` where it failed, now or before."""
        if name in self._failed:
            return None
        try:
            return self._fetch(name, distance, is_wanted)
        except (LlmtError, OSError) as error:
            if is_wanted():
                self._failed[name] = error  # told when the file's turn comes
        return None

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


class _Cached(NamedTuple):
    """Of one array."""

    chunks: CachedChunks
    array: Path
    layout: Layout

    @property
    def is_mapped(self) -> bool:
        """Yes, once it is there."""
        return True

    def read(self, chunk: int, start: int, stop: int) -> NDArray[Any]:
        """Return a part of the mapped file; it cannot leave the cache before the values are gone."""
        if self.array.name == "tokens" and self.array.parent.name == "train":
            self.chunks.enter(chunk)
        descriptor = self.chunks.hold(self.layout.file(self.array, chunk))
        try:
            memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)  # has its own copy of the descriptor: the lock
        finally:
            os.close(descriptor)
        size, shape = self.layout.item_bytes, (stop - start, *self.layout.shape[1:])
        return np.frombuffer(memory, self.layout.dtype, math.prod(shape), start * size).reshape(shape)

    def will_need(self, chunk: int, places: Sequence[int]) -> None:
        """Have the file fetched in the background."""
        self.chunks.hint(self.layout.file(self.array, chunk))
