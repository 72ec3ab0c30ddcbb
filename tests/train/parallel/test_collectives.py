"""What ranks exchange, against the same written down for whole tensors in one process.

Every rank's loss weighs its result with weights of its own, or with the same ones where the result is used alike.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from train.parallel.ranks import on_ranks

from llmt_train.parallel import collectives
from llmt_train.parallel.layout import Layout
from llmt_train.parallel.mesh import ALONE, build_mesh

_SHAPE = (4, 6, 8)
CASES: list[tuple[str, tuple[int, ...]]] = [
    *[(name, ()) for name in ("copy_in", "sum_out", "total")],
    *[(name, (dim,)) for name in ("gather", "scatter_sum", "split", "gather_same") for dim in (0, 1, 2, -2)],
    *[("swap", dims) for dims in ((0, 1), (1, 0), (2, 1), (0, -1), (1, 1))],
]
_HELD_ALIKE = ("copy_in", "split")
"""Every rank is given the same."""
_USED_ALIKE = ("sum_out", "gather_same")
"""All ranks make the same loss of the result; in the reference it counts once."""


class Answer(NamedTuple):
    """Of one rank."""

    value: Tensor
    gradient: Tensor


def _input(name: str, rank: int) -> Tensor:
    seed = 0 if name in _HELD_ALIKE else rank
    return torch.randn(_SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _weigh(name: str, rank: int, value: Tensor) -> Tensor:
    seed = 100 if name in _USED_ALIKE else 100 + rank
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _answers() -> list[Answer]:
    axis = build_mesh(Layout(1, 1, 1, 2), "cpu").tp
    return [_answer(getattr(collectives, name), name, axis.rank, axis, dims) for name, dims in CASES]


def _answer(function: Callable[..., Tensor], name: str, rank: int, axis: Any, dims: tuple[int, ...]) -> Answer:
    x = _input(name, rank).mT.contiguous().mT.requires_grad_()  # what comes in need not be contiguous
    before = x.detach().clone()
    value = function(x, axis, *dims)
    weights = _weigh(name, rank, value).mT.contiguous().mT
    (gradient,) = torch.autograd.grad(value, x, weights)
    assert torch.equal(x, before)
    assert torch.equal(weights, _weigh(name, rank, value))
    return Answer(value.detach(), gradient)


@cache
def _found() -> list[list[Answer]]:
    """[rank][case]; one launch serves all."""
    return on_ranks(2, _answers)


def _whole(name: str, dims: tuple[int, ...]) -> list[Answer]:
    """The same of both ranks at once."""
    inputs = [_input(name, rank).requires_grad_() for rank in range(2)]
    if name in _HELD_ALIKE:
        inputs = [inputs[0], inputs[0]]
    values = REFERENCE[name](inputs, *dims)
    losses = [(_weigh(name, rank, value) * value).sum() for rank, value in enumerate(values)]
    loss = losses[0] if name in _USED_ALIKE else losses[0] + losses[1]
    return [Answer(v.detach(), g) for v, g in zip(values, torch.autograd.grad(loss, inputs), strict=True)]


def _swapped(inputs: list[Tensor], split_dim: int, concat_dim: int) -> list[Tensor]:
    return [torch.cat([x.chunk(2, split_dim)[rank] for x in inputs], concat_dim) for rank in range(2)]


REFERENCE: dict[str, Callable[..., list[Tensor]]] = {
    "copy_in": list,
    "sum_out": lambda inputs: [inputs[0] + inputs[1]] * 2,
    "total": lambda inputs: [inputs[0] + inputs[1]] * 2,
    "gather": lambda inputs, dim: [torch.cat(inputs, dim)] * 2,
    "gather_same": lambda inputs, dim: [torch.cat(inputs, dim)] * 2,
    "scatter_sum": lambda inputs, dim: list((inputs[0] + inputs[1]).chunk(2, dim)),
    "split": lambda inputs, dim: list(inputs[0].chunk(2, dim)),
    "swap": _swapped,
}


@pytest.mark.parametrize(("name", "dims"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_whole(name: str, dims: tuple[int, ...]):
    found = [of_rank[CASES.index((name, dims))] for of_rank in _found()]
    for got, wanted in zip(found, _whole(name, dims), strict=True):
        assert torch.equal(got.value, wanted.value)
        assert torch.equal(got.gradient, wanted.gradient)


@pytest.mark.parametrize(("name", "dims"), CASES, ids=str)
def test_alone_there_is_nothing_to_do(name: str, dims: tuple[int, ...]):
    x = torch.ones(3, 5, 7)  # which divides by nothing
    assert getattr(collectives, name)(x, ALONE, *dims) is x


def _exchanged(kind: str) -> tuple[Tensor, Tensor]:
    axis = build_mesh(Layout(1, 1, 1, 2), "cpu").tp
    x = torch.arange(48.0).view(1, 8, 6).add(axis.rank).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        there = collectives.swap(collectives.gather(x.sin(), axis, 1), axis, 2, 1)
        back = collectives.swap(there * 2, axis, 1, 2)
        return collectives.scatter_sum(collectives.copy_in(back, axis), axis, 1)

    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if kind == "compiled" else layer
    value = run(x)
    return value.detach(), torch.autograd.grad(value.square().sum(), x)[0]


def test_they_compile_without_a_break():
    for plain, compiled in zip(on_ranks(2, _exchanged, "plain"), on_ranks(2, _exchanged, "compiled"), strict=True):
        assert torch.equal(plain[0], compiled[0])
        assert torch.equal(plain[1], compiled[1])


def test_what_does_not_divide_is_a_mistake_of_the_caller():
    with pytest.raises(AssertionError, match=r"dim 1 of \(1, 5, 2\) in 2 parts"):
        on_ranks(2, _uneven)


def _uneven() -> None:
    collectives.split(torch.ones(1, 5, 2), build_mesh(Layout(1, 1, 1, 2), "cpu").tp, 1)
