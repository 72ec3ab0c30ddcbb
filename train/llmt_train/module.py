"""The one LightningModule: a micro-batch to a loss that adds up to the whole step's, however the step is split."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llmt_shared.order import key
from llmt_shared.segments import IGNORE
from llmt_train.batch import PackedBatch
from llmt_train.head import HeadSpec, model_logps
from llmt_train.objectives import Objective


class TrainModule(pl.LightningModule):
    """Any objective on any packed causal language model.

    A ``Trainer`` must give every optimizer step exactly ``accumulate_grad_batches`` micro-batches (the last may be
    short) and must stop on steps, not on epochs.
    """

    step_loss: Tensor
    """Loss of the optimizer step: the sum of S / N over its micro-batches so far, on this rank, fp64. Complete in
    ``on_before_optimizer_step`` and until the next step's first micro-batch."""
    eval_sums: Tensor
    """[sources, 2] fp64: summed negative log-likelihood and number of targets since the evaluation began."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        build_optimizer: Callable[[nn.Module], Optimizer],
        build_scheduler: Callable[[Optimizer], LRScheduler],
        *,
        head: HeadSpec | None,
        seed: int,
        num_sources: int = 1,
        attention: str = "auto",
        deterministic: bool = False,
    ) -> None:
        """Keep what a run needs; nothing is computed yet.

        Args:
            model: from `load_model`.
            objective: what the steps minimise.
            build_optimizer: from the model.
            build_scheduler: from the optimizer; it is stepped once per optimizer step.
            head: from `find_head`; ``None`` computes the model's own logits.
            seed: of dropout and whatever else is drawn in a forward pass.
            num_sources: of the dataset, for evaluation by source.
            attention: backend, or ``auto``.
            deterministic: see `varlen_attention`.
        """
        super().__init__()
        self.model = model
        self.objective = objective
        self.build_optimizer = build_optimizer
        self.build_scheduler = build_scheduler
        self.head = head
        self.seed = seed
        self.num_sources = num_sources
        self.attention = attention
        self.deterministic = deterministic
        self._micro = 0  # micro-batches of the step that have begun

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build what Lightning steps."""
        optimizer = self.build_optimizer(self.model)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.build_scheduler(optimizer), "interval": "step", "frequency": 1},
        }

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Return the log-probability of every label: [N], 0 where there is none."""
        return model_logps(self.model, self.head, batch, attention=self.attention, deterministic=self.deterministic)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return S * A * R / N.

        S: the objective's sum over this micro-batch. A: micro-batches per step, by which Lightning divides. R: ranks
        over which gradients are averaged. N: the objective's denominator of the whole step. So the step's gradient is
        that of (sum of all S) / N for any split into micro-batches and ranks; a mean per micro-batch would weigh
        tokens by the company they are in. A micro-batch without targets has S = 0 and is attached to the graph.
        """
        self._seed_step()
        terms = self.objective(self.token_logps(batch), batch)
        self.step_loss += terms.loss_sum.detach().double() / terms.denominator
        return terms.loss_sum * (self.trainer.accumulate_grad_batches * self.trainer.world_size / terms.denominator)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The step is complete: the next micro-batch begins another one."""
        self._micro = 0

    def on_validation_epoch_start(self) -> None:
        """Begin an evaluation."""
        self.eval_sums = torch.zeros(self.num_sources, 2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add a micro-batch to ``eval_sums``: sums over tokens, so that any split gives the same evaluation."""
        logps = self.token_logps(batch).detach().double()
        is_target = batch.labels[0] != IGNORE
        # Padding has the source -1 and no targets: it adds 0 to whichever source it is counted under.
        source = batch.segment_source.clamp(min=0)[batch.segment_ids_flat.long()]
        self.eval_sums.index_add_(0, source, torch.stack([-logps, is_target.double()], dim=1))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a micro-batch without waiting for the copy."""
        return batch.to(device, non_blocking=True)

    def _seed_step(self) -> None:
        """Seed torch for this micro-batch from where the run stands: resuming needs no state of a generator."""
        if self._micro == 0:
            self.step_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        torch.manual_seed(key(self.seed, self.trainer.global_step, self._micro, self.trainer.global_rank))
        self._micro += 1
