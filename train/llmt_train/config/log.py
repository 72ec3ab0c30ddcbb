"""Who is told about a run, and what it writes on the way."""

from typing import Annotated, Literal

from annotated_types import Ge, MinLen
from pydantic import ConfigDict

from llmt_shared.config import PositiveInt, StrictModel

Logger = Literal["jsonl", "tensorboard", "wandb", "mlflow"]


class WandbConfig(StrictModel):
    """Weights & Biases; needs the package `wandb`."""

    project: Annotated[str, MinLen(1)] = "llmt"
    name: str | None = None
    """Of the run; its output folder's name where it is not given."""
    entity: str | None = None
    """User or team; your own where it is not given."""
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = "online"
    """offline writes below the run's output; `wandb sync` sends it later."""


class MlflowConfig(StrictModel):
    """MLflow; needs the package `mlflow` or `mlflow-skinny`."""

    experiment: Annotated[str, MinLen(1)] = "llmt"
    name: str | None = None
    """Of the run; its output folder's name where it is not given."""
    tracking_uri: str | None = None
    """Server or `file:` folder; MLFLOW_TRACKING_URI, or a folder of the run's output, where it is not given."""


class SampleConfig(StrictModel):
    """Texts that the model writes during training, into samples.jsonl."""

    model_config = ConfigDict(allow_inf_nan=False)

    every: PositiveInt
    """Steps between samples; there is one before the first step and one after the last in any case."""
    prompts: Annotated[tuple[Annotated[str, MinLen(1)], ...], MinLen(1)]
    """Texts to go on from; messages of a user where the task is one of chats."""
    max_tokens: PositiveInt = 64
    """Of each sample."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """0 takes the likeliest token; above that tokens are drawn, by the run's seed and the step."""
