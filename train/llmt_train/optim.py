"""Which optimizer steps which parameters, and which of them decay."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from llmt_train.config import AdafactorConfig, AdamwConfig, MuonConfig, RateConfig, SgdConfig
from llmt_train.parallel.optim import WholeAdafactor, WholeMuon


def build_optimizer(model: nn.Module, config: RateConfig) -> torch.optim.Optimizer:
    """Return the run's optimizer over the parameters that train; AdamW is one fused kernel where they lie on a GPU."""
    groups = parameter_groups(model, config.weight_decay)
    match config:
        case AdamwConfig():
            return _adamw(groups, config)
        case MuonConfig():
            return _muon(model, groups, config)
        case AdafactorConfig():
            return WholeAdafactor(groups, lr=config.lr)
        case SgdConfig():
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    raise TypeError(f"no optimizer for {type(config).__name__}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trained parameters into those that decay and those that do not.

    Not decayed: parameters with fewer than two dims (biases, norms) and the weights of embedding modules, whose rows
    for rare tokens would shrink with nothing to pull them back. A head tied to an embedding is the same tensor.
    """
    embeddings = _embeddings(model)
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _embeddings(model: nn.Module) -> set[int]:
    """Ids of the parameters of embedding modules."""
    return {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}


def _adamw(groups: list[dict[str, Any]], config: AdamwConfig | MuonConfig) -> torch.optim.AdamW:
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=on_gpu or None)


def _muon(model: nn.Module, groups: list[dict[str, Any]], config: MuonConfig) -> torch.optim.Optimizer:
    """Muon for the matrices of hidden layers, AdamW for embeddings, the head, norms, biases and blocks of experts."""
    find_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    others = _embeddings(model) | ({id(p) for p in head.parameters()} if head is not None else set())
    trained = [p for group in groups for p in group["params"]]
    matrices = {id(p): p for p in trained if p.ndim == 2 and id(p) not in others}
    rest = [group | {"params": [p for p in group["params"] if id(p) not in matrices]} for group in groups]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(
            WholeMuon(
                matrices.values(),
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                nesterov=config.nesterov,
                ns_steps=config.ns_steps,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if len(matrices) < len(trained):
        parts.append(_adamw([group for group in rest if group["params"]], config))
    return Together(parts)


def parts_of(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that hold the state and the groups: several of `Together`, else itself."""
    return optimizer.parts if isinstance(optimizer, Together) else [optimizer]


class Together(torch.optim.Optimizer):
    """Optimizers of different parameters that step, save and load as one: a trainer and a scheduler want one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([{"params": group["params"]} for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._share_groups()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every part; the closure runs once, before."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        """Whoever sets a learning rate in these groups sets it in the parts'."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
