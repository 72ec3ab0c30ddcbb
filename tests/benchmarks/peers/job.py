"""The command line that every peer's script has, so that one benchmark can run them all.

usage: python PEER.py write CORPUS.jsonl TOKENIZER_FOLDER OUTPUT
       python PEER.py count OUTPUT

`write` is what is timed. `count` prints what lies in the output afterwards: {"tokens": .., "rows": ..}, and 0 rows
where a peer leaves cutting into rows to its reader. It runs with the packages of its peer alone, not with llmt's.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

LENGTH = 4096
"""Tokens of a row."""
BATCH = 1000
"""Documents that are tokenized in one call; the default of `datasets.map`."""

Write = Callable[[Path, Path, Path], None]
Count = Callable[[Path], dict[str, int]]


def main(write: Write, count: Count) -> None:
    verb, *paths = sys.argv[1:]
    if verb == "write":
        corpus, tokenizer, output = map(Path, paths)
        write(corpus, tokenizer, output)
    else:
        print(json.dumps(count(Path(paths[0]))))


def eos_token(tokenizer: Path) -> str:
    return json.loads((tokenizer / "tokenizer_config.json").read_text())["eos_token"]


def tokenized(corpus: Path, tokenizer: Path) -> Iterator[list[int]]:
    """Tokens of every document with its EOS; for the peers that bring no tokenizing of their own."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    eos = loaded.token_to_id(eos_token(tokenizer))
    with corpus.open("rb") as lines:
        for texts in _batches(json.loads(line)["text"] for line in lines):
            yield from ([*encoding.ids, eos] for encoding in loaded.encode_batch_fast(texts))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
