"""More text than the machine has: a corpus grown by documents recombined from its own shuffled lines.

usage: python tests/benchmarks/grow.py CORPUS.jsonl OUT.jsonl MEGABYTES

First comes the corpus itself. Then, pass after pass with another seed, the lines of every 1000 documents are shuffled
and dealt out again, as many to each document as it had. So documents hardly repeat, and their lengths and the
frequencies of their tokens stay alike.
"""

import json
import random
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

POOL = 1000


def main() -> None:
    corpus, out, megabytes = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    grow(corpus, out, int(megabytes * 1e6))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def grow(corpus: Path, out: Path, num_bytes: int) -> None:
    """Write the first documents of the corpus, then of its recombined passes, until ``num_bytes`` are reached."""
    with out.open("w", encoding="utf-8") as file:
        for number, text in enumerate(_texts_without_end(corpus)):
            file.write(json.dumps({"id": f"{number:08d}", "text": text}, ensure_ascii=False) + "\n")
            if file.buffer.tell() >= num_bytes:
                return


def _texts_without_end(corpus: Path) -> Iterator[str]:
    yield from _texts(corpus)
    for seed in count():
        yield from _recombined(_texts(corpus), random.Random(seed))


def _texts(corpus: Path) -> Iterator[str]:
    with corpus.open("rb") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _recombined(texts: Iterator[str], generator: random.Random) -> Iterator[str]:
    while pool := [text.splitlines(keepends=True) for text in islice(texts, POOL)]:
        lines = [line for document in pool for line in document]
        generator.shuffle(lines)
        dealt = iter(lines)
        for document in pool:
            yield "".join(islice(dealt, len(document)))


if __name__ == "__main__":
    main()
