"""The whole of run.yaml."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import ConfigDict, ValidationError

from llmt_shared.config import Count, PositiveInt, StrictModel, UserPath
from llmt_shared.objects import is_url
from llmt_train.config.data import CacheConfig, Data, FromSynthetic
from llmt_train.config.log import Logger, MlflowConfig, SampleConfig, WandbConfig
from llmt_train.config.model import Checkpointing, CheckpointingConfig, LoraConfig, Model, Pattern
from llmt_train.config.objective import ClmConfig, DpoConfig, OrpoConfig
from llmt_train.config.optim import OptimConfig
from llmt_train.config.parallel import ParallelConfig


class BatchConfig(StrictModel):
    """How many rows one optimizer step and one forward pass take."""

    tokens: Annotated[Count, Gt(0)]
    """Tokens of an optimizer step, padding included: a multiple of the dataset's row length."""
    micro_rows: PositiveInt = 1
    """Rows of one forward and backward pass; more use more memory. The step's rows need not divide by it."""


class TrainConfig(StrictModel):
    """How long to train, what trains, and how its memory is kept small."""

    model_config = ConfigDict(allow_inf_nan=False)

    epochs: Annotated[float, Gt(0)] | None = None
    """Passes over the training rows; excludes `steps`."""
    steps: PositiveInt | None = None
    """Optimizer steps; excludes `epochs`."""
    seed: Annotated[int, Ge(0), Lt(1 << 53)] = 42
    """Decides the order of rows, fresh weights and dropout."""
    shuffle_shards: PositiveInt = 16
    """Shards of tokens whose rows are shuffled together, an epoch's shards being permuted before. The order is the same
    wherever the data lies; of data below a URL, the cache must hold so many shards."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits on every run, which are slower. On a CPU they always do."""
    checkpointing: Checkpointing = CheckpointingConfig()
    """Activations that are computed again: none|attention|selective|full, or `{policy: selective, every: 2}`."""
    compile: bool = False
    """Compile every layer by torch.compile: the first step takes minutes, those after it less.
    Dropout is drawn otherwise."""
    liger: bool = False
    """Liger's kernels for norms and MLPs, on a GPU; needs `liger-kernel`."""
    freeze: tuple[Pattern, ...] = ()
    """Regular expressions: parameters whose name one of them is found in do not train."""
    resize_embeddings: bool = False
    """Give the model more embedding rows where the dataset's tokenizer has more tokens than it has rows."""

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[str]:
        """One of the two lengths, and only one; what compiling leaves of checkpointing."""
        if (given.get("epochs") is None) == (given.get("steps") is None):
            found = "neither" if given.get("steps") is None else "both"
            yield f"found {found}; wanted one of `epochs` and `steps`"
        checkpointing = given.get("checkpointing")
        policy = checkpointing.get("policy") if isinstance(checkpointing, Mapping) else checkpointing
        if given.get("compile") and policy == "selective":
            yield (
                "checkpointing: selective cannot see matrix products in compiled layers; wanted attention or full, or "
                "compile: false"
            )


class EvalConfig(StrictModel):
    """When the validation split is evaluated, per source and in total."""

    every: PositiveInt | None = None
    """Steps between evaluations; there is one before the first step and one after the last in any case."""


class SaveConfig(StrictModel):
    """When checkpoints are written, and how many stay."""

    every: PositiveInt = 500
    """Steps between checkpoints; there is one after the last step in any case."""
    keep: PositiveInt = 3
    """Newest checkpoints that stay on disk."""
    keep_best: Annotated[int, Ge(0)] = 0
    """Checkpoints that stay beside them because their held-out loss is lowest; 0 is none."""
    asynchronous: bool = False
    """Write while the training goes on; each process needs memory of the host for a copy of its weights and state."""


_SECTIONS = {
    "clm": (("pretrain", "sft"), ClmConfig()),
    "dpo": (("dpo",), DpoConfig()),
    "orpo": (("orpo",), OrpoConfig()),
}
"""Keys of a run that mean something to some tasks only: these tasks, and the defaults."""


class RunConfig(StrictModel):
    """The whole of run.yaml. Paths are relative to the working directory."""

    task: Literal["pretrain", "sft", "dpo", "orpo"]
    """Loss: next-token prediction on every token of every document (pretrain) or on the targets of chats (sft);
    preference pairs by dpo or orpo. It must fit the dataset's kind."""
    model: Model
    """Hugging Face folder or hub id, or `{from_config: {model_type: ..., ...}}` for fresh weights."""
    data: Data
    """Dataset: the `output` of `llmt-prep pack`, a folder or URL; or `{synthetic: {length: 4096}}` to try out speed
    and memory."""
    cache: CacheConfig = CacheConfig()
    """Of data below a URL."""
    output: UserPath
    """Folder of this run: checkpoints, metrics.jsonl, run.log, tokenizer. Running again resumes from here."""
    batch: BatchConfig
    train: TrainConfig
    optim: OptimConfig
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the model."""
    clm: ClmConfig = ClmConfig()
    """Of tasks pretrain and sft."""
    dpo: DpoConfig = DpoConfig()
    """Of task dpo."""
    orpo: OrpoConfig = OrpoConfig()
    """Of task orpo."""
    precision: Literal["auto", "bf16", "fp32", "bf16-true"] = "auto"
    """Arithmetic of the model; weights and optimizer state are fp32, but with bf16-true bf16 too (adapters stay
    fp32). auto: bf16 on a GPU that has it."""
    attention: Literal["auto", "flash3", "flash2", "varlen", "flex", "sdpa"] = "auto"
    """Attention kernel; auto is the first of these that serves the model on this machine."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run is laid out over devices; a checkpoint resumes on any other layout."""
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    log: tuple[Logger, ...] = ("jsonl",)
    """metrics.jsonl is written always."""
    wandb: WandbConfig = WandbConfig()
    """Of `log: [wandb]`."""
    mlflow: MlflowConfig = MlflowConfig()
    """Of `log: [mlflow]`."""
    sample: SampleConfig | None = None
    """Texts to write during training."""

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[str]:
        """Settings of another task or logger; what can only be together."""
        yield from _of_other_tasks(given)
        yield from _of_other_loggers(given)
        yield from _between_sections(given)
        data, output = given.get("data"), given.get("output")
        if isinstance(data, str | Path) and isinstance(output, str | Path) and not is_url(str(data)):
            dataset, run = Path(data).resolve(), Path(output).resolve()
            if run == dataset or dataset in run.parents:
                yield f"output {output} lies in the dataset {data}; wanted a folder of its own"


def _of_other_tasks(given: Mapping[str, Any]) -> Iterator[str]:
    task = given.get("task")
    for section, (tasks, default) in _SECTIONS.items():
        others = {name for fitting, _ in _SECTIONS.values() for name in fitting} - set(tasks)
        if _is_set(given, section, default) and task in others:
            yield f"{section}: belongs to task {' and '.join(tasks)}, not to {task}; remove `{section}`"


def _of_other_loggers(given: Mapping[str, Any]) -> Iterator[str]:
    loggers = given.get("log", ())
    for section, default in (("wandb", WandbConfig()), ("mlflow", MlflowConfig())):
        if _is_set(given, section, default) and isinstance(loggers, list | tuple) and section not in loggers:
            yield f"{section}: says how to log to {section}, but `log` does not name it; add it to `log`, or remove it"


def _between_sections(given: Mapping[str, Any]) -> Iterator[str]:
    lora, dpo, save, evaluation = (_section(given, name) for name in ("lora", "dpo", "save", "eval"))
    if given.get("task") == "dpo" and lora.get("train_also") and dpo.get("reference", "model") == "model":
        yield (
            "lora.train_also changes the model that is the reference of `dpo.reference: model`; set `dpo.reference: "
            "precomputed` and run `llmt-train ref`, or remove `lora.train_also`"
        )
    every, best = evaluation.get("every"), save.get("keep_best")
    saved = save.get("every", SaveConfig().every)
    numbers = (saved, 1 if every is None else every)
    is_right = all(isinstance(number, int) and number > 0 for number in numbers)  # else told for itself
    if best and is_right and (every is None or saved % every):
        yield (
            f"save.keep_best needs a held-out loss at every checkpoint, but save.every is {saved} and eval.every "
            f"{every}; wanted an eval.every that divides save.every"
        )
    train, data = _section(given, "train"), given.get("data")
    if isinstance(data, Mapping | FromSynthetic):
        if dpo.get("reference") == "precomputed":
            yield "dpo.reference: precomputed lies beside a dataset, which there is none of; set it to model or none"
        if given.get("sample"):
            yield "sample: synthetic rows have no tokenizer to read texts with; remove `sample`"
    if train.get("freeze") and lora:
        yield "train.freeze has no use with lora, which freezes the whole model; remove it"


def _section(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = given.get(name)
    return value if isinstance(value, Mapping) else dict(value) if isinstance(value, StrictModel) else {}


def _is_set(given: Mapping[str, Any], section: str, default: StrictModel) -> bool:
    """Whether a section says anything; a saved config has every section, with its defaults."""
    try:
        return type(default).model_validate(given.get(section, default)) != default
    except ValidationError:  # told for itself
        return True
