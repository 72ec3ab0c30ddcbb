"""What a model writes during training is what it would write after it, and training does not notice."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_datasets
import small_tokenizers
import torch
from tokenizers import Tokenizer
from train.interrupted import curve, interrupt
from train.tiny_dataset import WORDS, write_dataset
from train.tiny_models import CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM

from llmt_shared.dataset import open_dataset
from llmt_shared.errors import ConfigError
from llmt_train.config import RunConfig
from llmt_train.fit import build_module, fit
from llmt_train.parallel.reduction import whole
from llmt_train.setup import Setup, set_up
from llmt_train.watch.metrics import read_metrics
from llmt_train.watch.samples import Prompt, Sampler, choose, generate, prepare_sampler

pytestmark = pytest.mark.usefixtures("process_group")

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
GPT2_WITH_DROPOUT = {
    "model_type": "gpt2", "vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
    "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2,
}  # fmt: skip
PROMPTS = ["w1 w2 w3", "w7", "w30 w31 w32 w33 w34"]
SAMPLE = {"every": 4, "prompts": PROMPTS, "max_tokens": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


def make_config(data: Path, output: Path, **changes: Any) -> RunConfig:
    settings = {
        "task": "pretrain", "model": {"from_config": LLAMA}, "data": data, "output": output,
        "batch": {"tokens": 5 * 16, "micro_rows": 2}, "train": {"steps": 10, "seed": 3},
        "optim": {"lr": 1e-2}, "save": {"every": 3, "keep": 2}, "sample": SAMPLE,
    }  # fmt: skip
    return RunConfig.model_validate(settings | changes)


def samples(output: Path) -> list[dict[str, Any]]:
    return read_metrics(output, "samples.jsonl")


def sampler_of(config: RunConfig) -> tuple[Setup, Sampler]:
    setup = set_up(config)
    sampler = prepare_sampler(setup)
    assert sampler is not None
    return setup, sampler


def written(setup: Setup, sampler: Sampler, step: int = 5) -> list[list[int]]:
    setup.model.eval()
    return generate(sampler, build_module(setup), step)


def written_alone(model: Any, ids: list[int], count: int, stops: frozenset[int]) -> list[int]:
    """The likeliest continuation by transformers' own attention, one text at a time, nothing packed."""
    config = AutoConfig.for_model(**model.config.to_dict())
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plain.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    found: list[int] = []
    while len(found) < count and not (found and found[-1] in stops):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([ids + found]), use_cache=False).logits
        found.append(int(logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "cohere"])
def test_the_likeliest_texts_are_those_of_each_prompt_alone(data, tmp_path, family):
    """Rotary and learned positions; windows, caps and factors of logits."""
    model = {"model_type": family, **CONFIGS[family], "vocab_size": WORDS, "initializer_range": 0.3}
    setup, sampler = sampler_of(make_config(data, tmp_path / "run", model={"from_config": model}))
    found = written(setup, sampler)
    assert found == [written_alone(setup.model, list(prompt.ids), 6, sampler.stops) for prompt in sampler.prompts]
    assert len({tuple(text) for text in found}) == 3


def test_without_a_known_head_the_models_own_logits_serve(data, tmp_path):
    setup, sampler = sampler_of(make_config(data, tmp_path / "run"))
    assert setup.head is not None
    assert written(dataclasses.replace(setup, head=None), sampler) == written(setup, sampler)


def test_a_text_ends_with_a_token_that_ends_texts_and_within_its_room(data, tmp_path):
    setup, sampler = sampler_of(make_config(data, tmp_path / "run"))
    free = written(setup, sampler)
    stop = free[0][2]
    prompts = tuple(prompt._replace(room=room) for prompt, room in zip(sampler.prompts, (6, 6, 4), strict=True))
    found = written(setup, dataclasses.replace(sampler, prompts=prompts, stops=frozenset([stop])))
    assert found[0] == free[0][: free[0].index(stop) + 1]
    assert found[2] == free[2][:4] or found[2][-1] == stop


def test_drawn_tokens_have_the_models_probabilities():
    """20 000 draws; each count within four standard deviations of what is expected."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    draws = [choose(logits[None], 0.7, [generator])[0] for _ in range(20_000)]
    wanted = np.exp(logits.numpy() / 0.7)
    wanted /= wanted.sum()
    deviations = np.sqrt(20_000 * wanted * (1 - wanted))
    assert np.all(np.abs(np.bincount(draws, minlength=5) - 20_000 * wanted) < 4 * deviations)


def test_what_is_drawn_depends_on_seed_step_and_prompt_alone(data, tmp_path):
    sample = SAMPLE | {"temperature": 1.0, "prompts": ["w1 w2", "w1 w2", "w5"]}
    setup, sampler = sampler_of(make_config(data, tmp_path / "run", sample=sample))
    found = written(setup, sampler)
    torch.manual_seed(99)
    assert written(setup, sampler) == found
    assert found[0] != found[1]
    assert written(setup, sampler, step=6) != found
    assert written(setup, dataclasses.replace(sampler, seed=4)) != found
    first = dataclasses.replace(sampler, prompts=sampler.prompts[:1])
    assert written(setup, first) == found[:1]  # the others do not matter


def test_torchs_own_generator_is_not_touched(data, tmp_path):
    setup, sampler = sampler_of(make_config(data, tmp_path / "run", sample=SAMPLE | {"temperature": 1.0}))
    before = torch.get_rng_state()
    written(setup, sampler)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_with_samples_has_the_curve_of_one_without(data, tmp_path):
    model = {"from_config": GPT2_WITH_DROPOUT}
    fit(make_config(data, tmp_path / "without", model=model, sample=None))
    fit(make_config(data, tmp_path / "with", model=model, sample=SAMPLE | {"temperature": 1.0}))
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_samples_are_written_before_the_first_step_every_few_and_after_the_last(data, tmp_path, capsys):
    fit(make_config(data, tmp_path / "run"))
    found = samples(tmp_path / "run")
    assert [sample["step"] for sample in found] == [step for step in (0, 4, 8, 10) for _ in PROMPTS]
    assert [sample["prompt"] for sample in found] == PROMPTS * 4
    last = found[-3]
    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    assert last["text"] == tokenizer.decode(last["tokens"], skip_special_tokens=False)
    assert f"step 10/10  sample: w1 w2 w3 ▸ {last['text']}\n" in capsys.readouterr().err
    assert f"sample: w1 w2 w3 ▸ {last['text']}\n" in (tmp_path / "run" / "run.log").read_text()


def test_a_trained_model_writes_what_it_learned(data, tmp_path):
    """In this dataset words follow one another."""
    fit(make_config(data, tmp_path / "run", train={"steps": 80, "seed": 3}))
    assert samples(tmp_path / "run")[-3]["text"] == "w4 w5 w6 w7 w8 w9"


def test_a_killed_runs_samples_are_those_of_a_whole_one(data, tmp_path):
    sample = SAMPLE | {"every": 2, "temperature": 0.8}
    fit(make_config(data, tmp_path / "whole", sample=sample))
    config = make_config(data, tmp_path / "run", sample=sample)
    interrupt(config, 5)
    interrupt(config, 8)
    fit(config)
    assert samples(tmp_path / "run") == samples(tmp_path / "whole")


def test_the_samples_of_a_run_may_change(data, tmp_path):
    fit(make_config(data, tmp_path / "run", train={"steps": 4, "seed": 3}, optim={"lr": 1e-2, "schedule": "constant"}))
    changed = make_config(data, tmp_path / "run", sample=None, optim={"lr": 1e-2, "schedule": "constant"})
    assert fit(changed).resumed_from == 4


@pytest.mark.parametrize("positions", [64, 256])
def test_no_text_is_longer_than_the_models_positions(data, tmp_path, positions):
    model = {"from_config": GPT2_WITH_DROPOUT | {"n_positions": positions}}
    sample = SAMPLE | {"prompts": ["w1 " * 59, "w1 " * 63], "max_tokens": 20}
    setup, sampler = sampler_of(make_config(data, tmp_path / "run", model=model, sample=sample))
    lengths = [len(text) for text in written(setup, dataclasses.replace(sampler, stops=frozenset()))]
    assert lengths == ([5, 1] if positions == 64 else [20, 20])


def refused(config: RunConfig) -> str:
    setup = set_up(config)
    with pytest.raises(ConfigError) as caught:
        prepare_sampler(setup)
    return str(caught.value)


def test_prompts_that_cannot_be_gone_on_from_are_refused(data, tmp_path):
    model = {"from_config": LLAMA | {"max_position_embeddings": 16}}
    long = make_config(data, tmp_path / "run", model=model, sample=SAMPLE | {"prompts": ["w1", "w1 " * 16]})
    assert "sample.prompts.1: 16 tokens, but the model has 16 positions" in refused(long)
    empty = make_config(data, tmp_path / "run", sample=SAMPLE | {"prompts": [" "]})
    assert "sample.prompts.0: ' ' has no tokens" in refused(empty)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    return {
        "with bos": small_datasets.build(folder / "bos", small_tokenizers.bpe_with_bos()),
        "without bos": small_datasets.build(folder / "plain"),
        "never bos": small_datasets.build(folder / "never", small_tokenizers.bpe_with_bos(), bos="never"),
        "sft": small_datasets.build_chats(folder / "sft", "sft"),
        "preference": small_datasets.build_chats(folder / "preference", "preference"),
    }


def packed_config(data: Path, tmp_path: Path, prompt: str, task: str = "pretrain") -> RunConfig:
    length = open_dataset(data).manifest.length
    sample = {"every": 5, "prompts": [prompt], "max_tokens": 5}
    return make_config(data, tmp_path / "run", task=task, batch={"tokens": length}, sample=sample)


@pytest.mark.parametrize("name", ["with bos", "without bos", "never bos"])
def test_a_plain_prompt_has_the_tokens_that_packing_gives_such_a_document(packed, tmp_path, name):
    """The text of a document that lies whole in a row, against its tokens there; EOS is not yet to come."""
    dataset = open_dataset(packed[name])
    eos = dataset.manifest.tokenizer.eos_id
    ids = next(ids for ids in _beginnings(dataset) if len(ids) > 5 and ids[-1] == eos)
    bos = [dataset.manifest.tokenizer.bos_id] if name == "with bos" else []
    assert ids[: len(bos)] == bos
    backend = Tokenizer.from_file(str(dataset.tokenizer_dir / "tokenizer.json"))
    text = backend.decode(ids[len(bos) : -1], skip_special_tokens=False)
    _, sampler = sampler_of(packed_config(packed[name], tmp_path, text))
    assert list(sampler.prompts[0].ids) == ids[:-1]
    assert sampler.stops == {eos}


def _beginnings(dataset: Any) -> Iterator[list[int]]:
    """The tokens of every segment that begins a document."""
    for row in range(dataset.train.num_rows):
        table, tokens = dataset.train.segments([row]), dataset.train.tokens([row])[0]
        starts = np.cumsum(table.length) - table.length
        for start, length, offset in zip(starts, table.length, table.offset, strict=True):
            if offset == 0:
                yield tokens[start : start + length].tolist()


def test_a_plain_prompt_never_holds_a_control_token(packed, tmp_path):
    _, sampler = sampler_of(packed_config(packed["with bos"], tmp_path, f"a{small_tokenizers.EOT}b"))
    dataset = open_dataset(packed["with bos"])
    assert dataset.manifest.tokenizer.eos_id not in sampler.prompts[0].ids


@pytest.mark.parametrize(("kind", "task"), [("sft", "sft"), ("preference", "dpo"), ("preference", "orpo")])
def test_a_chat_prompt_has_the_tokens_that_packing_gives_it(packed, tmp_path, kind, task):
    """Those of a chat of one turn, up to its first target."""
    dataset = open_dataset(packed[kind])
    corpus = packed[kind].parent / "corpus" / f"{kind}.jsonl"
    number, user = next(
        (number, chat[0]["content"])
        for number, line in enumerate(corpus.read_text().splitlines())
        for chat in [json.loads(line).get("messages") or json.loads(line)["chosen"]]
        if len(chat) == 2 and _row_of(dataset, number) is not None
    )
    row, segment = _row_of(dataset, number)
    table, spans = dataset.train.segments([row]), dataset.train.spans([row])
    start = int(table.length[:segment].sum())
    first_target = int(spans.start[spans.start >= start].min())
    wanted = dataset.train.tokens([row])[0][start:first_target].tolist()
    _, sampler = sampler_of(packed_config(packed[kind], tmp_path, user, task))
    assert sampler.prompts == (Prompt(user, tuple(wanted), 5),)


def _row_of(dataset: Any, document: int) -> tuple[int, int] | None:
    for row in range(dataset.train.num_rows):
        table = dataset.train.segments([row])
        found = np.flatnonzero((table.document == document) & (table.offset == 0))
        if len(found):
            return row, int(found[0])
    return None


def test_the_end_of_a_turn_ends_a_text(packed, tmp_path):
    """A template whose turns end with a token that is no EOS."""
    data = small_datasets.copy(packed["sft"], tmp_path / "copy")
    template = data / "tokenizer" / "chat_template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_start|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    small_datasets.reseal(data)
    _, sampler = sampler_of(packed_config(data, tmp_path, "Hello?", "sft"))
    backend = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    assert sampler.stops == {backend.token_to_id("<|im_start|>"), backend.token_to_id(small_tokenizers.EOT)}
    text = backend.decode(list(sampler.prompts[0].ids), skip_special_tokens=False)
    assert text == "user: Hello?<|im_start|>\nassistant: "


def test_a_template_that_takes_no_users_message_is_refused(packed, tmp_path):
    data = small_datasets.copy(packed["sft"], tmp_path / "copy")
    (data / "tokenizer" / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    small_datasets.reseal(data)
    message = refused(packed_config(data, tmp_path, "Hello?", "sft"))
    assert "chat template takes no prompt of a user: no users here" in message


def test_a_template_cannot_reach_out_of_its_sandbox(packed, tmp_path):
    data = small_datasets.copy(packed["sft"], tmp_path / "copy")
    (data / "tokenizer" / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    small_datasets.reseal(data)
    assert "unsafe" in refused(packed_config(data, tmp_path, "Hello?", "sft"))


def test_what_is_shown_cannot_steer_a_terminal(packed, tmp_path, capsys):
    fit(packed_config(packed["without bos"], tmp_path, "\x1b[31mred\x9b0m"))
    shown = capsys.readouterr().err
    assert "sample: \\x1b[31mred\\x9b0m ▸ " in shown
    assert "\x1b" not in shown
    assert samples(tmp_path / "run")[0]["prompt"] == "\x1b[31mred\x9b0m"
