"""A dataset below a URL, opened for training: its small files copied into the cache, its chunks fetched there."""

from llmt_shared.dataset import Dataset, open_mirror
from llmt_shared.errors import ConfigError
from llmt_shared.manifest import FileEntry, Manifest, read_manifest, refuse_wrong_files, wrong_files
from llmt_shared.mirror import Mirror, is_chunk
from llmt_shared.objects import ObjectPath
from llmt_shared.progress import say
from llmt_train.cache.chunks import CachedChunks, is_read_by_training
from llmt_train.cache.distance import drift
from llmt_train.cache.folder import CacheFolder
from llmt_train.config import CacheConfig


def open_cached(location: ObjectPath, config: CacheConfig, shuffle_shards: int) -> Dataset:
    """Open a dataset below a URL.

    Args:
        location: its URL.
        config: of the cache.
        shuffle_shards: shards whose rows are read together, which the cache must hold.

    Raises:
        ConfigError: the cache is too small, or cannot be written.
        FormatError: no finished dataset, or a damaged one.
        StoreError: the store gives no answer.
    """
    manifest, digest = read_manifest(location)
    needed = _block_bytes(manifest, shuffle_shards)
    _require(config, needed, manifest, shuffle_shards)
    refuse_wrong_files(wrong_files(location, manifest))
    folder = CacheFolder(config.path, config.size)
    mirror = Mirror(location, folder.path / digest[:16], manifest, digest)
    chunks = CachedChunks(folder, mirror)  # a reader before anything is there: what it copies stays
    chunks.copy_small_files()
    if config.size < 2 * needed:
        say(
            f"{location}: cache.size {config.size:,} holds less than two times train.shuffle_shards (2 x {needed:,} "
            f"bytes), so the next shards come only as the last ones go: training will wait for them"
        )
    return open_mirror(mirror, chunks)


def _require(config: CacheConfig, needed: int, manifest: Manifest, shuffle_shards: int) -> None:
    if config.size >= needed:
        _require_each(config, manifest)
        return
    fitting = next((fewer for fewer in range(shuffle_shards, 0, -1) if _block_bytes(manifest, fewer) <= config.size), 0)
    fewer = f", or train.shuffle_shards {fitting}" if fitting else ""
    raise ConfigError(
        f"cache.size: {config.size} bytes cannot hold the shards that are shuffled together: train.shuffle_shards "
        f"{shuffle_shards} needs {needed}; set cache.size to at least that, better twice{fewer}"
    )


def _require_each(config: CacheConfig, manifest: Manifest) -> None:
    """Refuse a file that would have no room when its turn comes, as one of the validation rows."""
    largest = max((entry for entry in manifest.files if is_chunk(entry)), key=lambda entry: entry.bytes, default=None)
    if largest is not None and config.size < (needed := _small_bytes(manifest) + largest.bytes):
        raise ConfigError(
            f"cache.size: {config.size} bytes cannot hold {largest.path} ({largest.bytes} bytes) beside the dataset's "
            f"small files; set cache.size to at least {needed}"
        )


def _small_bytes(manifest: Manifest) -> int:
    return sum(entry.bytes for entry in manifest.files if not is_chunk(entry))


def _block_bytes(manifest: Manifest, shuffle_shards: int) -> int:
    """Bytes of all files of a block, at most: its shards lie anywhere, so each may need files of its own."""
    by_array: dict[str, list[FileEntry]] = {}
    for entry in manifest.files:
        if is_chunk(entry) and is_read_by_training(entry.path):
            by_array.setdefault(entry.path.split("/")[1], []).append(entry)
    num_rows = manifest.splits["train"].rows
    around = 1 + 2 * drift(num_rows, max(1, num_rows // max(1, len(by_array.get("tokens", [])))))
    return _small_bytes(manifest) + sum(
        files[0].bytes * min(len(files), shuffle_shards * (1 if array == "tokens" else around))
        for array, files in by_array.items()
    )
