"""Peak memory and time of the loss on top of hidden states, by several ways, each in a process of its own.

    python tests/benchmarks/head_memory.py [--vocab 49152] [--tokens 8192] [--hidden 576] [--labelled 1.0]

Memory is the process's peak minus what it had before the loss was begun, so it includes the gradients of hidden states
and weights (which every way needs). Gradients are compared with those of plain cross-entropy.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from llmt_train.model.head import HeadSpec, token_scores


def plain(hidden, linear, labels):
    return F.cross_entropy(linear(hidden), labels, ignore_index=-100, reduction="sum")


def recomputed(hidden, linear, labels):
    places = (labels != -100).nonzero()[:, 0]
    return -token_scores(hidden, HeadSpec(linear), labels, places).logps.sum()


def uniform(hidden, linear, labels):
    places = (labels != -100).nonzero()[:, 0]
    return -token_scores(hidden, HeadSpec(linear), labels, places, is_uniform=True).logps.sum()


def fused(hidden, linear, labels):
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, linear.weight, labels, reduction="sum", ignore_index=-100, options=options)


WAYS = {
    "plain cross-entropy": plain,
    "llmt, any gradient": recomputed,
    "llmt, uniform": uniform,
    "F.linear_cross_entropy": fused,
}


def measure(way: str, vocab: int, tokens: int, size: int, labelled: float, saved: Path) -> dict:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(size, vocab, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(vocab, size, generator=generator) / size**0.5)
    hidden = torch.randn(tokens, size, generator=generator).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) >= labelled] = -100
    WAYS[way](hidden[:64], linear, labels[:64]).backward()  # kernels and pools are made
    hidden.grad = linear.weight.grad = None
    before, start = _peak(), time.perf_counter()
    loss = WAYS[way](hidden, linear, labels)
    loss.backward()
    seconds, peak = time.perf_counter() - start, _peak() - before
    if way == "plain cross-entropy":
        torch.save([hidden.grad, linear.weight.grad], saved)
        errors = [0.0, 0.0]
    else:
        wanted = torch.load(saved, weights_only=True)
        errors = [((x.grad - y).norm() / y.norm()).item() for x, y in zip((hidden, linear.weight), wanted, strict=True)]
    return {"way": way, "MB": peak / 1e6, "seconds": seconds, "loss": loss.item(), "gradient error": max(errors)}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--labelled", type=float, default=1.0, help="share of tokens that have a label")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--saved", type=Path, default=Path("head_memory.pt"))
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.vocab, given.tokens, given.hidden, given.labelled, given.saved)))
        return
    results = []
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--way", way]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    given.saved.unlink()
    base = results[0]
    print(f"V = {given.vocab:,}, {given.tokens:,} tokens, {given.labelled:.0%} with a label, H = {given.hidden}, fp32")
    for result in results:
        print(
            f"{result['way']:24} {result['MB']:8.0f} MB ({result['MB'] / base['MB']:.2f})  {result['seconds']:6.2f} s "
            f"({result['seconds'] / base['seconds']:.2f})  gradients off by {result['gradient error']:.1e}"
        )


if __name__ == "__main__":
    main()
