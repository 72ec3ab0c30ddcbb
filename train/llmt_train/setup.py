"""Everything that a run is made of, checked before its first step: data, arithmetic, model, task."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmt_shared.dataset import Dataset, open_dataset
from llmt_shared.errors import ConfigError
from llmt_shared.objects import Location
from llmt_shared.progress import say
from llmt_train.attention import Machine, machine_of
from llmt_train.check.preflight import Preflight, adapt_skeleton, check_attention, compare_tokens, raise_problems
from llmt_train.check.topology import check_rows, layout_checks, named
from llmt_train.config import FromConfig, FromSynthetic, RunConfig
from llmt_train.data.batch import PackedBatch, shard_tokens
from llmt_train.data.rows import AnyDataset, AnySplit
from llmt_train.data.stream import NO_PAIRING, Pairing, Plan, plan_run, rows_consumed
from llmt_train.data.synthetic import open_synthetic
from llmt_train.model.adapt import choose_execution
from llmt_train.model.head import HeadSpec
from llmt_train.model.load import load_skeleton, vocab_size
from llmt_train.model.match import check_max_id, check_tokenizers, read_token_ids
from llmt_train.model.positions import check_positions
from llmt_train.parallel.layout import ONE_RANK, Layout
from llmt_train.parallel.mesh import Mesh, open_mesh
from llmt_train.policy import (
    Logps,
    adapterless_reference,
    device,
    dtype_of,
    model_name,
    open_policy,
    open_reference,
    spec_of,
    split_of,
    uses_bf16,
)
from llmt_train.reference import Identity, open_overlay
from llmt_train.schedule import check_schedule
from llmt_train.tasks import KINDS, Task, build_task


@dataclass(frozen=True)
class Setup:
    """A run that could begin."""

    config: RunConfig
    mesh: Mesh
    dataset: AnyDataset
    plan: Plan
    model: Any
    """On its device, in training mode, as it is before the first step."""
    base: str | None
    """Fingerprint of the weights that it began with, where they are not all in its checkpoints."""
    head: HeadSpec | None
    """How it makes its logits, where that is known."""
    task: Task
    pairing: dict[str, Pairing]
    """By split: what preference data is read with."""

    def own_tokens(self, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        """Cut micro-batches down to the tokens that this rank has of them."""
        return map(partial(shard_tokens, split=split_of(self.config, self.mesh)), batches)

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def splits(self) -> dict[str, AnySplit]:
        """Those that the dataset has."""
        return splits_of(self.dataset)


def set_up(config: RunConfig) -> Setup:
    """Open, load and check everything, in a process group; cheap checks first.

    Raises:
        ConfigError: something does not fit together.
        FormatError: the dataset, or what `llmt-train ref` wrote, is damaged.
        DataError: there is nothing to train on.
    """
    mesh = open_mesh(config.parallel)
    dataset, plan = open_data(config, mesh.layout)
    model, base, head = open_policy(config, dataset, mesh)
    reference = None
    if config.task == "dpo" and config.dpo.reference == "model":
        has_adapters = config.lora is not None
        reference = (
            adapterless_reference(model, head, config) if has_adapters else open_reference(config, dataset, mesh)[0]
        )
    task, pairing = open_task(config, dataset, base, reference)
    choose_execution(model, config)
    if config.lora is not None and not isinstance(config.model, str):
        say("note: adapters of a model with drawn weights cannot be exported: good for trials alone")
    return Setup(config, mesh, dataset, plan, model, base, head, task, pairing)


def open_data(config: RunConfig, layout: Layout = ONE_RANK) -> tuple[AnyDataset, Plan]:
    """Check what needs no weights; return the dataset and the plan of the run over its rows."""
    found = preflight(config, machine_of(torch.device(device())), layout)
    raise_problems(found.problems)
    assert found.dataset is not None  # they are missing only where there is a problem
    assert found.plan is not None
    return found.dataset, found.plan


def preflight(config: RunConfig, machine: Machine, layout: Layout = ONE_RANK) -> Preflight:
    """Run every check that needs no weights: all of them, so that one problem does not hide another.

    Args:
        config: the run.
        machine: where it is to run.
        layout: of its processes.
    """
    found = Preflight()
    found.dataset = dataset = found.attempt(partial(_rows, config, config.model))
    if dataset is not None:
        found.attempt(partial(_check_kind, config, dataset))
        found.attempt(partial(_check_held_out, config, dataset))
        found.attempt(partial(check_rows, config.parallel, dataset.train.length))
        found.plan = plan = found.attempt(partial(plan_run, dataset.train, config.batch, config.train, layout.dp))
        if plan is not None:
            tokens_per_step = plan.rows_per_step * plan.length
            found.attempt(partial(check_schedule, config.optim, plan.total_steps, tokens_per_step))
    found.skeleton = found.attempt(partial(load_skeleton, spec_of(config, dataset), dtype=dtype_of(config)))
    if found.skeleton is not None:
        if dataset is not None:
            _check_match(found, config, dataset)
        adapt_skeleton(found, config, machine)
        found.calls = found.attempt(partial(check_attention, found.skeleton, config, machine))
        for check in layout_checks(found.skeleton, config, found.calls):
            found.attempt(check)
    return found


def open_skeleton(config: RunConfig, dataset: AnyDataset, machine: Machine) -> Any:
    """Return the model as it would train, without weights, as far as its config can be served."""
    skeleton = load_skeleton(spec_of(config, dataset), dtype=dtype_of(config))
    _resize(skeleton, config, dataset.tokenizer.max_id)
    adapt_skeleton(Preflight(skeleton=skeleton), config, machine)
    return skeleton


def _resize(skeleton: Any, config: RunConfig, max_id: int) -> None:
    if config.train.resize_embeddings and skeleton.get_input_embeddings().weight.shape[0] <= max_id:
        skeleton.resize_token_embeddings(max_id + 1, mean_resizing=False)


def _check_match(found: Preflight, config: RunConfig, dataset: AnyDataset) -> None:
    """Compare tokens, ids and positions of the dataset with the model's."""
    skeleton, place = found.skeleton, model_name(config)
    if isinstance(config.model, str):
        found.compared = found.attempt(partial(compare_tokens, config.model, dataset))
    _resize(skeleton, config, dataset.tokenizer.max_id)
    for check in (_check_ids, _check_lengths):
        found.attempt(partial(check, skeleton, dataset, place))


def open_rows(config: RunConfig, model: str | FromConfig | None = None) -> AnyDataset:
    """Open the dataset, or make up the rows that stand for one, of the kind that the task trains on.

    Args:
        config: the run.
        model: whose vocabulary made-up rows have, if not the run's.
    """
    dataset = _rows(config, model or config.model)
    _check_kind(config, dataset)
    return dataset


def _rows(config: RunConfig, model: str | FromConfig) -> AnyDataset:
    if not isinstance(config.data, FromSynthetic):
        return _stored_rows(config, config.data)
    settings = config.data.synthetic
    spec = model if isinstance(model, str) else model.model_dump()
    return open_synthetic(settings, KINDS[config.task], settings.vocab_size or vocab_size(spec))


def _stored_rows(config: RunConfig, data: Location) -> Dataset:
    if isinstance(data, Path):
        return open_dataset(data)
    from llmt_train.cache.open import open_cached  # data on a disk needs none of it

    return open_cached(data, config.cache, config.train.shuffle_shards)


def _check_kind(config: RunConfig, dataset: AnyDataset) -> None:
    kind, wanted = dataset.kind, KINDS[config.task]
    if kind != wanted:
        fitting = " or ".join(f"`task: {task}`" for task, each in KINDS.items() if each == kind)
        raise ConfigError(f"task: {config.task}, but {config.data} is of kind {kind}; set {fitting}")


def _check_held_out(config: RunConfig, dataset: AnyDataset) -> None:
    if config.save.keep_best and dataset.validation is None:
        raise ConfigError(
            f"save.keep_best: {dataset.path} holds nothing out, so no checkpoint is known to be better; remove it, or "
            "hold rows out"
        )


def check_tokenizer(dataset: AnyDataset, ids: Mapping[str, int] | None, place: str) -> None:
    """Refuse a dataset that was packed with another tokenizer than the model's, where both have one.

    Args:
        dataset: the dataset.
        ids: token -> id of the model's.
        place: where those are from, for the message.
    """
    if ids is not None and dataset.tokenizer_dir is not None:
        check_tokenizers(read_token_ids(dataset.tokenizer_dir / "tokenizer.json"), ids, place)


def check_fits(model: Any, dataset: AnyDataset, place: str) -> None:
    """Refuse token ids that a model has no embedding for, and segments that it has no positions for."""
    _check_ids(model, dataset, place)
    _check_lengths(model, dataset, place)


def _check_ids(model: Any, dataset: AnyDataset, place: str) -> None:
    check_max_id(dataset.tokenizer.max_id, model.get_input_embeddings().weight.shape[0], place)


def _check_lengths(model: Any, dataset: AnyDataset, place: str) -> None:
    for split in splits_of(dataset).values():
        check_positions(model.config, split, place)


def reads_overlay(config: RunConfig) -> bool:
    """Return whether the reference is what `llmt-train ref` wrote."""
    return config.task == "dpo" and config.dpo.reference == "precomputed"


def open_task(
    config: RunConfig, dataset: AnyDataset, base: str | None, reference: Logps | None
) -> tuple[Task, dict[str, Pairing]]:
    """Return the run's task, and what each split is read with.

    Args:
        config: the run.
        dataset: its rows.
        base: fingerprint of the weights that it begins with, for a precomputed reference.
        reference: a live one, where the run has it.
    """
    pairing = dict.fromkeys(splits_of(dataset), NO_PAIRING)
    if config.task == "orpo":
        pairing = dict.fromkeys(pairing, Pairing(with_chosen_prompts=config.orpo.nll_on == "all"))
    if reads_overlay(config):
        assert base is not None  # `set_up` looked
        assert isinstance(dataset, Dataset)  # the config refuses synthetic rows here
        lookups = open_overlay(dataset, identity(config, dataset, base))
        pairing = {name: Pairing(reference=lookup) for name, lookup in lookups.items()}
    return build_task(config, reference), pairing


def identity(config: RunConfig, dataset: Dataset, weights: str) -> Identity:
    """Return what reference log-probs of this run are of; ``weights`` is the `fingerprint` of `open_model`'s."""
    return Identity(
        digest=dataset.digest,
        weights=weights,
        model=model_name(config),
        precision="bf16" if uses_bf16(config) else "fp32" if config.precision == "auto" else config.precision,
        attention=config.attention,
    )


def splits_of(dataset: AnyDataset) -> dict[str, AnySplit]:
    """Return a dataset's splits by name."""
    held_out = {} if dataset.validation is None else {"validation": dataset.validation}
    return {"train": dataset.train} | held_out


def describe(setup: Setup, step: int) -> str:
    """Return what a person wants to see before the first step.

    Args:
        setup: the run.
        step: steps that are done already.
    """
    config, dataset, plan = setup.config, setup.dataset, setup.plan
    parameters = sum(parameter.numel() for parameter in setup.model.parameters())
    trained = sum(parameter.numel() for parameter in setup.model.parameters() if parameter.requires_grad)
    partly = "" if trained == parameters else f" ({trained:,} of them train)"
    held_out = 0 if dataset.validation is None else dataset.validation.num_rows
    precision = "bf16 with fp32 weights" if uses_bf16(config) else str(next(setup.model.parameters()).dtype)[6:]
    tokens, epochs = plan.rows_per_step * plan.length, plan.total_rows / plan.num_rows
    data = f"{plan.num_rows:,} rows of {plan.length:,} tokens, {held_out:,} held out, digest {dataset.digest[:16]}"
    micro_batches = "1 micro-batch" if plan.accumulation == 1 else f"{plan.accumulation} micro-batches"
    micro = f"in {micro_batches} of at most {plan.micro_rows} row{'s' if plan.micro_rows > 1 else ''}"
    lines = [
        f"model     {setup.model.config.model_type}, {parameters:,} parameters{partly}, {precision}",
        f"data      {dataset.path}: {data}",
        f"step      {plan.rows_per_step} rows = {tokens:,} tokens, {micro}",
        f"run       {plan.total_steps:,} steps, {plan.total_rows:,} rows = {epochs:.2f} epochs",
    ]
    layout = setup.mesh.layout
    if layout.world > 1:
        lines.insert(0, f"devices   {named(layout, sp=config.parallel.sp)}")
    if step == plan.total_steps:
        lines.append("finished  already; --force starts over")
    elif step:
        lines.append(f"resuming  after step {step:,}, {rows_consumed(plan, step):,} rows")
    return "\n".join(lines)
