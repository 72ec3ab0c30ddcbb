"""The one LightningModule: a micro-batch to a loss that adds up to the whole step's, however the step is split."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llmt_shared.order import key
from llmt_train.data.batch import PackedBatch
from llmt_train.model.head import HeadSpec, Scores, model_scores
from llmt_train.model.neftune import noisy_embeddings
from llmt_train.objectives import Measures, share
from llmt_train.parallel.mesh import Axis, Mesh
from llmt_train.parallel.reduction import gathered, summed
from llmt_train.parallel.sharding import synchronise_gradients
from llmt_train.tasks import Task


class StepPart(NamedTuple):
    """What a micro-batch contributed to its step, on the device."""

    measures: dict[str, Tensor]
    """Its shares of the step's means, scalars in fp64."""
    by_piece: Tensor
    """[P] fp64; the loss by piece: whoever wants to know where a bad loss comes from."""


class TrainModule(pl.LightningModule):
    """Any objective on any packed causal language model.

    A ``Trainer`` must give every optimizer step exactly ``accumulate_grad_batches`` micro-batches (the last may be
    short) and must stop on steps, not on epochs.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        build_optimizer: Callable[[nn.Module], Optimizer],
        build_scheduler: Callable[[Optimizer], LRScheduler],
        *,
        head: HeadSpec | None,
        mesh: Mesh,
        seed: int,
        num_sources: int = 1,
        attention: str = "auto",
        deterministic: bool = False,
        exchanges_once: bool = False,
    ) -> None:
        """Keep what a run needs; nothing is computed yet.

        Args:
            model: from `load_model`, laid out over the mesh.
            task: the objective and what belongs to it.
            build_optimizer: from the model.
            build_scheduler: from the optimizer; it is stepped once per optimizer step.
            head: from `find_head`; ``None`` computes the model's own logits.
            mesh: of this process.
            seed: of dropout and whatever else is drawn in a forward pass.
            num_sources: of the dataset, for evaluation by source.
            attention: backend, or ``auto``.
            deterministic: see `varlen_attention`.
            exchanges_once: exchange gradients at a step's last micro-batch alone.
        """
        super().__init__()
        self.model = model
        self.task = task
        self.build_optimizer = build_optimizer
        self.build_scheduler = build_scheduler
        self.head = head
        self.mesh = mesh
        self.exchanges_once = exchanges_once
        self.seed = seed
        self.num_sources = num_sources
        self.attention = attention
        self.deterministic = deterministic
        self.step_parts: list[StepPart] = []
        """Of the optimizer step's micro-batches so far, on this rank; complete in ``on_before_optimizer_step`` and
        until the next step's first micro-batch."""
        self.evaluation = Evaluation(num_sources)
        self._is_new_step = True

    def configure_model(self) -> None:
        """Do nothing: the model is laid out. Lightning wants a module to say so."""

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build what Lightning steps."""
        optimizer = self.build_optimizer(self.model)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.build_scheduler(optimizer), "interval": "step", "frequency": 1},
        }

    def scores(self, batch: PackedBatch, *, with_mean: bool = False, is_uniform: bool = False) -> Scores:
        """Return the scores of every label: [N] each, 0 where there is none; see `model_scores`."""
        return model_scores(
            self.model,
            self.head,
            batch,
            attention=self.attention,
            deterministic=self.deterministic,
            with_mean=with_mean,
            is_uniform=is_uniform,
        )

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return the sum over the loss's parts of S * A * R / N.

        S: the part's sum over this micro-batch. A: micro-batches per step, by which Lightning divides. R: ranks over
        which gradients are averaged. N: the part's denominator of the whole step. So the step's gradient is that of
        (sum of all S) / N for any split into micro-batches and ranks; a mean per micro-batch would weigh tokens by
        the company they are in. A micro-batch without targets has S = 0 and is attached to the graph.
        """
        self._begin()
        accumulation = self.trainer.accumulate_grad_batches
        synchronise_gradients(self.model, not self.exchanges_once or len(self.step_parts) == accumulation - 1)
        batch = self._with_reference(batch)
        noise = noisy_embeddings(self.model, batch, self.task.neftune, self.seed)
        with noise if self.task.neftune else nullcontext():
            scores = self.scores(batch, with_mean=self.task.with_mean, is_uniform=self.task.is_uniform)
        measures = self.task.objective(scores, batch)
        loss = share(measures["loss"], batch.denominators)
        self.step_parts.append(_part(measures, batch))
        return loss * (accumulation * self.mesh.layout.averaged)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The step is complete: the next micro-batch begins another one."""
        self._is_new_step = True

    def step_measures(self) -> dict[str, float]:
        """Return the step's means, over its micro-batches on all ranks; waits for the device, once."""
        names = list(self.step_parts[0].measures)
        values = [torch.stack([part.measures[name] for part in self.step_parts]).sum() for name in names]
        return dict(zip(names, summed(torch.stack(values), self.mesh.averaged).tolist(), strict=True))

    def all_step_parts(self) -> list[StepPart]:
        """Return the parts of all ranks, in the order of the step's rows, on the host; all ranks call it."""
        own = [_over(part, self.mesh.cp) for part in self.step_parts]
        return [part for parts in zip(*gathered(own, self.mesh.dp), strict=True) for part in parts]

    def on_validation_epoch_start(self) -> None:
        """Begin an evaluation."""
        self.evaluation = Evaluation(self.num_sources)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add a micro-batch to the evaluation."""
        batch = self._with_reference(batch)
        self.evaluation.add(self.task.evaluation(self.scores(batch), batch), batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a micro-batch without waiting for the copy."""
        return batch.to(device, non_blocking=True)

    def _with_reference(self, batch: PackedBatch) -> PackedBatch:
        reference = self.task.reference
        return batch if reference is None else batch._replace(reference_logps=reference(batch))

    def _begin(self) -> None:
        """Seed torch for this micro-batch from where the run stands: resuming needs no state of a generator."""
        if self._is_new_step:
            self.step_parts = []
            self._is_new_step = False
        # Ranks that share layers draw the same, also where each has some of the tokens: their embedding has them all.
        place = (self.trainer.global_step, len(self.step_parts), self.mesh.averaged.rank)
        torch.manual_seed(key(self.seed, *place))


class Evaluation:
    """Sums and counts of every measure by source: sums, so that any split gives the same evaluation."""

    def __init__(self, num_sources: int) -> None:
        self._num_sources = num_sources
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        """By measure, for each of its parts: [sources, 2] fp64, values and counts."""
        self._per: dict[str, list[str]] = {}

    def add(self, measures: Measures, batch: PackedBatch) -> None:
        """Add a micro-batch; nothing waits for the device."""
        # Padding has the source -1 and counts nothing: it adds 0 to whichever source it is taken for.
        source_P = batch.segment_source.clamp(min=0)
        for name, parts in measures.items():
            self._per[name] = [part.per for part in parts]
            if not self._sums[name]:
                zeros = torch.zeros(self._num_sources, 2, dtype=torch.float64, device=source_P.device)
                self._sums[name] = [zeros.clone() for _ in parts]
            for part, sums in zip(parts, self._sums[name], strict=True):
                sums.index_add_(
                    0, source_P[part.piece], torch.stack([part.values, part.counts], dim=1).detach().double()
                )

    def over(self, axis: Axis) -> "Evaluation":
        """Return the evaluation of all ranks of an axis, which have added micro-batches of the same measures."""
        total = Evaluation(self._num_sources)
        total._per = self._per
        for name, parts in self._sums.items():
            total._sums[name] = list(summed(torch.stack(parts), axis))
        return total

    def means(self, source: int | None = None) -> dict[str, float]:
        """Return every measure's mean and the counts of the loss, of one source or of all; empty without any."""
        result: dict[str, float] = {}
        for name, parts in self._sums.items():
            sums = [(part.sum(0) if source is None else part[source]).tolist() for part in parts]
            if not all(counted for _, counted in sums):
                continue
            result[name] = sum(value / counted for value, counted in sums)
            if name == "loss":
                result |= {per: round(counted) for per, (_, counted) in zip(self._per[name], sums, strict=True)}
        return result


def _over(part: StepPart, axis: Axis) -> StepPart:
    """What ranks that share tokens have found together, on the host."""
    measures = {name: summed(value, axis).cpu() for name, value in part.measures.items()}
    return StepPart(measures, summed(part.by_piece, axis).cpu())


def _part(measures: Measures, batch: PackedBatch) -> StepPart:
    by_piece = torch.zeros(len(batch.lengths), dtype=torch.float64, device=batch.labels.device)
    for part in measures["loss"]:
        by_piece.index_add_(0, part.piece, part.values.detach().double() / batch.denominators[part.per])
    shares = {name: share(parts, batch.denominators).detach().double() for name, parts in measures.items()}
    return StepPart(shares, by_piece)
