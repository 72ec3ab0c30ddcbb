"""One training run: everything is checked before the first step, then Lightning's loop runs to the end or a stop."""

import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

from llmt_shared.errors import ConfigError, Stopped
from llmt_shared.progress import say
from llmt_train import checkpoints
from llmt_train.callbacks import Run, StepCallback
from llmt_train.check.preflight import Begun, check_resumption
from llmt_train.config import RunConfig
from llmt_train.data.batch import PackedBatch
from llmt_train.data.stream import Plan, Prefetched, train_batches
from llmt_train.lock import NAME as LOCK
from llmt_train.lock import locked
from llmt_train.module import TrainModule
from llmt_train.optim import build_optimizer
from llmt_train.parallel.environment import JoinedGroup
from llmt_train.parallel.process import Process, joined
from llmt_train.parallel.reduction import summed
from llmt_train.parallel.strategy import LaidOut, snapshot
from llmt_train.parallel.together import by_first, own_rank
from llmt_train.policy import uses_bf16
from llmt_train.quiet import quiet_lightning, quiet_transformers
from llmt_train.schedule import build_scheduler
from llmt_train.setup import Setup, describe, set_up
from llmt_train.stopping import StopRequest
from llmt_train.watch.loggers import FOLDERS as LOGGER_FOLDERS
from llmt_train.watch.loggers import NAME as LOGGERS
from llmt_train.watch.loggers import Loggers, check_packages, telling
from llmt_train.watch.metrics import NAME as METRICS
from llmt_train.watch.metrics import MetricsFile, read_metrics
from llmt_train.watch.progress import Reporter
from llmt_train.watch.runlog import NAME as RUN_LOG
from llmt_train.watch.runlog import RunLog
from llmt_train.watch.samples import NAME as SAMPLES
from llmt_train.watch.samples import Sampler, prepare_sampler
from llmt_train.watch.spikes import WINDOW, recent_losses
from llmt_train.watch.step_record import Meter, flops_of, peak_of_this_device

_FOLDERS = ("checkpoints", "tokenizer", *LOGGER_FOLDERS)
_FILES = (METRICS, SAMPLES, RUN_LOG, LOGGERS)
"""What a run makes in its output, beside the lock file."""


@dataclass(frozen=True)
class FitResult:
    """What a finished run came to."""

    output: str
    checkpoint: str
    steps: int
    tokens: int
    """Tokens of the rows consumed, padding included."""
    loss: float | None
    """Of the last step; ``None`` where metrics.jsonl has gone."""
    eval_loss: float | None
    """On the validation split after the last step; ``None`` without one."""
    resumed_from: int | None
    """Step of the checkpoint that this call started from; ``None`` for a run from the start."""
    best: str | None = None
    """The checkpoint with the lowest held-out loss; ``None`` without ``save.keep_best``."""
    best_eval_loss: float | None = None


def fit(config: RunConfig, *, force: bool = False) -> FitResult:
    """Train until the run's last step, from the newest checkpoint of ``config.output`` if there is one.

    Args:
        config: the run.
        force: remove what an earlier run left in ``config.output`` and start over.

    Raises:
        ConfigError: something does not fit together; found before the first step.
        FormatError: the dataset or a checkpoint is damaged.
        DataError: the loss or its gradient is not finite.
        Stopped: asked to stop, or the disk is full; running again resumes.
    """
    with ExitStack() as stack:
        log = stack.enter_context(RunLog())
        stack.enter_context(quiet_lightning())
        stack.enter_context(quiet_transformers())
        process = stack.enter_context(joined(config.parallel))
        stop = stack.enter_context(StopRequest())
        check_packages(config)
        setup = set_up(config)
        sampler, plan = prepare_sampler(setup), setup.plan
        by_first(lambda: stack.enter_context(_locked(config.output)))
        if force:
            by_first(lambda: _remove_run(config.output))
        start = _resume_point(setup)
        step = checkpoints.read_state(start).step if start else 0
        is_finished = start is not None and step == plan.total_steps
        if not is_finished:
            log.open(config.output)
        say(describe(setup, step))
        if not is_finished:
            with checkpoints.stopped_by_full_disk(config.output):
                _train(setup, sampler, process, stop, start, step)
        if stop.signal_name is not None and (saved := _last_step(config.output)) < plan.total_steps:
            raise Stopped(f"{config.output}: saved at step {saved}; run the same command again to resume")
    return _result(config, plan, step if start else None)


def _resume_point(setup: Setup) -> Path | None:
    config = setup.config
    for damage in checkpoints.set_damaged_aside(config.output):
        say(f"warning: {damage}")
    newest = by_first(lambda: checkpoints.newest_checkpoint(config.output))
    if newest is not None:
        begun = Begun(setup.plan, setup.dataset.digest, setup.base)
        check_resumption(newest, begun, config, setup.model.config.to_dict())
    return newest


def _train(
    setup: Setup, sampler: Sampler | None, process: Process, stop: StopRequest, start: Path | None, step: int
) -> None:
    config, plan = setup.config, setup.plan
    if (tokenizer := setup.dataset.tokenizer_dir) is not None:
        by_first(lambda: checkpoints.copy_files(tokenizer, config.output / "tokenizer"))
    first = own_rank() == 0  # the rank that writes for all
    with ExitStack() as stack:
        loggers = stack.enter_context(telling(config, step)) if first else Loggers()
        metrics = MetricsFile(config.output, step, is_written=first)
        stack.callback(metrics.close)
        samples = MetricsFile(config.output, step, SAMPLES, is_written=first) if sampler is not None else None
        if samples is not None:
            stack.callback(samples.close)
        reporter = Reporter(plan.total_steps, step)
        stack.callback(reporter.close)
        rows, pairing, rank = setup.dataset.train, setup.pairing["train"], setup.mesh.dp.rank
        batches = Prefetched(lambda: setup.own_tokens(train_batches(rows, plan, step, pairing, rank)))
        stack.callback(batches.close)
        meter = _meter(setup, batches)
        before = by_first(lambda: recent_losses(read_metrics(config.output)))
        saver = stack.enter_context(checkpoints.Saver(config.output, config.save))
        save = partial(_save, setup, saver)
        losses = deque(before, maxlen=WINDOW)
        run = Run(setup, process, metrics, loggers, reporter, stop, meter, losses, save, sampler, samples)
        trainer = build_trainer(setup, StepCallback(run), max_steps=plan.total_steps)
        trainer.fit(build_module(setup), batches, ckpt_path=start, weights_only=True)


def _meter(setup: Setup, batches: Prefetched[PackedBatch]) -> Meter:
    peak = peak_of_this_device(_computes_in_bf16(setup.config))
    return Meter(
        setup.plan,
        flops_of(setup.model),
        None if peak is None else peak * setup.mesh.layout.world,
        lambda: batches.waited,
        lambda amounts: summed(amounts, setup.mesh.dp),
    )


def _computes_in_bf16(config: RunConfig) -> bool:
    return uses_bf16(config) or config.precision == "bf16-true"


def build_module(setup: Setup) -> TrainModule:
    """Return what Lightning trains."""
    config, plan = setup.config, setup.plan
    return TrainModule(
        setup.model,
        setup.task,
        partial(build_optimizer, config=config.optim),
        partial(
            build_scheduler,
            config=config.optim,
            total=plan.total_steps,
            tokens_per_step=plan.rows_per_step * plan.length,
        ),
        head=setup.head,
        mesh=setup.mesh,
        seed=plan.seed,
        num_sources=len(setup.dataset.sources),
        attention=config.attention,
        deterministic=config.train.deterministic,
        exchanges_once=config.parallel.no_sync,
    )


def _save(setup: Setup, saver: checkpoints.Saver, trainer: pl.Trainer, step: int, eval_loss: float | None) -> None:
    config, model = setup.config, setup.model
    generation = model.generation_config
    saver.save(
        Begun(setup.plan, setup.dataset.digest, setup.base).state(step, eval_loss),
        {
            checkpoints.RUN_CONFIG: config.model_dump(mode="json"),
            checkpoints.MODEL_CONFIG: model.config.to_dict(),
            "generation_config.json": generation.to_dict() if generation else {},
        },
        snapshot(trainer),
    )


def build_trainer(setup: Setup, callback: pl.Callback, *, max_steps: int) -> pl.Trainer:
    """Return what runs the loop over this process's micro-batches."""
    config, plan = setup.config, setup.plan
    return pl.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=1 if setup.device.index is None else [setup.device.index],
        num_nodes=setup.mesh.layout.world,
        strategy=LaidOut(setup.mesh, saves_trained_alone=config.lora is not None),
        plugins=[JoinedGroup()],
        precision="32-true",  # bf16 is FSDP2's: see `sharding`
        deterministic=config.train.deterministic,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=plan.accumulation,
        callbacks=[callback],
        logger=False,  # see `loggers`
        default_root_dir=config.output,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _result(config: RunConfig, plan: Plan, resumed_from: int | None) -> FitResult:
    records = read_metrics(config.output)
    loss = next((record["loss"] for record in reversed(records) if "loss" in record), None)
    evaluation = next((record["eval"] for record in reversed(records) if "eval" in record), None)
    newest = checkpoints.newest_checkpoint(config.output)
    best = next(iter(checkpoints.best_checkpoints(config.output, min(config.save.keep_best, 1))), None)
    return FitResult(
        output=str(config.output),
        checkpoint=str(newest),
        steps=plan.total_steps,
        tokens=plan.total_rows * plan.length,
        loss=loss,
        eval_loss=evaluation["loss"] if evaluation else None,
        resumed_from=resumed_from,
        best=str(best) if best is not None else None,
        best_eval_loss=checkpoints.read_state(best).eval_loss if best is not None else None,
    )


def _last_step(run_dir: Path) -> int:
    newest = checkpoints.newest_checkpoint(run_dir)
    return checkpoints.read_state(newest).step if newest else 0


def _remove_run(run_dir: Path) -> None:
    """Remove what a run writes, by name: the folder may hold other things."""
    for name in _FOLDERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in _FILES:
        (run_dir / name).unlink(missing_ok=True)


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Make the folder and keep a second run out of it, and this run out of a folder of something else."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"output: {run_dir} is no folder; wanted a folder for this run") from None
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(f"output: {run_dir} cannot be made: {error.strerror}; choose another folder") from None
    foreign = [name for name in _FOLDERS if (run_dir / name).exists()]
    if foreign and not any((run_dir / name).exists() for name in (LOCK, METRICS)):
        raise ConfigError(f"output: {run_dir} holds {' and '.join(foreign)} of something else; choose another folder")
    with locked(run_dir, "stop it or choose another `output`"):
        yield
