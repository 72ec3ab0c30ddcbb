"""What each task's loss may be told."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import ConfigDict

from llmt_shared.config import StrictModel


class ClmConfig(StrictModel):
    """Next-token prediction, for tasks pretrain and sft."""

    model_config = ConfigDict(allow_inf_nan=False)

    z_loss: Annotated[float, Ge(0)] = 0.0
    """Factor of the squared log of the softmax's normaliser (PaLM: 1e-4); 0 is none."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of each target that is spread evenly over the vocabulary; 0 is none."""
    neftune: Annotated[float, Ge(0)] = 0.0
    """Noise on the embeddings (alpha of NEFTune, 5 to 15), scaled by each document's own length; 0 is none."""


class DpoConfig(StrictModel):
    """Direct preference optimisation, for task dpo."""

    model_config = ConfigDict(allow_inf_nan=False)

    loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    """robust corrects for `label_smoothing` flipped pairs, where sigmoid becomes conservative DPO."""
    beta: Annotated[float, Gt(0)] = 0.1
    """How strongly the policy is held to the reference; ipo aims at a margin of 1 / (2 beta)."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Share of pairs that are expected to be the wrong way round."""
    length_normalised: bool = False
    """Divide each side's log-ratio by its number of targets, as TRL's ipo and sigmoid_norm do."""
    reference: Literal["model", "precomputed", "none"] = "model"
    """model: the model as it is loaded, kept beside the one that trains (with `lora`, the same without its adapters).
    precomputed: what `llmt-train ref` wrote beside the dataset. none: reference-free."""
    sft_weight: Annotated[float, Ge(0)] = 0.0
    """Factor of the chosen answers' mean negative log-likelihood, added to the loss; 0 is none."""

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[str]:
        """IPO has no term that smoothing could change."""
        if given.get("loss") == "ipo" and given.get("label_smoothing"):
            yield "label_smoothing means nothing to loss ipo; remove it, or choose sigmoid or robust"


class OrpoConfig(StrictModel):
    """Odds-ratio preference optimisation, for task orpo; needs no reference."""

    model_config = ConfigDict(allow_inf_nan=False)

    beta: Annotated[float, Gt(0)] = 0.1
    """Factor of the odds-ratio term (lambda in the paper)."""
    nll_on: Literal["response", "all"] = "response"
    """What the likelihood term is a mean over: chosen answers, or chosen prompts and answers."""
