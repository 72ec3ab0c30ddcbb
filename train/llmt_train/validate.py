"""`llmt-train validate`: a checkpoint's scores on a split of its own dataset or of another one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmt_shared.config import load_config
from llmt_shared.errors import ConfigError
from llmt_shared.progress import stage
from llmt_train import checkpoints
from llmt_train.config import BatchConfig, FromConfig, RunConfig, TrainConfig
from llmt_train.data.rows import AnyDataset
from llmt_train.data.stream import Pairing, Plan, plan_run
from llmt_train.evaluation import Record, evaluate
from llmt_train.fit import build_module
from llmt_train.model.adapters import is_adapter
from llmt_train.model.match import read_token_ids
from llmt_train.parallel.mesh import Mesh, open_mesh
from llmt_train.parallel.process import joined
from llmt_train.policy import (
    Logps,
    adapterless_reference,
    device,
    lay_out,
    model_name,
    on_one_device,
    open_reference,
)
from llmt_train.quiet import quiet_transformers
from llmt_train.setup import Setup, check_fits, check_tokenizer, open_rows, open_task, splits_of
from llmt_train.tasks import Task
from llmt_train.trained import load_checkpoint_model


@dataclass(frozen=True)
class ValidateResult:
    """What a checkpoint scored."""

    checkpoint: str
    step: int
    """Optimizer steps that it had trained for."""
    data: str
    digest: str
    """The dataset's."""
    split: str
    rows: int
    eval: Record
    """As in metrics.jsonl."""


def validate(source: Path, overrides: Sequence[str] = (), *, split: str = "validation") -> ValidateResult:
    """Evaluate a checkpoint on a split, in the way that its run did.

    Args:
        source: a run's output folder (its newest checkpoint) or a checkpoint.
        overrides: ``key.sub=value`` that win over the run's config, such as ``data=other/dataset``.
        split: of the dataset.

    Raises:
        ConfigError: no such split; the dataset is of another kind or tokenizer; something else does not fit together.
        FormatError: the checkpoint or the dataset is damaged, or not there.
        DataError: there is nothing to measure.
    """
    checkpoint = checkpoints.find_checkpoint(source)
    config = on_one_device(load_config(checkpoint / checkpoints.RUN_CONFIG, RunConfig, overrides))
    with quiet_transformers(), joined(config.parallel):
        setup = _set_up(checkpoint, config, split)
        rows, module = setup.splits[split], build_module(setup)
        with stage(f"{split} rows", rows.num_rows) as advance:
            result = evaluate(module, setup, split, advance)
    step, data = checkpoints.read_state(checkpoint).step, str(setup.dataset.path)
    return ValidateResult(str(checkpoint), step, data, setup.dataset.digest, split, rows.num_rows, result)


def table(result: ValidateResult) -> str:
    """Return the scores as aligned columns: a line for the total and one for each source."""
    lines = [("total", result.eval), *result.eval["sources"].items()]
    names = [name for name in result.eval if name != "sources"]
    cells = [["", *names], *([label, *(_cell(line.get(name)) for name in names)] for label, line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    title = f"{result.checkpoint} on {result.data}, {result.split}: {result.rows:,} rows"
    return "\n".join([title, *(_line(row, widths) for row in cells)])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    label, *numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return "  ".join([label.strip().ljust(widths[0]), *numbers])


def _set_up(checkpoint: Path, config: RunConfig, split: str) -> Setup:
    """What `setup.set_up` does, with the checkpoint's weights."""
    mesh = open_mesh(config.parallel)
    dataset = open_rows(config, str(checkpoint))
    plan = _plan(dataset, split, config.batch)
    tokenizer = checkpoint.parent.parent / "tokenizer"
    ids = read_token_ids(tokenizer / "tokenizer.json") if (tokenizer / "tokenizer.json").is_file() else None
    check_tokenizer(dataset, ids, str(tokenizer))
    model = _load(checkpoint, config)
    check_fits(model, dataset, str(checkpoint))
    head = lay_out(model, config, mesh)
    task, pairing = _open_task(checkpoint, config, dataset, partial(adapterless_reference, model, head), mesh)
    return Setup(config, mesh, dataset, plan, model, None, head, task, pairing)


def _load(checkpoint: Path, config: RunConfig) -> Any:
    """The checkpoint's model, in the precision that it trains in."""
    model = load_checkpoint_model(checkpoint).to(device())
    if config.precision == "bf16-true":
        for name, parameter in model.named_parameters():  # no buffers: rotary frequencies are fp32 in training too
            if not is_adapter(name):
                parameter.data = parameter.data.bfloat16()
    return model


def _plan(dataset: AnyDataset, name: str, batch: BatchConfig) -> Plan:
    """One pass over a split, in micro-batches of as many rows as the run's: others are rounded in other ways."""
    split = splits_of(dataset).get(name)
    if split is None:
        raise ConfigError(f"{dataset.path}: no split {name!r}; wanted one of: {', '.join(splits_of(dataset))}")
    tokens = max(1, batch.tokens // split.length) * split.length
    return plan_run(split, batch.model_copy(update={"tokens": tokens}), TrainConfig(epochs=1))


def _open_task(
    checkpoint: Path,
    config: RunConfig,
    dataset: AnyDataset,
    adapterless: Callable[[RunConfig], Logps],
    mesh: Mesh,
) -> tuple[Task, dict[str, Pairing]]:
    """The run's task; a reference is of the weights that the run began with."""
    state = checkpoints.read_state(checkpoint)
    reference = config.dpo.reference if config.task == "dpo" else "none"
    if config.lora is not None and reference == "model":
        return open_task(config, dataset, state.base, adapterless(config))
    # Of a precomputed reference only the fingerprint of its weights matters.
    if reference == "none" or (reference == "precomputed" and state.base is not None):
        return open_task(config, dataset, state.base, None)
    is_drawn = isinstance(config.model, FromConfig) or config.train.resize_embeddings
    if is_drawn and dataset.digest != state.digest:
        raise ConfigError(
            f"{checkpoint}: its reference was drawn for the vocabulary of the run's own dataset; wanted that one, or "
            "`dpo.reference=none`"
        )
    live, weigh = open_reference(config, dataset, mesh)
    weights = weigh()
    if state.base not in (None, weights):
        raise ConfigError(
            f"{checkpoint}: its reference had other weights than {model_name(config)} has now, or another precision; "
            "wanted those that the run began with, or `dpo.reference=none`"
        )
    return open_task(config, dataset, weights, live if reference == "model" else None)
