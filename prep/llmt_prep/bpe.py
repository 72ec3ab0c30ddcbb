"""Byte-pair encoding of one string, plain and slow: enough to find the merges that a new token needs."""

Merges = dict[tuple[str, str], int]
"""Pairs of tokens -> rank; the pair with the lowest rank is merged first."""


def join(piece: str, merges: Merges) -> list[str]:
    """Add the merges that make one token of a string, each ranked last; returns what they make, in order.

    The leftmost two tokens of the encoding so far are joined, and what can follow from that by the merges so far does,
    until one token is left. Merges that come later do not change it: those with lower ranks have all been done before.
    """
    made: list[str] = []
    tokens = encode(list(piece), merges)
    while len(tokens) > 1:
        merges[tokens[0], tokens[1]] = len(merges)
        made.append(tokens[0] + tokens[1])
        tokens = encode(tokens, merges)
    return made


def encode(tokens: list[str], merges: Merges) -> list[str]:
    """Merge pairs, the lowest rank first and the leftmost of equals, until no pair is left that can be."""
    tokens = list(tokens)
    while True:
        ranked = [
            (rank, i) for i in range(len(tokens) - 1) if (rank := merges.get((tokens[i], tokens[i + 1]))) is not None
        ]
        if not ranked:
            return tokens
        _, i = min(ranked)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
