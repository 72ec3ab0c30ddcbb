"""One training run: everything is checked before the first step, then Lightning's loop runs to the end or a stop."""

import fcntl
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import CONFIG_MAPPING

from llmt_shared.dataset import Dataset, open_dataset
from llmt_shared.errors import ConfigError, Stopped
from llmt_train import checkpoints
from llmt_train.callbacks import Run, StepCallback
from llmt_train.config import FromConfig, RunConfig
from llmt_train.data import Plan, Prefetched, plan_run, rows_consumed, train_batches
from llmt_train.head import HeadSpec, find_head
from llmt_train.isolation import check_isolation
from llmt_train.match import check_max_id, check_tokenizers, model_token_ids, read_token_ids
from llmt_train.metrics import NAME as METRICS
from llmt_train.metrics import MetricsFile, read_metrics
from llmt_train.models import load_model
from llmt_train.module import TrainModule
from llmt_train.objectives import clm
from llmt_train.optim import build_optimizer, build_scheduler
from llmt_train.positions import check_positions
from llmt_train.progress import Reporter
from llmt_train.quiet import quiet_lightning, quiet_transformers
from llmt_train.stopping import StopRequest

_FOLDERS = ("checkpoints", "tokenizer", "tensorboard")
"""What a run makes in its output, beside metrics.jsonl and the lock file."""
_LOCK = ".lock"


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
    dataset = open_dataset(config.data)
    _check_task(config, dataset)
    plan = plan_run(dataset.train, config.batch, config.train)
    with ExitStack() as stack:
        stack.enter_context(quiet_lightning())
        stack.enter_context(quiet_transformers())
        stop = stack.enter_context(StopRequest())
        model = _checked_model(config, dataset)
        stack.enter_context(_locked(config.output))
        if force:
            _remove_run(config.output)
        start = _resume_point(config, dataset, plan, model)
        step = checkpoints.read_state(start).step if start else 0
        _say(_describe(config, dataset, plan, model, step))
        if start is None or step < plan.total_steps:
            with checkpoints.stopped_by_full_disk(config.output):
                _train(config, dataset, plan, model, stop, start, step)
    if stop.signal_name is not None and _last_step(config.output) < plan.total_steps:
        saved = _last_step(config.output)
        raise Stopped(f"{config.output}: saved at step {saved}; run the same command again to resume")
    return _result(config, plan, step if start else None)


def _check_task(config: RunConfig, dataset: Dataset) -> None:
    kind = dataset.manifest.kind
    if kind == "preference":
        raise ConfigError(f"{config.data}: holds preference pairs, for which there is no objective yet")
    if config.task != kind:
        raise ConfigError(f"task: {config.task}, but {config.data} is of kind {kind}; set `task: {kind}`")


def _checked_model(config: RunConfig, dataset: Dataset) -> Any:
    """Load the model after the cheap checks, then run those that need it."""
    place = config.model if isinstance(config.model, str) else "model.from_config"
    ids = model_token_ids(config.model) if isinstance(config.model, str) else None
    if ids is not None:
        check_tokenizers(read_token_ids(dataset.tokenizer_dir / "tokenizer.json"), ids, place)
    spec = config.model if isinstance(config.model, str) else _fresh(config.model, dataset)
    model = load_model(spec, seed=config.train.seed)
    max_id = dataset.manifest.tokenizer.max_id
    check_max_id(max_id, model.get_input_embeddings().weight.shape[0], place)
    for split in (dataset.train, *([] if dataset.validation is None else [dataset.validation])):
        check_positions(model.config, split, place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.bfloat16 if _uses_bf16(config) else None
    check_isolation(model.to(device), attention=config.attention, autocast=autocast)
    return model


def _fresh(model: FromConfig, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Fill in the dataset's vocabulary and token ids: a family's own defaults mean nothing to another tokenizer."""
    entry = dataset.manifest.tokenizer
    ids = {"bos_token_id": entry.bos_id, "eos_token_id": entry.eos_id, "pad_token_id": entry.pad_id}
    ids["vocab_size"] = entry.max_id + 1
    model_type = str(model.from_config.get("model_type"))
    known = vars(CONFIG_MAPPING[model_type]()) if model_type in CONFIG_MAPPING else {}
    return {"from_config": {key: value for key, value in ids.items() if key in known} | model.from_config}


def _find_head(model: Any) -> HeadSpec | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head = find_head(model)
    for warning in caught:
        _say(f"note: {warning.message}")
    return head


def _resume_point(config: RunConfig, dataset: Dataset, plan: Plan, model: Any) -> Path | None:
    newest = checkpoints.newest_checkpoint(config.output)
    if newest is not None:
        step = checkpoints.read_state(newest).step
        if step > plan.total_steps:
            raise ConfigError(f"{newest}: {step} steps are done, more than the run's {plan.total_steps}; train longer")
        state = _state(dataset, plan, step)
        checkpoints.check_resumable(newest, state, config.model_dump(mode="json"), model.config.to_dict())
    return newest


def _state(dataset: Dataset, plan: Plan, step: int) -> checkpoints.State:
    return checkpoints.State(
        step=step,
        rows_consumed=rows_consumed(plan, step),
        rows_per_step=plan.rows_per_step,
        digest=dataset.digest,
        seed=plan.seed,
    )


def _train(
    config: RunConfig,
    dataset: Dataset,
    plan: Plan,
    model: Any,
    stop: StopRequest,
    start: Path | None,
    step: int,
) -> None:
    checkpoints.copy_files(dataset.tokenizer_dir, config.output / "tokenizer")
    with ExitStack() as stack:
        metrics = MetricsFile(config.output, step)
        stack.callback(metrics.close)
        reporter = Reporter(plan.total_steps, step)
        stack.callback(reporter.close)
        batches = Prefetched(partial(train_batches, dataset.train, plan, step))
        stack.callback(batches.close)
        save = partial(_save, config, dataset, plan, model)
        callback = StepCallback(Run(config, dataset, plan, metrics, reporter, stop, save))
        trainer = _trainer(config, plan, callback, step)
        module = TrainModule(
            model,
            clm,
            partial(build_optimizer, config=config.optim),
            partial(build_scheduler, config=config.optim, total=plan.total_steps),
            head=_find_head(model),
            seed=plan.seed,
            num_sources=len(dataset.sources),
            attention=config.attention,
            deterministic=config.train.deterministic,
        )
        trainer.fit(module, batches, ckpt_path=start and start / checkpoints.WEIGHTS, weights_only=True)


def _save(config: RunConfig, dataset: Dataset, plan: Plan, model: Any, trainer: pl.Trainer, step: int) -> None:
    generation = model.generation_config
    checkpoints.save_checkpoint(
        config.output,
        _state(dataset, plan, step),
        {
            checkpoints.RUN_CONFIG: config.model_dump(mode="json"),
            checkpoints.MODEL_CONFIG: model.config.to_dict(),
            "generation_config.json": generation.to_dict() if generation else {},
        },
        trainer.save_checkpoint,
    )
    checkpoints.prune(config.output, config.save.keep)


def _trainer(config: RunConfig, plan: Plan, callback: StepCallback, step: int) -> pl.Trainer:
    loggers = []
    if "tensorboard" in config.log:
        # purge_step hides what a killed run wrote beyond the checkpoint that this one starts from
        loggers.append(TensorBoardLogger(config.output, name="tensorboard", version="", purge_step=step + 1))
    return pl.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=1,
        plugins=[LightningEnvironment(), checkpoints.WeightsFile()],  # one process, whatever scheduler started it
        precision="bf16-mixed" if _uses_bf16(config) else "32-true",
        deterministic=config.train.deterministic,
        max_steps=plan.total_steps,
        max_epochs=-1,
        accumulate_grad_batches=plan.accumulation,
        callbacks=[callback],
        logger=loggers or False,
        default_root_dir=config.output,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _uses_bf16(config: RunConfig) -> bool:
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bf16" or (config.precision == "auto" and has_bf16)


def _describe(config: RunConfig, dataset: Dataset, plan: Plan, model: Any, step: int) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held_out = 0 if dataset.validation is None else dataset.validation.num_rows
    precision = "bf16 with fp32 weights" if _uses_bf16(config) else "fp32"
    tokens, epochs = plan.rows_per_step * plan.length, plan.total_rows / plan.num_rows
    data = f"{plan.num_rows:,} rows of {plan.length:,} tokens, {held_out:,} held out, digest {dataset.digest[:16]}"
    micro = f"in {plan.accumulation} micro-batches of at most {plan.micro_rows} rows"
    lines = [
        f"model     {model.config.model_type}, {parameters:,} parameters, {precision}",
        f"data      {dataset.path}: {data}",
        f"step      {plan.rows_per_step} rows = {tokens:,} tokens, {micro}",
        f"run       {plan.total_steps:,} steps, {plan.total_rows:,} rows = {epochs:.2f} epochs",
    ]
    if step == plan.total_steps:
        lines.append("finished  already; --force starts over")
    elif step:
        lines.append(f"resuming  after step {step:,}, {rows_consumed(plan, step):,} rows")
    return "\n".join(lines)


def _result(config: RunConfig, plan: Plan, resumed_from: int | None) -> FitResult:
    records = read_metrics(config.output)
    loss = next((record["loss"] for record in reversed(records) if "loss" in record), None)
    evaluation = next((record["eval"] for record in reversed(records) if "eval" in record), None)
    newest = checkpoints.newest_checkpoint(config.output)
    return FitResult(
        output=str(config.output),
        checkpoint=str(newest),
        steps=plan.total_steps,
        tokens=plan.total_rows * plan.length,
        loss=loss,
        eval_loss=evaluation["loss"] if evaluation else None,
        resumed_from=resumed_from,
    )


def _last_step(run_dir: Path) -> int:
    newest = checkpoints.newest_checkpoint(run_dir)
    return checkpoints.read_state(newest).step if newest else 0


def _remove_run(run_dir: Path) -> None:
    """Remove what a run writes, by name: the folder may hold other things."""
    for name in _FOLDERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)
    (run_dir / METRICS).unlink(missing_ok=True)


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Keep a second run out of the same folder; the system lets go of the lock when the process ends, however."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"output: {run_dir} is no folder; wanted a folder for this run") from None
    foreign = [name for name in _FOLDERS if (run_dir / name).exists()]
    if foreign and not any((run_dir / name).exists() for name in (_LOCK, METRICS)):
        raise ConfigError(f"output: {run_dir} holds {' and '.join(foreign)} of something else; choose another folder")
    with (run_dir / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output: another run is writing {run_dir}; stop it or choose another output") from None
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  stdout is for results
