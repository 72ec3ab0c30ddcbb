"""The loader on data below a URL: an S3 server on loopback, caches of several sizes, beside the local copy.

    OMP_NUM_THREADS=1 python tests/benchmarks/remote.py [--gigabytes 1] [--runs 5]

Prints, for each, the median of the tokens per second of one epoch taken as fast as they come, the bytes that were
fetched for each byte of the dataset, and the most that the cache held.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import object_store
from train.cache.held_bytes import watched
from train.tiny_dataset import write_dataset

from llmt_shared.dataset import Dataset, open_dataset
from llmt_shared.objects import ObjectPath
from llmt_train.cache.open import open_cached
from llmt_train.config import BatchConfig, CacheConfig, TrainConfig
from llmt_train.data.stream import Prefetched, plan_run, train_batches

LENGTH = 4096
SHARD_BYTES = 16_000_000
SHUFFLED = 4


def epoch(dataset: Dataset) -> float:
    """Seconds of one epoch."""
    train = TrainConfig(epochs=1, shuffle_shards=SHUFFLED)
    plan = plan_run(dataset.train, BatchConfig(tokens=64 * LENGTH, micro_rows=8), train)
    batches = Prefetched(lambda: train_batches(dataset.train, plan))
    started = time.perf_counter()
    for _ in batches:
        pass
    batches.close()
    return time.perf_counter() - started


def remote(url: ObjectPath, size: int, cache: Path) -> tuple[float, int]:
    """Seconds of one epoch with an empty cache, and the most bytes that it held."""
    shutil.rmtree(cache, ignore_errors=True)
    dataset = open_cached(url, CacheConfig(path=cache, size=size), SHUFFLED)
    with watched(cache, size, pause=0.01) as most:
        seconds = epoch(dataset)
    return seconds, most[0]


def main() -> None:
    """Build, upload, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    rows = int(options.gigabytes * 1e9) // (2 * LENGTH)
    with tempfile.TemporaryDirectory() as temporary, object_store.serving() as server:
        folder = Path(temporary)
        write_dataset(folder / "data", length=LENGTH, num_rows=rows, rows_per_shard=SHARD_BYTES // (2 * LENGTH))
        local = open_dataset(folder / "data")
        total = sum(entry.bytes for entry in local.manifest.files)
        url = object_store.upload(server, folder / "data", "data")
        tokens = rows * LENGTH
        cases = {"1/4": total // 4, "1/2": total // 2, "all": 2 * total}
        times: dict[str, list[float]] = {name: [] for name in ("local", *cases)}
        fetched: dict[str, float] = {}
        held: dict[str, int] = {}
        for _ in range(options.runs):
            times["local"].append(epoch(local))
            for name, size in cases.items():
                server.seen.clear()
                seconds, held[name] = remote(url, size, folder / "cache")
                times[name].append(seconds)
                fetched[name] = _bytes_of(server) / total
                assert held[name] <= size, f"{held[name]} bytes in a cache of {size}"
        print(
            f"{rows} rows of {LENGTH}, {total / 1e9:.2f} GB, shards of {SHARD_BYTES / 1e6:.0f} MB, {SHUFFLED} shuffled"
        )
        for name, seconds in times.items():
            median = statistics.median(seconds)
            more = f"  fetched {fetched[name]:.2f}x  cache at most {held[name] / 1e6:.0f} MB" if name in cases else ""
            print(f"{name:>6}: {tokens / median / 1e6:7.1f} Mtok/s  {total / median / 1e6:7.0f} MB/s{more}")


def _bytes_of(server: object_store.Server) -> int:
    ranges = (where.removeprefix("bytes=").split("-") for method, _, where in server.seen if method == "GET" and where)
    return sum(int(last) + 1 - int(first) for first, last in ranges)


if __name__ == "__main__":
    main()
