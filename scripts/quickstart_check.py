"""Checks what the quickstart promises: the mixture has the wanted shares, and training learned something.

usage: python scripts/quickstart_check.py DATASET RUN
"""

import json
import sys
from pathlib import Path
from statistics import mean

NUM_LAST = 10
"""Steps whose mean loss counts as the last loss: a single small step is noisy."""


def main() -> None:
    dataset, run = map(Path, sys.argv[1:])
    problems = [*check_shares(dataset), *check_losses(run)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


def check_shares(dataset: Path) -> list[str]:
    """Shares of the training tokens, within 1 percentage point of the weights."""
    weights = {name: said["weight"] for name, said in json.loads((dataset / "mix.json").read_text())["sources"].items()}
    books = json.loads((dataset / "ledger.json").read_text())["sources"]
    total = sum(each["train"]["in_rows"] for each in books.values())
    problems = []
    for name, weight in weights.items():
        got, wanted = books[name]["train"]["in_rows"] / total, weight / sum(weights.values())
        print(f"{name}: {got:.2%} of the training tokens, wanted {wanted:.2%}")
        if abs(got - wanted) > 0.01:
            problems.append(f"{name}: {got:.2%} of the tokens is more than 1 point off {wanted:.2%}")
    return problems


def check_losses(run: Path) -> list[str]:
    """Training loss down by more than 40 %, held-out loss down too."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["eval"]["loss"] for line in lines if "eval" in line]
    last = mean(train[-NUM_LAST:])
    down = 1 - last / train[0]
    print(f"training loss: {train[0]:.3f} at step 1, {last:.3f} over the last {NUM_LAST} steps: down {down:.1%}")
    print(f"held-out loss: {held_out[0]:.3f} before, {held_out[-1]:.3f} after")
    problems = []
    if down <= 0.4:
        problems.append("the training loss fell by less than 40 %")
    if held_out[-1] >= held_out[0]:
        problems.append("the held-out loss did not fall")
    return problems


if __name__ == "__main__":
    main()
