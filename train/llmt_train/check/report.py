"""What `llmt-train check` found, as a person reads it and as a script does."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from llmt_train.check.check import DataReport, ModelReport, Report, RunReport
from llmt_train.check.estimate import Memory, gigabytes
from llmt_train.check.topology import named
from llmt_train.parallel.layout import Layout

_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "reference": "reference model",
    "activations": "activations",
    "exchanged": "whole layers",
    "head": "logits",
    "working": "working",
}


def as_text(report: Report) -> str:
    """Return an aligned report; what a problem is in the way of is left out."""
    lines = list(_lines(report))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in lines)


def as_data(report: Report) -> dict[str, Any]:
    """Return the report as plain data."""
    data = dataclasses.asdict(report)
    data["problems"] = [str(problem) for problem in report.problems]
    data["device"] = {
        "name": report.device.name,
        "memory": report.device.memory,
        "room": report.device.room,
        "flops": report.device.flops,
    }
    data["layout"] = None if report.layout is None else _layout(report.layout)
    data["remedies"] = [change._asdict() for change in report.remedies]
    if report.memory is not None:
        data["memory"] |= {"total": report.memory.total}
    return data


def _layout(layout: Layout) -> dict[str, int]:
    return {"devices": layout.world, "dp": layout.dp} | layout._asdict()


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    yield "config", "ok"
    several = report.layout is not None and report.layout.world > 1
    if report.layout is not None and several:
        yield "devices", f"{named(report.layout, sp=report.sp)}, each {report.device.name}"
    if report.data is not None:
        yield "data", _data(report.data)
    if report.data is not None and report.model is not None:
        yield "tokens", _tokens(report.data, report.model)
    if report.model is not None:
        yield "model", _model(report.model)
    if report.run is not None:
        yield "step", _step(report.run, several)
        resumes = f"; resumes after step {report.resumes_after:,}" if report.resumes_after is not None else ""
        yield "run", _run(report.run) + resumes
    if report.memory is not None:
        yield from _memory(report, report.memory)
    if report.why_no_memory is not None:
        yield "memory", f"not known: {report.why_no_memory}"
    if report.time is not None:
        yield "time", _time(report)
    for note in report.notes:
        yield "note", note


def _data(data: DataReport) -> str:
    return (
        f"{data.path}: {data.kind}, {data.rows:,} rows of {data.length:,} tokens, {data.fill:.1%} full, "
        f"{data.held_out:,} held out, digest {data.digest[:16]}"
    )


def _tokens(data: DataReport, model: ModelReport) -> str:
    ids = f"largest id {data.max_id:,} of {model.embeddings:,} embedding rows"
    if data.common_tokens is None:
        return ids
    return f"{data.common_tokens:,} have the same ids in the model's tokenizer; {ids}"


def _model(model: ModelReport) -> str:
    trained = "all" if model.trained == model.parameters else f"{model.trained:,}"
    return (
        f"{model.model_type}, {model.parameters:,} parameters, {trained} of them train, {model.precision}, "
        f"attention {model.attention}"
    )


def _step(run: RunReport, several: bool) -> str:
    size = _number(run.rows_per_step, "row")
    micro = f"{_number(run.micro_batches, 'micro-batch')} of at most {_number(run.rows_at_once, 'row')}"
    if several:
        micro += f" on all devices, {run.device_tokens:,} tokens on each"
    last = (
        "" if run.rows_of_last_step == run.rows_per_step else f"; the last has {_number(run.rows_of_last_step, 'row')}"
    )
    return f"{size} = {run.tokens_per_step:,} tokens, in {micro}{last}"


def _run(run: RunReport) -> str:
    warmup = f"warm-up over {_number(run.warmup_steps, 'step')}" if run.warmup_steps else "no warm-up"
    falling = f", {run.schedule} over the last {run.decay_steps:,}" if run.decay_steps else ", then constant"
    size = f"{_number(run.steps, 'step')}, {_number(run.rows, 'row')} = {run.epochs:.2f} epochs"
    return f"{size}; {warmup}{falling}"


def _number(number: int, word: str) -> str:
    plural = f"{word}es" if word.endswith("ch") else f"{word}s"
    return f"{number:,} {word if number == 1 else plural}"


def _memory(report: Report, memory: Memory) -> Iterator[tuple[str, str]]:
    each = " on each device" if report.layout is not None and report.layout.world > 1 else ""
    yield "memory", f"{gigabytes(memory.total)}{each} at the fullest moment{_verdict(report, memory)}"
    width = len(gigabytes(memory.total))
    for name, label in _MEMORY.items():
        size = getattr(memory, name)
        if size:
            yield f"  {label}", f"{gigabytes(size):>{width}}"
    if memory.host:
        yield "  host", f"{gigabytes(memory.host):>{width}} in the host's memory instead{each and ', for each device'}"


def _verdict(report: Report, memory: Memory) -> str:
    device = report.device
    if device.room is None:
        return ""
    word = "fits into" if memory.total <= device.room else "does not fit into"
    return f"; {word} the {gigabytes(device.room)} that {device.name} has for it"


def _time(report: Report) -> str:
    time, device = report.time, report.device
    assert time is not None  # the caller looked
    arithmetic = f"{time.flops_per_step:.2e} FLOPs per step"
    if time.seconds_per_step is None or time.seconds is None or device.flops is None:
        return f"{arithmetic}; how fast {device.name} is in this precision is not known"
    speed = f"{device.utilisation:.0%} of {device.name}'s {_flops(device.flops)}"
    if report.layout is not None and report.layout.world > 1:
        speed += f" on {report.layout.world} devices, communication not counted"
    return f"{arithmetic}; {_duration(time.seconds_per_step)} each, {_duration(time.seconds)} in all, at {speed}"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s"
