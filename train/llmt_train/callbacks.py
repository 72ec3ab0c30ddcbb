"""What happens around an optimizer step, in one place and one order: check, clip, log, evaluate, save, stop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from llmt_shared.errors import DataError
from llmt_train.data import rows_consumed, rows_of_step
from llmt_train.evaluation import Record, evaluate, with_perplexity
from llmt_train.metrics import MetricsFile
from llmt_train.module import StepPart, TrainModule
from llmt_train.progress import Reporter
from llmt_train.setup import Setup
from llmt_train.stopping import StopRequest


@dataclass(frozen=True)
class Run:
    """What the callback needs of a run that has been set up."""

    setup: Setup
    metrics: MetricsFile
    reporter: Reporter
    stop: StopRequest
    save: Callable[[pl.Trainer, int], None]
    """Writes the checkpoint of a step and prunes older ones."""


@dataclass
class StepCallback(Callback):
    """Lightning's hooks, mapped to what a step needs; steps are counted from 1 once they are done."""

    run: Run
    _record: Record | None = None
    _clock: float = 0.0

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Record) -> None:
        """Count the batches done in this run's micro-batches: their number may have changed since the checkpoint."""
        del trainer, pl_module
        done = checkpoint["global_step"] * self.run.setup.plan.accumulation
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(ready=done, started=done, processed=done, completed=done - 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the untrained model; take back what the trainer changed while it started."""
        self.run.stop.listen()
        _set_learning_rate(trainer)
        if trainer.global_step == 0:
            self._evaluate(trainer, pl_module, 0)
        self._clock = time.monotonic()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check that loss and gradient are finite before they reach the weights; clip."""
        assert isinstance(pl_module, TrainModule)
        measures = pl_module.step_measures()
        norm = _clip(pl_module, self.run.setup.config.optim.clip) if math.isfinite(measures["loss"]) else math.nan
        if not math.isfinite(norm):
            raise DataError(_not_finite(self.run.setup, trainer.global_step, norm, pl_module.step_parts))
        self._record = {"loss": measures.pop("loss"), "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
        self._record |= with_perplexity(measures)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step's last micro-batch: log, evaluate, save, stop."""
        del outputs, batch, batch_idx
        if self._record is None:
            return
        step, record = trainer.global_step, self._record
        self._record = None
        self._log(trainer, step, record)
        config = self.run.setup.config
        is_last = step == self.run.setup.plan.total_steps
        if is_last or _is_due(step, config.eval.every):
            self._evaluate(trainer, pl_module, step)
        is_asked_to_stop = self.run.stop.signal_name is not None
        if is_last or is_asked_to_stop or _is_due(step, config.save.every):
            self.run.metrics.sync()
            self.run.save(trainer, step)
        if is_asked_to_stop:
            trainer.should_stop = True
        self._clock = time.monotonic()

    def _log(self, trainer: pl.Trainer, step: int, record: Record) -> None:
        plan = self.run.setup.plan
        before, rows = rows_consumed(plan, step - 1), rows_consumed(plan, step)
        seconds = max(time.monotonic() - self._clock, 1e-9)
        line = {
            "step": step,
            "epoch": rows / plan.num_rows,
            **record,
            "tokens": rows * plan.length,
            "rows": rows,
            "tokens_per_s": round((rows - before) * plan.length / seconds, 1),
        }
        self.run.metrics.write(line)
        self.run.reporter.step(line)
        _to_loggers(trainer, {f"train/{key}": value for key, value in line.items() if key != "step"}, step)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if "validation" not in self.run.setup.splits:
            return
        assert isinstance(pl_module, TrainModule)
        result = evaluate(pl_module, self.run.setup, "validation")
        line = {"step": step, "eval": result}
        self.run.metrics.write(line)
        self.run.reporter.evaluation(line)
        scores = {f"eval/{name}": source["loss"] for name, source in result["sources"].items()}
        total = {f"eval/{name}": value for name, value in result.items() if isinstance(value, float)}
        _to_loggers(trainer, total | scores, step)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _set_learning_rate(trainer: pl.Trainer) -> None:
    """Set the next step's rate from the schedule: a longer run may have changed it since the checkpoint was written."""
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        parts = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, base, factor in parts:
            group["lr"] = base * factor(scheduler.last_epoch)


def _clip(module: torch.nn.Module, largest: float | None) -> float:
    """Scale the gradient down to a 2-norm of at most ``largest``; return the norm that it had."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    return torch.nn.utils.clip_grad_norm_(parameters, math.inf if largest is None else largest).item()


def _not_finite(setup: Setup, step: int, norm: float, parts: list[StepPart]) -> str:
    """Name the rows and documents of the step: of those micro-batches that are to blame, where that is known."""
    losses = [part.measures["loss"].item() for part in parts]
    loss = sum(losses)
    what = f"the loss is {loss:.4f}" + (f", but the norm of its gradient {norm}" if math.isfinite(loss) else "")
    plan, rows = setup.plan, rows_of_step(setup.plan, step).tolist()
    blamed = [
        row
        for micro, part in enumerate(losses)
        if not math.isfinite(part)
        for row in rows[micro * plan.micro_rows : (micro + 1) * plan.micro_rows]
    ] or rows
    table = setup.dataset.train.segments(blamed[:8])
    pairs = zip(table.source.tolist(), table.document.tolist(), strict=True)
    documents = dict.fromkeys(f"{setup.dataset.sources[source]}:{document}" for source, document in pairs)
    is_on_disk = setup.dataset.tokenizer_dir is not None
    look = f"`llmt-prep inspect {setup.dataset.path} --row {blamed[0]}` shows a row; " if is_on_disk else ""
    return (
        f"step {step + 1}: {what}; stopped before it reached the weights. Rows {_shorten(blamed)}; documents "
        f"{_shorten(list(documents))}. {look}a lower optim.lr or a longer optim.warmup mends most such runs"
    )


def _shorten(items: list[Any]) -> str:
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return ", ".join(str(item) for item in items[:8]) + more


def _to_loggers(trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)
