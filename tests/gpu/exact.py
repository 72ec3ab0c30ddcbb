"""Results in fp64 to measure others by, and what counts as right.

Nobody can be closer to the truth than the format allows, so an error is compared with that of plain maths in the same
format: torch's own operators, in the order of the definition.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from gpu.record import require
from torch import Tensor

FACTOR = 3.0
"""Error that is allowed, as a multiple of plain maths' own: the same quantities are rounded, in another order. A wrong
mask, scale or border is an error of some percent at least: tens of times more in bf16, thousands in fp32."""


class Error(NamedTuple):
    """Of one tensor, as shares of the truth."""

    norm: float
    """2-norm of the difference by that of the truth."""
    worst: float
    """2-norm of the difference of the worst row, by the root mean square of those of the truth's rows: one wrong token
    cannot hide among many right ones."""


def error_of(found: Tensor, truth: Tensor) -> Error:
    """Compare two tensors whose last dims make up a row; a truth of zeros wants zeros."""
    rows = truth.shape[0] if truth.ndim > 1 else 1
    difference, truth = found.double().reshape(rows, -1) - truth.reshape(rows, -1), truth.reshape(rows, -1)
    by_row, size = difference.norm(dim=1), truth.norm()
    if not size:
        return Error(by_row.norm().item(), by_row.max().item())
    return Error((by_row.norm() / size).item(), (by_row.max() / (size / rows**0.5)).item())


def compare(found: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], values: dict[str, Any]) -> None:
    """Require that no tensor is further from the truth than `FACTOR` times what plain maths is.

    Args:
        found: what is judged: outputs and gradients.
        plain: the same by plain maths in the same format.
        truth: the same in fp64.
        values: gets the measure, too.

    Raises:
        WrongError: one is, or is not finite.
    """
    multiples = measure(found, plain, truth, values)
    # `not <=` also refuses NaN.
    require(
        all(bool(x.isfinite().all()) for x in found) and not any(not x <= FACTOR for x in multiples),
        f"errors as multiples of plain maths' own: {[round(x, 2) for x in multiples]}; allowed {FACTOR}",
    )


def measure(
    found: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], values: dict[str, Any]
) -> list[float]:
    """Return each tensor's error as a multiple of plain maths' own.

    Args:
        found: see `compare`.
        plain: see `compare`.
        truth: see `compare`.
        values: gets the largest error, and the largest of the multiples.
    """
    errors = [error_of(x, exact) for x, exact in zip(found, truth, strict=True)]
    usual = [error_of(x, exact) for x, exact in zip(plain, truth, strict=True)]
    # Where plain maths happens to round nothing (a segment of one token), a last bit is allowed.
    floors = [Error(torch.finfo(x.dtype).eps / 4, torch.finfo(x.dtype).eps) for x in found]
    multiples = [
        max(own / max(other, floor) for own, other, floor in zip(*of_one, strict=True))
        for of_one in zip(errors, usual, floors, strict=True)
    ]
    values["error"] = max(error.norm for error in errors)
    values["of plain"] = max(multiples)
    return multiples
