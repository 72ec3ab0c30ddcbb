"""`llmt-train check`: would a run begin, and what would it need? Nothing is spent to find out: no weights, no GPU."""

from dataclasses import dataclass, field
from functools import partial

import torch

from llmt_shared.dataset import Dataset
from llmt_shared.errors import ConfigError, LlmtError
from llmt_train.attention import Machine, choose
from llmt_train.check.devices import Device, named_device, this_device
from llmt_train.check.estimate import Memory, estimate_memory, gigabytes
from llmt_train.check.preflight import Begun, Preflight, check_resumption, mixes_precisions
from llmt_train.check.remedies import Change, remedies
from llmt_train.check.topology import notes, num_processes, processes_of_machine
from llmt_train.checkpoints import newest_checkpoint, read_state
from llmt_train.config import RunConfig
from llmt_train.data.rows import AnyDataset
from llmt_train.data.stream import Plan, rows_of_step
from llmt_train.model.flops import model_flops, step_flops
from llmt_train.parallel.layout import Layout, layout_of
from llmt_train.quiet import quiet_transformers
from llmt_train.reference import check_overlay
from llmt_train.schedule import falling_steps, resolve
from llmt_train.setup import open_skeleton, preflight

_AGAIN = {"none": 0.0, "selective": 1 / 6, "attention": 1 / 3, "full": 1 / 3}
"""Share of a step's arithmetic that is done again, by the policy of checkpointing: half of the forward pass's matrix
products, or all; the forward pass is a third of a step."""
_SAMPLE = 1024
"""Rows whose segments are looked at."""


@dataclass(frozen=True)
class DataReport:
    """What the run trains on."""

    path: str
    kind: str
    rows: int
    length: int
    """Tokens of a row."""
    held_out: int
    """Rows of the validation split."""
    digest: str
    fill: float
    """Share of the tokens of the first rows, at most 1,024, that are no padding."""
    max_id: int
    """Largest token id of the tokenizer."""
    common_tokens: int | None
    """Tokens that the dataset's tokenizer and the model's have in common, all with equal ids; ``None`` where the model
    brings no tokenizer, or another one."""


@dataclass(frozen=True)
class ModelReport:
    """What is trained."""

    model_type: str
    parameters: int
    trained: int
    embeddings: int
    """Rows of the token embedding."""
    precision: str
    attention: str
    """Backend; as the config says where the device is elsewhere."""


@dataclass(frozen=True)
class RunReport:
    """The arithmetic of the run."""

    steps: int
    rows: int
    """That the run consumes, repeats counted."""
    epochs: float
    rows_per_step: int
    tokens_per_step: int
    micro_batches: int
    """Of a step: what each device accumulates."""
    micro_rows: int
    """Rows of a micro-batch, at most; devices of cp and tp have it together."""
    rows_at_once: int
    """Rows of the micro-batches of all devices, at most."""
    device_tokens: int
    """Of a micro-batch, at most, that a device carries through the layers."""
    rows_of_last_step: int
    schedule: str
    warmup_steps: int
    decay_steps: int
    """Last steps, over which the learning rate falls; 0 where it stays."""


@dataclass(frozen=True)
class TimeReport:
    """How long the run takes, if the devices reach their assumed utilisation and never wait for each other."""

    flops_per_step: float
    seconds_per_step: float | None
    seconds: float | None
    """Of all steps; evaluations, checkpoints and communication are not counted."""


@dataclass
class Report:
    """What is known of a run; ``None`` where a problem is in the way."""

    device: Device
    """One of those that train."""
    sp: bool
    """Whether devices of tp share what lies between the layers too, by tokens."""
    layout: Layout | None = None
    """Of all devices."""
    data: DataReport | None = None
    model: ModelReport | None = None
    run: RunReport | None = None
    resumes_after: int | None = None
    """Steps that a checkpoint in the run's output holds; ``None`` without one."""
    memory: Memory | None = None
    why_no_memory: str | None = None
    """What kept the dry run from counting it, where that is no problem of the run."""
    remedies: list[Change] = field(default_factory=list)
    """Changes after which the run would fit into the device's memory, where it does not."""
    time: TimeReport | None = None
    notes: list[str] = field(default_factory=list)
    """What a person should know that is no problem."""
    problems: list[LlmtError] = field(default_factory=list)


def check(config: RunConfig, on: str | None = None, devices: int | None = None) -> Report:
    """Run all checks that need no weights, and estimate memory and time.

    Args:
        config: the run.
        on: name of the GPU that is to train it; ``None`` is this machine.
        devices: how many of them; ``None`` is what the config or the launcher says, else those that are here.

    Raises:
        ConfigError: no GPU of that name is known.
    """
    parallel, in_bf16 = config.parallel, partial(_computes_in_bf16, config)
    world = num_processes(parallel, on=on, devices=devices)
    device = this_device(in_bf16, processes_of_machine(world)) if on is None else named_device(on, in_bf16)
    report = Report(device, parallel.sp and parallel.tp > 1)
    given, config = config, _with_precision(config, device.machine)
    with quiet_transformers():
        arranged = Preflight()
        report.layout = arranged.attempt(partial(layout_of, parallel, world))
        found = preflight(config, device.machine, report.layout or Layout(cp=parallel.cp, tp=parallel.tp))
        found.problems = arranged.problems + found.problems
        _describe(report, found, config, given)
        report.problems = found.problems
        _estimate(report, found, config)
    return report


def _describe(report: Report, found: Preflight, config: RunConfig, given: RunConfig) -> None:
    if found.dataset is not None:
        report.data = _describe_data(found.dataset, found.compared)
        if isinstance(found.dataset, Dataset) and config.task == "dpo" and config.dpo.reference == "precomputed":
            found.attempt(partial(check_overlay, found.dataset))
    if found.plan is not None and report.layout is not None:
        report.run = _describe_run(found.plan, config, report.layout)
        report.resumes_after = found.attempt(partial(_resumes_after, found, given))
    if found.skeleton is not None:
        report.model = _describe_model(found, config, report.device)
        if report.layout is not None and report.run is not None:
            report.notes = list(notes(found.skeleton, report.layout, report.run.rows_per_step))


def _resumes_after(found: Preflight, config: RunConfig) -> int | None:
    newest = newest_checkpoint(config.output)
    if newest is None or found.dataset is None or found.plan is None or found.skeleton is None:
        return None
    # Whether the weights are those that the run began with, only reading them tells.
    begun = Begun(found.plan, found.dataset.digest, read_state(newest).base)
    return check_resumption(newest, begun, config, found.skeleton.config.to_dict())


def _estimate(report: Report, found: Preflight, config: RunConfig) -> None:
    if found.dataset is None or found.plan is None or found.skeleton is None or report.layout is None:
        return
    report.time = _describe_time(found, config, report.device, report.layout)
    needs = partial(_needs, found.dataset, report.device.machine, report.layout.world)
    try:
        report.memory = needs(config)
    except Exception as error:  # what a model does may depend on numbers, which a dry run has not
        if not report.problems:  # else they are why
            report.why_no_memory = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return
    limit = report.device.room
    if limit is not None and report.memory.total > limit:
        on_gpu = report.device.machine.device_type == "cuda"
        report.remedies = remedies(config, report.memory, needs, limit, report.layout if on_gpu else None)
        report.problems.append(_does_not_fit(report, limit))


def _needs(dataset: AnyDataset, machine: Machine, world: int, config: RunConfig) -> Memory:
    """What a run needs of each device; of as many as its config says, if it does."""
    parallel = config.parallel
    wanted = world if parallel.dp == "auto" else parallel.dp * parallel.cp * parallel.tp
    return estimate_memory(
        open_skeleton(config, dataset, machine),
        config,
        dataset.train,
        device_type=machine.device_type,
        compute=torch.bfloat16 if config.precision == "bf16" else None,
        layout=layout_of(parallel, wanted),
    )


def _does_not_fit(report: Report, limit: float) -> ConfigError:
    assert report.memory is not None  # the caller looked
    changes = "; ".join(f"{change.setting} ({gigabytes(change.total)})" for change in report.remedies)
    way_out = f"would fit: {changes}" if changes else "a smaller model, `lora`, or a device with more memory would help"
    each = " each" if report.layout is not None and report.layout.world > 1 else ""
    return ConfigError(
        f"memory: the run needs {gigabytes(report.memory.total)}, but {report.device.name} has {gigabytes(limit)} for "
        f"it{each}; {way_out}"
    )


def _with_precision(config: RunConfig, machine: Machine) -> RunConfig:
    """Say what ``precision: auto`` is on a machine."""
    if config.precision != "auto":
        return config
    return config.model_copy(update={"precision": "bf16" if mixes_precisions(config, machine) else "fp32"})


def _computes_in_bf16(config: RunConfig, machine: Machine) -> bool:
    return config.precision == "bf16-true" or mixes_precisions(config, machine)


def _describe_data(dataset: AnyDataset, common_tokens: int | None) -> DataReport:
    split = dataset.train
    looked_at = range(min(split.num_rows, _SAMPLE))
    return DataReport(
        path=str(dataset.path),
        kind=dataset.kind,
        rows=split.num_rows,
        length=split.length,
        held_out=0 if dataset.validation is None else dataset.validation.num_rows,
        digest=dataset.digest,
        fill=int(split.segments(looked_at).length.sum()) / max(1, len(looked_at) * split.length),
        max_id=dataset.tokenizer.max_id,
        common_tokens=common_tokens,
    )


def _describe_model(found: Preflight, config: RunConfig, device: Device) -> ModelReport:
    skeleton = found.skeleton
    assert skeleton is not None  # the caller looked
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in skeleton.parameters()]
    attention: str = config.attention
    if found.calls and device.is_here:
        call = found.calls[0]._replace(deterministic=config.train.deterministic)
        attention = choose(attention, call, device.machine)
    return ModelReport(
        model_type=skeleton.config.model_type,
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, trains in sizes if trains),
        embeddings=skeleton.get_input_embeddings().weight.shape[0],
        precision={"bf16": "bf16 with fp32 weights", "bf16-true": "bf16"}.get(config.precision, "fp32"),
        attention=attention,
    )


def _describe_run(plan: Plan, config: RunConfig, layout: Layout) -> RunReport:
    tokens_per_step = plan.rows_per_step * plan.length
    return RunReport(
        steps=plan.total_steps,
        rows=plan.total_rows,
        epochs=plan.total_rows / plan.num_rows,
        rows_per_step=plan.rows_per_step,
        tokens_per_step=tokens_per_step,
        micro_batches=plan.accumulation,
        micro_rows=plan.micro_rows,
        rows_at_once=min(plan.micro_rows * layout.dp, plan.rows_per_step),
        device_tokens=plan.micro_rows * plan.length // layout.cp,
        rows_of_last_step=plan.total_rows - (plan.total_steps - 1) * plan.rows_per_step,
        schedule=config.optim.schedule,
        warmup_steps=resolve(config.optim.warmup, plan.total_steps, tokens_per_step),
        decay_steps=max(0, falling_steps(config.optim, plan.total_steps, tokens_per_step)),
    )


def _describe_time(found: Preflight, config: RunConfig, device: Device, layout: Layout) -> TimeReport:
    assert found.plan is not None
    assert found.dataset is not None  # the caller looked
    rows, plan = rows_of_step(found.plan, 0), found.plan
    flops = step_flops(model_flops(found.skeleton), found.dataset.train.segments(rows[:_SAMPLE]).length)
    flops *= plan.rows_per_step / len(rows[:_SAMPLE])
    if device.flops is None:
        return TimeReport(flops, None, None)
    checkpointing = config.train.checkpointing
    again = 1 + _AGAIN[checkpointing.policy] / checkpointing.every
    seconds = flops * again / (device.flops * device.utilisation * layout.world)
    return TimeReport(flops, seconds, seconds * plan.total_rows / plan.rows_per_step)
