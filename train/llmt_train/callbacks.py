"""What happens around an optimizer step, in one place and one order: check, clip, log, evaluate, sample, save, stop."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from llmt_shared.errors import DataError
from llmt_train.data.stream import rows_consumed
from llmt_train.evaluation import Record, evaluate, with_perplexity
from llmt_train.module import TrainModule
from llmt_train.parallel.process import Process
from llmt_train.parallel.reduction import whole
from llmt_train.setup import Setup
from llmt_train.stopping import StopRequest
from llmt_train.watch.blame import describe_spike, not_finite_message, spike_message
from llmt_train.watch.loggers import Loggers, eval_values, train_values
from llmt_train.watch.metrics import MetricsFile
from llmt_train.watch.progress import Reporter
from llmt_train.watch.samples import Sampler, describe_sample, write_samples
from llmt_train.watch.spikes import usual
from llmt_train.watch.step_record import Meter


@dataclass(frozen=True)
class Run:
    """What the callback needs of a run that has been set up."""

    setup: Setup
    process: Process
    metrics: MetricsFile
    loggers: Loggers
    reporter: Reporter
    stop: StopRequest
    meter: Meter
    losses: deque[float]
    """Of the newest steps, as many as say what is usual."""
    save: Callable[[pl.Trainer, int, float | None], None]
    """Writes the checkpoint of a step, which knows its held-out loss where there is one, and prunes older ones."""
    sampler: Sampler | None = None
    samples: MetricsFile | None = None
    """Where the sampler's texts go."""


@dataclass
class StepCallback(Callback):
    """Lightning's hooks, mapped to what a step needs; steps are counted from 1 once they are done."""

    run: Run
    _record: Record | None = None

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
            self._sample(trainer, pl_module, 0)
        self.run.meter.start()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check that loss and gradient are finite before they reach the weights; clip."""
        assert isinstance(pl_module, TrainModule)
        measures = pl_module.step_measures()
        norm = clip(pl_module, self.run.setup.config.optim.clip) if math.isfinite(measures["loss"]) else math.nan
        if not math.isfinite(norm):
            parts = pl_module.all_step_parts()
            raise DataError(not_finite_message(self.run.setup, trainer.global_step + 1, norm, parts))
        self._record = {"loss": measures.pop("loss"), "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
        self._record |= with_perplexity(measures)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step's last micro-batch: log, evaluate, sample, save, stop."""
        del outputs, batch_idx
        self.run.meter.add(batch)
        if self._record is None:
            return
        step, record = trainer.global_step, self._record
        self._record = None
        self.run.process.beat(step)
        self._log(trainer, step, record)
        if self._after_step(trainer, pl_module, step):
            self.run.meter.start()

    def _after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> bool:
        """Do what is due now; return whether anything was."""
        config = self.run.setup.config
        is_last = step == self.run.setup.plan.total_steps
        evaluates = is_last or _is_due(step, config.eval.every)
        samples = config.sample is not None and (is_last or _is_due(step, config.sample.every))
        loss = self._evaluate(trainer, module, step) if evaluates else None
        if samples:
            self._sample(trainer, module, step)
        is_asked_to_stop = self.run.stop.agreed()  # perhaps just now, while it evaluated
        saves = is_last or is_asked_to_stop or _is_due(step, config.save.every)
        if saves:
            self._save(trainer, step, loss)
        if is_asked_to_stop:
            trainer.should_stop = True
        return evaluates or samples or saves

    def _log(self, trainer: pl.Trainer, step: int, record: Record) -> None:
        plan = self.run.setup.plan
        line = {"step": step, "epoch": rows_consumed(plan, step) / plan.num_rows, **record, **self.run.meter.read(step)}
        self._look_for_spike(trainer.lightning_module, line)
        self.run.metrics.write(line)
        self.run.reporter.step(line)
        self.run.loggers.log("train", step, train_values(line))

    def _look_for_spike(self, module: pl.LightningModule, line: Record) -> None:
        """Mark a step's line, and warn, where its loss is far above what was usual before it."""
        before, setup = usual(self.run.losses), self.run.setup
        self.run.losses.append(line["loss"])
        if before is not None and line["loss"] > before.limit:
            assert isinstance(module, TrainModule)
            line["spike"] = describe_spike(setup, line["step"], line["loss"], before, module.all_step_parts())
            self.run.reporter.note(spike_message(setup, line))

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> float | None:
        """Return the held-out loss; ``None`` where no target is held out."""
        if "validation" not in self.run.setup.splits:
            return None
        assert isinstance(pl_module, TrainModule)
        result = evaluate(pl_module, self.run.setup, "validation")
        if "loss" not in result:  # documents of one token have no target
            return None
        line = {"step": step, "eval": result}
        self.run.metrics.write(line)
        self.run.reporter.evaluation(line)
        self.run.loggers.log("eval", step, eval_values(result))
        return float(result["loss"])

    def _sample(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        if self.run.sampler is None or self.run.samples is None:
            return
        assert isinstance(module, TrainModule)
        for line in write_samples(self.run.sampler, self.run.setup, module, step):
            self.run.samples.write(line)
            self.run.reporter.note(describe_sample(line, self.run.setup.plan.total_steps))

    def _save(self, trainer: pl.Trainer, step: int, eval_loss: float | None) -> None:
        """Write a checkpoint, after the lines that lead to it are on the disk."""
        for file in (self.run.metrics, self.run.samples):
            if file is not None:
                file.sync()
        self.run.save(trainer, step, eval_loss)


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


def clip(module: torch.nn.Module, largest: float | None) -> float:
    """Scale the gradient down to a 2-norm of at most ``largest``; return the norm that it had."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if largest is None else largest)
    return whole(norm).item()
