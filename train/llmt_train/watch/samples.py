"""Texts that the model writes during training: how it reads, beside how it scores.

Every token is one forward pass over all texts so far, packed as training packs documents, and without a cache: what
is sampled is the model as it trains. Nothing here touches torch's own generator, so a run with samples has the curve of
one without.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llmt_shared.errors import ConfigError
from llmt_shared.order import key
from llmt_shared.terminal import escaped
from llmt_train.data.batch import pack_texts
from llmt_train.data.rows import AnyDataset
from llmt_train.model.head import logits_at
from llmt_train.model.load import evaluating
from llmt_train.module import TrainModule
from llmt_train.parallel.context import WHOLE, TokenSplit
from llmt_train.parallel.mesh import ALONE
from llmt_train.parallel.together import exchanged
from llmt_train.policy import split_of
from llmt_train.setup import Setup

NAME = "samples.jsonl"
_CONTENT = "llmt"  # an answer whose end a chat template marks
_ROWS_LOOKED_AT = 64


class Prompt(NamedTuple):
    """What a sample goes on from."""

    text: str
    """As the config has it."""
    ids: tuple[int, ...]
    """Its tokens, those of the chat template or BOS included."""
    room: int
    """Tokens that may be written."""


@dataclass(frozen=True)
class Sampler:
    """Everything that samples of a run need, beside its model."""

    prompts: tuple[Prompt, ...]
    stops: frozenset[int]
    """Tokens that end a text."""
    temperature: float
    tokenizer: Tokenizer
    seed: int
    is_compiled: bool
    """Whether the model's layers are compiled for the lengths of rows, and would be compiled anew for every other."""


def prepare_sampler(setup: Setup) -> Sampler | None:
    """Return the run's sampler; ``None`` where the config asks for no samples.

    Raises:
        ConfigError: a prompt has no tokens, or leaves none of the model's positions; the template takes none.
    """
    config, dataset = setup.config, setup.dataset
    if config.sample is None:
        return None
    folder = dataset.tokenizer_dir
    assert folder is not None  # the config refuses samples of synthetic rows
    tokenizer = _open_tokenizer(folder)
    chat = _Chat(folder, tokenizer) if config.task != "pretrain" else None
    limit = _positions(setup.model.config.get_text_config())
    prompts = []
    for number, text in enumerate(config.sample.prompts):
        ids = chat.prompt(text) if chat is not None else _plain_prompt(dataset, tokenizer, text)
        place = f"sample.prompts.{number}"
        if not ids:
            raise ConfigError(f"{place}: {text!r} has no tokens; wanted a text to go on from")
        if limit is not None and len(ids) >= limit:
            raise ConfigError(f"{place}: {len(ids)} tokens, but the model has {limit} positions; wanted a shorter one")
        room = config.sample.max_tokens if limit is None else min(config.sample.max_tokens, limit - len(ids))
        prompts.append(Prompt(text, tuple(ids), room))
    ends = {dataset.tokenizer.eos_id, chat.turn_end() if chat is not None else None, *_ends_of(setup.model)}
    stops = frozenset(end for end in ends if end is not None)
    train = config.train
    return Sampler(tuple(prompts), stops, config.sample.temperature, tokenizer, train.seed, train.compile)


def write_samples(sampler: Sampler, setup: Setup, module: TrainModule, step: int) -> list[dict[str, Any]]:
    """Let the model go on from every prompt, in evaluation mode.

    Returns:
        The lines of samples.jsonl: ``step``, ``prompt``, ``text`` (what was written, without the token that ended it),
        ``tokens`` (the same with it, as ids).
    """
    eager = torch.compiler.set_stance("force_eager") if sampler.is_compiled else nullcontext()
    with evaluating(module), eager:
        texts = generate(sampler, module, step, split_of(setup.config, setup.mesh))
    return [
        {"step": step, "prompt": prompt.text, "text": _decode(sampler, ids), "tokens": ids}
        for prompt, ids in zip(sampler.prompts, texts, strict=True)
    ]


def describe_sample(line: Mapping[str, Any], total_steps: int) -> str:
    """Return what a person is shown of a line of samples.jsonl."""
    return f"step {line['step']}/{total_steps}  sample: {escaped(line['prompt'])} ▸ {escaped(line['text'])}"


@torch.no_grad()
def generate(sampler: Sampler, module: TrainModule, step: int, split: TokenSplit = WHOLE) -> list[list[int]]:
    """Return the tokens that the model writes after each prompt, up to one that ends a text and with it."""
    seeds = [key(sampler.seed, step, number) for number in range(len(sampler.prompts))]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    written: list[list[int]] = [[] for _ in sampler.prompts]
    going = list(range(len(sampler.prompts)))
    while going:
        texts = [[*sampler.prompts[place].ids, *written[place]] for place in going]
        logits_PV = _next_logits(module, texts, split)
        own = choose(logits_PV, sampler.temperature, [generators[place] for place in going])
        chosen = exchanged(own)[0]  # ranks may round in other ways, and must go on with the same texts
        for place, token in zip(going, chosen, strict=True):
            written[place].append(token)
        going = [
            place
            for place in going
            if written[place][-1] not in sampler.stops and len(written[place]) < sampler.prompts[place].room
        ]
    return written


def choose(logits_PV: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> list[int]:
    """Return a token for each row: the likeliest at temperature 0, else one drawn on the CPU by the row's generator."""
    if temperature == 0:
        best: list[int] = logits_PV.argmax(-1).tolist()
        return best
    probabilities_PV = (logits_PV.cpu().double() / temperature).softmax(-1)
    drawn = zip(probabilities_PV, generators, strict=True)
    return [int(torch.multinomial(each, 1, generator=generator)) for each, generator in drawn]


def _next_logits(module: TrainModule, texts: list[list[int]], split: TokenSplit) -> Tensor:
    """[P, V] of the token after each text; every text is a segment of its own."""
    # Ranks of cp do all the same: texts are short.
    batch = pack_texts(texts, split._replace(cp=ALONE)).to(module.device)
    places = torch.from_numpy(np.cumsum([len(text) for text in texts]) - 1).to(module.device)
    segments = batch.segments(module.attention, module.deterministic)
    return logits_at(module.model, module.head, batch, segments, places)


def _decode(sampler: Sampler, ids: list[int]) -> str:
    ends = bool(ids) and ids[-1] in sampler.stops
    return sampler.tokenizer.decode(ids[:-1] if ends else ids, skip_special_tokens=False)


def _open_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _plain_prompt(dataset: AnyDataset, tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text as packing makes them of a document: control tokens are text; BOS is where documents have it."""
    tokenizer.encode_special_tokens = True
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    bos = dataset.tokenizer.bos_id
    return [bos, *ids] if bos is not None and _begin_with(dataset, bos) else ids


def _begin_with(dataset: AnyDataset, token: int) -> bool:
    """Whether the dataset's documents begin with a token: packing decided, the first of them shows it."""
    for row in range(min(_ROWS_LOOKED_AT, dataset.train.num_rows)):
        table = dataset.train.segments([row])
        starts = np.cumsum(table.length) - table.length
        whole = starts[table.offset == 0]
        if len(whole):
            return bool(dataset.train.tokens([row])[0][whole[0]] == token)
    return False


class _Chat:
    """The dataset's chat template, rendered in transformers' sandbox."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._template = PreTrainedTokenizerFast.from_pretrained(folder)
        self._tokenizer = tokenizer

    def prompt(self, text: str) -> list[int]:
        """Tokens of a user's message, up to where the assistant is to write."""
        rendered = self._rendered([{"role": "user", "content": text}], add_generation_prompt=True)
        ids: list[int] = self._tokenizer.encode(rendered, add_special_tokens=False).ids
        return ids

    def turn_end(self) -> int | None:
        """The control token that the template writes after an answer; ``None`` where that is none."""
        answer = {"role": "assistant", "content": _CONTENT}
        rendered = self._rendered([{"role": "user", "content": "?"}, answer])
        after = self._tokenizer.encode(rendered.rpartition(_CONTENT)[2], add_special_tokens=False).ids
        controls = self._tokenizer.get_added_tokens_decoder()
        return after[0] if after and after[0] in controls else None

    def _rendered(self, messages: list[dict[str, str]], **options: bool) -> str:
        try:
            return str(self._template.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # a template may raise whatever it likes
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"sample: the dataset's chat template takes no prompt of a user: {line}") from error


def _ends_of(model: Any) -> list[int]:
    """Tokens that end a text by the model's own generation config."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _positions(config: Any) -> int | None:
    """Most tokens of a text; ``None`` where the model does not say."""
    ropes = getattr(config, "rope_parameters", None) or {}
    original = ropes.get("original_max_position_embeddings") if ropes.get("rope_type") == "longrope" else None
    limits = [limit for limit in (getattr(config, "max_position_embeddings", None), original) if limit]
    return min(limits, default=None)
