"""Optimizers that look at whole matrices, for parameters that may be sharded: one at a time is whole, on every rank.

torch's own compute on the parts where they can, which rounds in another way for every number of parts (Muon, in bf16),
or not at all (Adafactor).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim._adafactor import adafactor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from llmt_train.parallel.reduction import whole


class WholeMuon(torch.optim.Muon):
    """torch's Muon; the momentum, which is the state, stays sharded."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step; the closure runs once, before."""
        return _step(self, self._update, closure)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        update = whole(gradient.lerp(buffer, momentum) if group["nesterov"] else buffer)
        update = _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
        parameter.add_(like(update, parameter), alpha=-rate)


class WholeAdafactor(torch.optim.Adafactor):
    """torch's Adafactor; its small state lies whole on every rank."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step; the closure runs once, before."""
        return _step(self, self._update, closure)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, weights, gradient = self.state[parameter], whole(parameter), whole(gradient)
        if not state:
            state |= {"step": torch.tensor(0.0), **(_factors(gradient) if gradient.ndim > 1 else {})}
            if gradient.ndim < 2:
                state["variance"] = torch.zeros_like(parameter)
        names = ("row_var", "col_var", "variance")
        rows, columns, variance = (whole(state[name]) if name in state else None for name in names)
        adafactor(
            [weights],
            [gradient],
            [rows],
            [columns],
            [variance],
            [state["step"]],
            foreach=False,
            eps1=group["eps"][0],
            eps2=group["eps"][1],
            **{name: group[name] for name in ("d", "lr", "beta2_decay", "weight_decay", "maximize")},
        )
        of_state = zip(map(state.get, names), (rows, columns, variance), strict=True)
        for tensor, updated in [(parameter, weights), *of_state]:
            if isinstance(tensor, DTensor) and updated is not None:
                tensor.copy_(like(updated, tensor))


def _factors(gradient: Tensor) -> dict[str, Tensor]:
    *outer, rows, columns = gradient.shape
    return {"row_var": gradient.new_zeros(*outer, rows, 1), "col_var": gradient.new_zeros(*outer, 1, columns)}


def _step(
    optimizer: torch.optim.Optimizer,
    update: Callable[[Tensor, Tensor, dict[str, Any]], None],
    closure: Callable[[], Any] | None,
) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                update(parameter, parameter.grad, group)
    return loss


def like(tensor: Tensor, parameter: Tensor | nn.Parameter) -> Tensor:
    """Return this rank's part of a tensor that every rank has whole."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
