"""A checkpoint as a Hugging Face folder, and the proof that plain transformers computes the same with it."""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmt_shared.errors import ConfigError, DataError, FormatError
from llmt_train import checkpoints
from llmt_train.data.batch import collate
from llmt_train.model.adapters import merge_adapters
from llmt_train.model.disk import Piece, on_disk, pieces_of, write_files
from llmt_train.quiet import quiet_transformers
from llmt_train.trained import load_checkpoint_model, load_checkpoint_skeleton

TOLERANCE = 1e-5
"""Largest difference of a logit, in fp32 and on the same input, that `check` accepts."""
MAX_SHARD = 5 * 10**9
"""Bytes."""
_PROBE_LENGTHS = (7, 1, 19, 33)
_PROBE_TEXTS = ("Hello, world!", "  two  spaces\n\n\ttab", "def f(x):\n    return x ** 2", "naïve café 東京 🙂")


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    checkpoint: str
    directory: str
    bytes: int
    """Of all safetensors files."""
    largest_difference: float | None
    """Of a logit, between ours and plain transformers', in fp32; ``None`` without a check."""


def export(
    source: Path,
    directory: Path,
    *,
    adapter: bool = False,
    check: bool = False,
    force: bool = False,
    max_shard: int = MAX_SHARD,
) -> ExportResult:
    """Write a checkpoint's model as safetensors with config, generation config, tokenizer and chat template.

    One tensor after the other, so that the model never is in memory as a whole; but it is where adapters are merged
    into the weights (which are then fp32), for the check, and for families whose tensors in files are several in
    memory.

    Args:
        source: a run's output folder (its newest checkpoint) or a checkpoint.
        directory: folder to write; it appears under this name only when it is whole.
        adapter: write the adapters alone, as `peft` reads them; they name the model that they belong to.
        check: load the result with plain transformers and compare.
        force: replace an earlier export.
        max_shard: bytes of one file of weights; a larger tensor has one of its own.

    Raises:
        ConfigError: ``directory`` holds something; the run has no adapters, or trained more than them; its rows were
            synthetic.
        FormatError: the checkpoint is damaged, or the check failed; ``directory`` is then not written.
        DataError: the weights cannot be written, as on a full disk.
    """
    checkpoint = checkpoints.find_checkpoint(source)
    if isinstance(checkpoints.read_config(checkpoint).get("data"), Mapping):
        raise ConfigError(f"{checkpoint}: learned synthetic rows, which have no tokenizer: there is nothing to export")
    _check_target(directory, force)
    temporary = directory.with_name(f".{directory.name}.partial")
    _check_adapters(checkpoint, adapter)
    with quiet_transformers():
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            model = _write(checkpoint, temporary, adapter, max_shard)
            odd = _tokenizer_mistake(temporary)
            if odd is not None and check:
                raise FormatError(f"{directory}: {odd}")
            if odd is not None:
                print(f"warning: {directory}: {odd}", file=sys.stderr)  # noqa: T201  stdout is for results
            difference = _check(model or load_checkpoint_model(checkpoint), temporary) if check else None
            size = sum(path.stat().st_size for path in temporary.glob("*.safetensors"))
            _rename(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ExportResult(str(checkpoint), str(directory), size, difference)


def _check_adapters(checkpoint: Path, adapter: bool) -> None:
    """Make sure that adapters are all there is to write, where they are wanted alone."""
    lora = checkpoints.read_config(checkpoint).get("lora")
    if adapter and not (lora and not lora["train_also"]):
        what = "more than adapters (lora.train_also)" if lora else "no adapters"
        raise ConfigError(f"{checkpoint}: the run trained {what}; export it without --adapter")


def _check_target(directory: Path, force: bool) -> None:
    if not directory.name:
        raise ConfigError(f"{directory}: cannot be replaced by a new folder; name a folder to write")
    if (directory / "state.json").exists():
        raise ConfigError(f"{directory}: is a checkpoint; choose a new folder")
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not force:
        raise ConfigError(f"{directory}: holds something already; choose a new folder, or --force to replace an export")
    if not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(f"{directory}: is no earlier export (it has no config.json); --force replaces only those")


def _write(checkpoint: Path, directory: Path, adapter: bool, max_shard: int) -> Any:
    """Write a folder; return the model, where it had to be loaded for that."""
    tokenizer = checkpoint.parent.parent / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        raise FormatError(f"{tokenizer}: no tokenizer.json; a checkpoint is exported from inside its run's folder")
    config = checkpoints.read_config(checkpoint)
    dtype = torch.bfloat16 if config["precision"] == "bf16-true" and not config.get("lora") else torch.float32
    directory.mkdir(parents=True)
    model = None
    try:
        if config.get("lora") or not _stream(checkpoint, directory, dtype, max_shard):
            model = load_checkpoint_model(checkpoint)
            if config.get("lora") and not adapter:
                merge_adapters(model)
            _write_whole(model, directory, dtype, max_shard)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{directory}: the weights cannot be written: {error}") from None
    # Not by `save_pretrained`, which refuses settings that published models have (a temperature without sampling).
    generation_class: Any = GenerationConfig
    generation = generation_class.from_dict(checkpoints.read_json(checkpoint, "generation_config.json"))
    generation.to_json_file(directory / "generation_config.json")
    checkpoints.copy_files(tokenizer, directory)
    _name_tokenizer_class(directory / "tokenizer_config.json")
    return model


def _stream(checkpoint: Path, directory: Path, dtype: torch.dtype, max_shard: int) -> bool:
    """Write config and weights, one tensor after the other; return whether that can be done."""
    checkpoints.check_undamaged(checkpoint)
    skeleton, stored = load_checkpoint_skeleton(checkpoint), checkpoints.StoredModel(checkpoint)
    try:
        pieces = pieces_of(skeleton, stored.shapes, dtype)
    except FormatError as error:
        raise FormatError(f"{checkpoint}: {error}") from None
    if pieces is None:
        family = skeleton.config.model_type
        print(f"note: {family}: tensors in files are several in memory; loading the whole model", file=sys.stderr)  # noqa: T201
        return False

    def read(piece: Piece) -> dict[str, Tensor]:
        tensor = torch.empty(piece.empty.shape, dtype=piece.empty.dtype)
        several = len(piece.parts) > 1
        views = torch.split(tensor, [stored.shapes[part][0] for part in piece.parts]) if several else (tensor,)
        stored.read(dict(zip(piece.parts, views, strict=True)))
        return on_disk(skeleton, piece.name, tensor)

    write_files(directory, pieces, read, max_shard)
    _settle_config(skeleton)
    skeleton.config.dtype = str(dtype).removeprefix("torch.")
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(directory)
    return True


def _write_whole(model: Any, directory: Path, dtype: torch.dtype, max_shard: int) -> None:
    """Write config and weights. They keep the precision that they were trained in; merged, they are sums in fp32."""
    _settle_config(model)
    generation_class: Any = GenerationConfig
    model.generation_config = generation_class()
    _cast(model, dtype).save_pretrained(directory, max_shard_size=max_shard)
    _cast(model, torch.float32)


def _settle_config(model: Any) -> None:
    model.config.use_cache = True  # training switches it off
    model.config.__dict__.pop("auto_map", None)  # it names code that is not exported; transformers' own was trained


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast the parameters alone: the frequencies of rotary positions are buffers, and fp32 in any model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _name_tokenizer_class(path: Path) -> None:
    """Say that tokenizer.json is the whole truth: without a class, transformers builds the model family's own."""
    content = json.loads(path.read_bytes()) if path.exists() else {}
    content.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _rename(temporary: Path, directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    temporary.rename(directory)


def _check(model: Any, directory: Path) -> float:
    """Compare the folder, as plain transformers loads it, with the model in memory.

    Returns:
        The largest difference of a logit on the same input. Packed rows have other shapes than single segments, and so
        other rounding, in proportion to the largest logit: that comparison allows for it.
    """
    plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    plain.eval()
    for parameter in plain.parameters():  # rounding depends on where in memory a matrix begins: out of the mapped file
        parameter.data = parameter.data.clone()
    wanted, alone, packed = _probe(model, plain)
    difference = (alone - wanted).abs().max().item()
    packed_difference = (packed - wanted).abs().max().item()
    scale = max(1.0, wanted.abs().max().item())
    if not (difference <= TOLERANCE and packed_difference <= TOLERANCE * scale):  # NaN is no success
        raise FormatError(
            f"{directory}: logits of plain transformers differ from ours by {difference:.2e}, and on a packed row by "
            f"{packed_difference:.2e}; wanted at most {TOLERANCE} and {TOLERANCE * scale:.2e}. The export was not "
            f"kept; please report the model type {model.config.model_type!r}"
        )
    return difference


@torch.no_grad()
def _probe(model: Any, plain: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] of some segments: one at a time in plain transformers and in ours, and packed in a row in ours."""
    random = np.random.default_rng(0)
    limit = getattr(model.config, "max_position_embeddings", None) or max(_PROBE_LENGTHS)
    lengths = np.minimum(np.array(_PROBE_LENGTHS), limit)
    tokens = random.integers(0, model.get_input_embeddings().weight.shape[0], (1, lengths.sum()))
    pieces = np.split(tokens, np.cumsum(lengths)[:-1], axis=1)
    wanted = [plain(input_ids=torch.from_numpy(piece), use_cache=False).logits[0] for piece in pieces]
    alone = [_ours(model, piece, np.array([piece.shape[1]])) for piece in pieces]
    return torch.cat(wanted), torch.cat(alone), _ours(model, tokens, lengths)


def _ours(model: Any, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
    """Logits [N, V] of one packed row."""
    batch = collate(tokens, np.array([len(lengths)]), lengths, np.zeros(len(lengths), np.int64), None, {"targets": 1.0})
    logits: Tensor = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments(), use_cache=False
    ).logits[0]
    return logits


def _tokenizer_mistake(directory: Path) -> str | None:
    """What is wrong where plain transformers does not tokenize as the tokenizer that packed the dataset."""
    loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    bare = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in _PROBE_TEXTS:
        found, wanted = loaded(text)["input_ids"], bare.encode(text).ids
        if found != wanted:
            return (
                f"AutoTokenizer builds {type(loaded).__name__}, which gives {found} for {text!r}, but tokenizer.json "
                f"gives {wanted}: transformers puts its own rules above the file for this model type. Export without "
                "--check and load the tokenizer with PreTrainedTokenizerFast.from_pretrained, or train another type"
            )
    return None
