"""Who is told a run's metrics beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow; by Lightning's loggers.

The names are the same for all: ``train/loss``, ``eval/loss``, ``eval_by_source/web``. A resumed run goes on in the same
run of each tool; which one that is stands in loggers.json. A killed run has told the tools more than its checkpoint
holds. TensorBoard is told to hide that. The others cannot take back what they know, so a resumed run is silent until it
has passed it: every step is told once, though by the run that was killed. How far that was they say themselves; W&B
cannot say it offline, and loses what it had not yet written when it is killed, so there it is told again.

A tool that fails ends no run: it is named, and told nothing more.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers.logger import Logger
from pydantic import Field, ValidationError

from llmt_shared import durable
from llmt_shared.config import StrictModel
from llmt_shared.errors import ConfigError
from llmt_shared.progress import say
from llmt_train.config import RunConfig

NAME = "loggers.json"
FOLDERS = ("tensorboard", "wandb", "mlflow")
"""What the tools make in a run's output."""
Kind = Literal["train", "eval"]
_KINDS: tuple[Kind, ...] = ("train", "eval")
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
"""What is installed for each, by pip's names; the first are those of the modules."""


class Told(StrictModel):
    """What loggers.json holds of a tool that cannot take back what it was told."""

    id: str
    """The tool's own, of its run."""
    last: dict[Kind, int] = Field(default_factory=dict)
    """Step up to which it was told, by all starts of the run that were not killed."""
    is_open: bool = False
    """Whether a start of the run tells it more than that, or was killed while it did."""


class _File(StrictModel):
    tools: dict[str, Told] = Field(default_factory=dict)


@dataclass
class _Tool:
    name: str
    logger: Logger
    last: dict[Kind, int] = field(default_factory=dict)
    """Step up to which it was told."""
    works: bool = True


class Loggers:
    """The tools of a run, open until `close`."""

    def __init__(self) -> None:
        self.tools: list[_Tool] = []

    def log(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Tell the tools what is known of a step, unless they know it already."""
        for tool in self.tools:
            if step <= tool.last.get(kind, -1):
                continue
            if self._attempt(tool, partial(tool.logger.log_metrics, dict(values), step)):
                tool.last[kind] = step

    def close(self, is_sound: bool) -> None:
        """Let the tools finish; wait until they have sent what they were told."""
        for tool in self.tools:
            self._attempt(tool, partial(tool.logger.finalize, "success" if is_sound else "failed"))
            if tool.name == "wandb":  # Lightning leaves the run open
                self._attempt(tool, partial(tool.logger.experiment.finish, exit_code=int(not is_sound)))  # type: ignore[attr-defined]

    def _attempt(self, tool: _Tool, action: Callable[[], object]) -> bool:
        try:
            if tool.works:
                action()
        except Exception as error:  # a server or a library: whatever it is, training matters more
            tool.works = False
            say(f"warning: {tool.name}: {_first_line(error)}; it is told nothing more, metrics.jsonl has it all")
        return tool.works


def check_packages(config: RunConfig) -> None:
    """Refuse a tool whose package is missing.

    Raises:
        ConfigError: naming the package and how to get it.
    """
    for name, package in _PACKAGES.items():
        found = find_spec(name) if name in config.log else None
        # A mere folder of that name, as these tools leave one where they ran, has no origin.
        if name in config.log and (found is None or found.origin is None):
            raise ConfigError(
                f"log: {name}: the package {package} is not installed; run: pip install {package}, or remove {name} "
                "from `log`"
            )


@contextmanager
def telling(config: RunConfig, step: int) -> Iterator[Loggers]:
    """Tell the tools of ``config.log`` about a run, its config first, while this is entered.

    Args:
        config: the run.
        step: how many steps are done.

    Raises:
        ConfigError: a tool cannot be reached, or does not know the run any more.
    """
    told = _read(config.output)
    loggers, is_sound = Loggers(), False
    try:
        for name, begin in _BEGIN.items():
            if name in config.log:
                loggers.tools.append(_begun(name, begin, config, step, told))
        _write(config.output, told, loggers.tools, is_open=True)
        yield loggers
        is_sound = True
    finally:
        loggers.close(is_sound)
        with suppress(OSError):  # the run, too, has met a full disk
            _write(config.output, told, loggers.tools, is_open=False)


def train_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a step's line of metrics.jsonl, by the names that the tools know them by."""
    return {f"train/{name}": value for name, value in line.items() if name != "step" and isinstance(value, int | float)}


def eval_values(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation: of all that is held out, and the loss by source."""
    total = {f"eval/{name}": value for name, value in result.items() if isinstance(value, float)}
    by_source = {f"eval_by_source/{_plain(name)}": source["loss"] for name, source in result["sources"].items()}
    return total | by_source


def _begun(name: str, begin: "_Begin", config: RunConfig, step: int, told: dict[str, Told]) -> _Tool:
    try:
        return begin(config, step, told)
    except Exception as error:  # of whatever kind each tool's are
        raise ConfigError(f"log: {name}: {_first_line(error)}{_WAYS_OUT.get(name, '')}") from error


def _tensorboard(config: RunConfig, step: int, told: dict[str, Told]) -> _Tool:
    del told
    logger = lightning_loggers.TensorBoardLogger(
        config.output, name="tensorboard", version="", default_hp_metric=False, purge_step=step + 1
    )
    logger.log_hyperparams(config.model_dump(mode="json"))
    return _Tool("tensorboard", logger)


def _wandb(config: RunConfig, step: int, told: dict[str, Told]) -> _Tool:
    del step
    known = told.setdefault("wandb", Told(id=secrets.token_hex(8)))
    mode: dict[str, Any] = {"mode": "offline"} if config.wandb.mode == "offline" else {}  # else WANDB_MODE may say so
    logger = lightning_loggers.WandbLogger(
        name=config.wandb.name or config.output.name,
        save_dir=config.output,
        project=config.wandb.project,
        entity=config.wandb.entity,
        tags=config.wandb.tags,
        id=known.id,
        settings={"console": "off", "disable_git": True, "save_code": False},  # run.log has what is shown
        **mode,
    )
    logger.log_hyperparams(config.model_dump(mode="json"))
    last = dict(known.last)
    if known.is_open and (step_known := logger.experiment.summary.get("trainer/global_step")) is not None:
        last = {kind: int(step_known) - 1 for kind in _KINDS}  # of this step itself only a part may be known
    return _Tool("wandb", logger, last)


def _mlflow(config: RunConfig, step: int, told: dict[str, Told]) -> _Tool:
    del step
    uri = config.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _folder_uri(config.output)
    if is_local := uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 would rather have a database
    known = told.get("mlflow")
    logger = lightning_loggers.MLFlowLogger(
        experiment_name=config.mlflow.experiment,
        run_name=config.mlflow.name or config.output.name,
        tracking_uri=uri,
        run_id=known.id if known is not None else None,
        synchronous=None if is_local else False,  # training does not wait for a server
    )
    if known is None:
        known = told["mlflow"] = Told(id=str(logger.run_id))
        logger.log_hyperparams(config.model_dump(mode="json"))  # only now: they can never be changed
    else:
        logger.experiment.update_run(known.id, status="RUNNING")
    last = dict(known.last)
    if known.is_open:
        steps = {kind: _mlflow_steps(logger, f"{kind}/loss") for kind in _KINDS}
        last = {kind: max(found, default=-1) for kind, found in steps.items()}
    return _Tool("mlflow", logger, last)


def _mlflow_steps(logger: lightning_loggers.MLFlowLogger, metric: str) -> list[int]:
    return [each.step for each in logger.experiment.get_metric_history(str(logger.run_id), metric)]


_Begin = Callable[[RunConfig, int, dict[str, Told]], _Tool]
_BEGIN: dict[str, _Begin] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
_WAYS_OUT = {
    "wandb": "; run `wandb login`, set `wandb.mode: offline`, or remove wandb from `log`",
    "mlflow": "; wanted a server or folder at mlflow.tracking_uri (or MLFLOW_TRACKING_URI) that knows this run",
}


def _folder_uri(output: Path) -> str:
    return (output / "mlflow").resolve().as_uri()


def _read(output: Path) -> dict[str, Told]:
    try:
        return _File.model_validate_json((output / NAME).read_bytes()).tools
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise ConfigError(
            f"{output / NAME}: {str(error).splitlines()[0]}; it says which runs of W&B and MLflow this one goes on in; "
            "remove it to begin new ones"
        ) from None


def _write(output: Path, told: Mapping[str, Told], tools: list[_Tool], *, is_open: bool) -> None:
    used = {tool.name: {"last": dict(tool.last), "is_open": is_open} for tool in tools}
    if not told:
        return
    entries = {name: each.model_copy(update=used.get(name, {})) for name, each in told.items()}
    durable.write(output / NAME, _File(tools=entries).model_dump_json(indent=1) + "\n")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _plain(name: str) -> str:
    """A source's name in the characters that MLflow takes."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "_", name)
