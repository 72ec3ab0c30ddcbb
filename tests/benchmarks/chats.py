"""Chats: llmt-prep from JSON lines to packed rows, against `datasets.map` with transformers' own template and mask.

usage: python tests/benchmarks/chats.py CORPUS_FOLDER WORK_FOLDER [--megabytes 20] [--peer-megabytes 5]

CORPUS_FOLDER is what corpus.py wrote. Conversations are made of its documents: turns of the lengths that hh-rlhf has
(a median of about 100 characters, log-normal), two to ten of them. Both sides use the same tokenizer, with two control
tokens added, and the same template with generation marks. One core; a ratio sets our whole process, start-up and all,
against the other side's MB/s less its start-up.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import jobs
from measure import Command, Job, Result, head, machine, run_all, table
from peers.environments import python_of
from tokenizers import AddedToken, Tokenizer

MARKERS = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--peer-megabytes", type=float, default=5)
    parser.add_argument("--runs", type=int, default=0, help="of each; 0: 5, or 3 where one takes more than 60 s")
    said = parser.parse_args()
    tokenizer = _tokenizer(said.corpus / "tokenizer", said.work / "inputs" / "chat-tokenizer")
    chats = _chats(said.corpus / "corpus.jsonl", said.work / "inputs" / "chats", int(said.megabytes * 1.1e6))
    ours = head(chats, int(said.megabytes * 1e6), said.work / "inputs" / "chats")
    theirs = head(chats, int(said.peer_megabytes * 1e6), said.work / "inputs" / "chats")
    python = python_of("trl", said.work / "environments")
    todo = {f"llmt {each}": Job(_pack(tokenizer, each), ours, after=_packed) for each in ("fastokens", "tokenizers")}
    peer = Job(jobs.peer("chat", python, tokenizer), theirs, after=jobs.written_by_peer("chat", python))
    results = run_all(todo | {"datasets + transformers": peer}, said.work, said.runs)
    print(f"{machine()}; one core\n")
    print(table(HEADER, [_row(name, result, results) for name, result in results.items()]))


HEADER = [
    "",
    "MB",
    "s (min-max)",
    "start-up, s",
    "MB/s",
    "MB/s less start-up",
    "llmt fastokens / this",
    "tokens",
    "targets",
]


def _row(name: str, mine: Result, results: dict[str, Result]) -> list[str]:
    low, high = mine.spread
    return [
        name, f"{mine.num_bytes / 1e6:.0f}", f"{mine.seconds:.2f} ({low:.2f}-{high:.2f})", f"{mine.startup:.2f}",
        f"{mine.rate:.2f}", f"{mine.net_rate:.2f}", f"{results['llmt fastokens'].rate / mine.net_rate:.2f}",
        f"{mine.written['tokens']:,}", f"{mine.written['targets']:,}",
    ]  # fmt: skip


def _pack(tokenizer: Path, engine: str) -> jobs.Make:
    def command(corpus: Path, home: Path) -> Command:
        mix = {
            "kind": "sft", "output": str(home / "dataset"), "cache": str(home / "cache"), "tokenizer": str(tokenizer),
            "engine": engine, "sequence": {"length": 4096}, "sources": {"all": {"path": str(corpus)}},
        }  # fmt: skip
        (home / "mix.yaml").write_text(json.dumps(mix))
        return [*jobs.LLMT_PREP, "pack", "--mix", home / "mix.yaml", "--workers", "1"]

    return command


def _packed(home: Path) -> dict[str, int]:
    split = json.loads((home / "dataset" / "MANIFEST.json").read_text())["splits"]["train"]
    return {key: split[key] for key in ("tokens", "rows", "targets")}


def _tokenizer(folder: Path, out: Path) -> Path:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in MARKERS])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": MARKERS[1], "chat_template": TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out.absolute()


def _chats(corpus: Path, folder: Path, num_bytes: int) -> Path:
    path = folder / "chats.jsonl"
    if not path.exists() or path.stat().st_size < num_bytes:
        folder.mkdir(parents=True, exist_ok=True)
        with corpus.open("rb") as lines, path.open("w", encoding="utf-8") as out:
            for chat in _cut(json.loads(line)["text"] for line in lines):
                out.write(json.dumps({"messages": chat}, ensure_ascii=False) + "\n")
                if out.tell() > num_bytes:
                    break
    return path


def _cut(texts: Iterator[str]) -> Iterator[list[dict[str, str]]]:
    """Cut documents into conversations; what is left of one is not used."""
    choose = random.Random(0)
    for text in texts:
        place = 0
        while True:
            sizes = [max(1, int(choose.lognormvariate(4.6, 1.0))) for _ in range(2 * choose.randrange(1, 6))]
            if place + sum(sizes) > len(text):
                break
            chat = []
            for number, size in enumerate(sizes):
                chat.append({"role": ("user", "assistant")[number % 2], "content": text[place : place + size]})
                place += size
            yield chat


if __name__ == "__main__":
    main()
