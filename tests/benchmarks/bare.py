"""The bare engine on one core: a loop that parses JSONL with orjson and encodes it. Nothing is written.

usage: python bare.py ENGINE CORPUS.jsonl TOKENIZER_FOLDER

It prints {"documents": .., "tokens": ..}. ENGINE is tokenizers or fastokens; text never becomes a control token.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson

BATCH_BYTES = 1_000_000


def main() -> None:
    engine, corpus, tokenizer = sys.argv[1:]
    count_tokens = {"tokenizers": _tokenizers, "fastokens": _fastokens}[engine](Path(tokenizer) / "tokenizer.json")
    documents = tokens = 0
    for texts in batches(Path(corpus)):
        documents += len(texts)
        tokens += count_tokens(texts)
    print(json.dumps({"documents": documents, "tokens": tokens}))


def batches(corpus: Path) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    with corpus.open("rb") as lines:
        for line in lines:
            batch.append(orjson.loads(line)["text"])
            size += len(line)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _tokenizers(path: Path) -> Callable[[list[str]], int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return lambda texts: sum(len(each.ids) for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False))


def _fastokens(path: Path) -> Callable[[list[str]], int]:
    from fastokens._native import Tokenizer

    said = json.loads(path.read_text())
    said["added_tokens"] = [token for token in said["added_tokens"] if not token["special"]]
    said["post_processor"] = None
    tokenizer = Tokenizer.from_json_str(json.dumps(said))
    return lambda texts: len(tokenizer.encode_batch_flat(texts)[0]) // 4  # ids as bytes of uint32


if __name__ == "__main__":
    main()
