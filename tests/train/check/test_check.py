"""Whether a run would begin, what it is made of, and what it needs: known before anything is spent."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import small_datasets
import torch
from train.tiny_dataset import WORDS, write_dataset, write_tokenizer
from train.tiny_models import tiny

from llmt_shared import order
from llmt_shared.dataset import open_dataset
from llmt_shared.errors import ConfigError
from llmt_train import policy
from llmt_train.check import check as module
from llmt_train.check import devices
from llmt_train.check.check import check
from llmt_train.check.devices import Device, this_device
from llmt_train.check.report import as_text
from llmt_train.cli import main
from llmt_train.config import RunConfig
from llmt_train.data.stream import plan_run
from llmt_train.fit import fit
from llmt_train.parallel.layout import Layout, Place
from llmt_train.parallel.mesh import ALONE, Mesh
from llmt_train.setup import Setup, describe
from llmt_train.tasks import build_task

LENGTH = 16
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("check") / "data", length=LENGTH)


def make(dataset: Path, **changes) -> RunConfig:
    run = {
        "task": "pretrain",
        "model": {"from_config": LLAMA},
        "data": str(dataset),
        "output": str(dataset.with_name("run")),
        "batch": {"tokens": 5 * LENGTH, "micro_rows": 2},
        "train": {"epochs": 2},
        "optim": {"lr": 1e-3, "schedule": "wsd", "warmup": "10%", "decay": "20%"},
        "precision": "fp32",
    }
    return RunConfig.model_validate(run | changes)


def problems(config: RunConfig, on: str | None = None) -> list[str]:
    return [str(problem) for problem in check(config, on).problems]


def test_a_run_that_would_begin_is_described(data):
    """24 rows twice in steps of 5 are 9 steps and one of 3."""
    report = check(make(data))
    assert report.problems == []
    assert (report.data.rows, report.data.length, report.data.held_out, report.data.max_id) == (24, 16, 4, WORDS - 1)
    assert report.data.fill == pytest.approx(small_fill(data))
    assert (report.run.steps, report.run.rows, report.run.epochs) == (10, 48, 2.0)
    assert (report.run.rows_per_step, report.run.micro_batches, report.run.rows_of_last_step) == (5, 3, 3)
    assert (report.run.warmup_steps, report.run.decay_steps) == (1, 2)
    assert (report.model.precision, report.model.attention) == ("fp32", "sdpa")


def small_fill(data: Path) -> float:
    entry = json.loads((data / "MANIFEST.json").read_text())["splits"]["train"]
    return entry["tokens"] / (entry["rows"] * LENGTH)


@pytest.mark.parametrize(("schedule", "steps"), [("constant", 0), ("linear", 9), ("cosine", 9), ("wsd", 2)])
def test_the_learning_rate_falls_over_the_last_steps(data, schedule, steps):
    assert check(make(data, optim={"lr": 1e-3, "schedule": schedule, "warmup": 1})).run.decay_steps == steps


def test_time_is_arithmetic_by_speed(data, monkeypatch):
    monkeypatch.setattr(module, "this_device", lambda *of: this_device(*of)._replace(flops=1e9, utilisation=0.5))
    time = check(make(data)).time
    assert time.seconds_per_step == pytest.approx(time.flops_per_step / 5e8)
    assert time.seconds == pytest.approx(time.seconds_per_step * 48 / 5)
    full = check(make(data, train={"epochs": 2, "checkpointing": {"policy": "full", "every": 2}})).time
    assert full.flops_per_step == time.flops_per_step
    assert full.seconds == pytest.approx(time.seconds * (1 + 1 / 6))


def test_the_arithmetic_of_a_step_is_that_of_its_segments(data):
    """6 for each weight and token; 12 for each element of a head, layer, query and key that it sees."""
    split = open_dataset(data).train
    lengths = split.segments(order.endless_rows(42, 0, 5, split.num_rows)).length.astype(int)
    weights = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48) + WORDS * 32
    wanted = 6 * weights * lengths.sum() + 12 * 2 * 32 * (lengths * (lengths + 1) // 2).sum()
    assert check(make(data)).time.flops_per_step == pytest.approx(wanted)


def test_all_problems_are_told_at_once(data):
    wrong = make(
        data,
        task="sft",
        model={"from_config": LLAMA | {"vocab_size": 8, "max_position_embeddings": 4}},
        batch={"tokens": 81},
        attention="flash2",
        train={"epochs": 1, "freeze": ["nothing"], "liger": True},
    )
    found = problems(wrong)
    words = ("task: sft", "batch.tokens: 81", "id 39", "4 positions", "train.liger", "train.freeze",
             "attention: flash2")  # fmt: skip
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True)), found


def test_fit_refuses_with_the_same_words(data):
    wrong = make(data, task="sft", batch={"tokens": 81}, attention="flash2")
    with pytest.raises(ConfigError) as caught:
        fit(wrong)
    assert str(caught.value).splitlines() == problems(wrong)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"data": "/nowhere"}, "/nowhere: no such dataset"),
        ({"model": "./nowhere"}, "model: ./nowhere: no such folder"),
        ({"model": {"from_config": LLAMA | {"hidden_sizes": 3}}}, "did you mean 'hidden_size'?"),
        ({"model": {"from_config": {"model_type": "bloom"}}}, "bloom: its layers never call packed attention"),
        ({"model": {"from_config": {"model_type": "falcon"}}}, "its attention is its own"),
        ({"optim": {"lr": 1e-3, "warmup": 11}}, "optim.warmup: 11 is 11 steps, but the run has 10"),
        ({"lora": {"targets": ["nowhere"]}}, "lora.targets"),
        ({"train": {"epochs": 1, "liger": True}}, "train.liger: needs a CUDA device"),
    ],
)
def test_a_run_that_would_not_begin_says_why(data, changes, word):
    [text] = problems(make(data, **changes))
    assert word in text


def save(folder: Path, model, words: int = WORDS) -> Path:
    model.save_pretrained(folder)
    write_tokenizer(folder, words)
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    return save(tmp_path / "model", tiny("llama", vocab_size=64))


def test_weights_are_never_read(data, saved, monkeypatch):
    (saved / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr(policy, "load_model", lambda *_, **__: pytest.fail("loads a model"))
    report = check(make(data, model=str(saved)))
    assert report.problems == []
    assert report.data.common_tokens == WORDS
    assert report.model.parameters == sum(parameter.numel() for parameter in tiny("llama", vocab_size=64).parameters())


def test_a_folder_without_weights_is_refused(data, saved):
    (saved / "model.safetensors").unlink()
    [text] = problems(make(data, model=str(saved)))
    assert "holds no *.safetensors" in text


def test_another_tokenizer_is_refused(data, saved):
    write_tokenizer(saved, WORDS + 2)  # its last words have other ids
    [text] = problems(make(data, model=str(saved)))
    assert "its tokenizer is not the one that packed the dataset" in text


def test_embeddings_that_are_to_be_resized_may_be_too_few(data):
    model = {"from_config": LLAMA | {"vocab_size": 8}}
    report = check(make(data, model=model, train={"epochs": 1, "resize_embeddings": True}))
    assert report.problems == []
    assert report.model.embeddings == WORDS


def test_a_gpu_that_is_elsewhere_decides_what_can_serve(data):
    run = make(data, attention="flash2", precision="auto")
    assert "needs a CUDA device" in problems(run)[0]
    report = check(run, "H100")
    assert report.problems == []
    assert report.model.precision == "bf16 with fp32 weights"
    assert "needs fp16 or bf16" in problems(make(data, attention="flash2"), "H100")[0]
    assert "needs a Hopper GPU" in problems(make(data, attention="flash3", precision="bf16"), "A100")[0]


def test_a_deterministic_run_may_use_what_it_makes_deterministic_itself(data):
    """SDPA is, once the trainer has told torch so; nothing else serves fp32."""
    config = make(data, precision="fp32", train={"steps": 2, "deterministic": True})
    assert problems(config, on="H100") == []


def test_reference_log_probs_that_are_not_there_are_told(tmp_path):
    pairs = small_datasets.build_chats(tmp_path, "preference")
    model = {"from_config": {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}}
    run = make(pairs, task="dpo", model=model, batch={"tokens": 800}, dpo={"reference": "precomputed"})
    [text] = problems(run)
    assert "no finished reference log-probs" in text
    assert check(run.model_copy(update={"dpo": run.dpo.model_copy(update={"reference": "model"})})).problems == []


def test_a_run_that_has_begun_is_resumed_or_refused(data, tmp_path):
    run = make(data, output=str(tmp_path / "run"), precision="auto", train={"steps": 3})
    fit(run)
    longer = run.model_copy(update={"train": run.train.model_copy(update={"steps": 10})})
    report = check(longer)
    assert (report.problems, report.resumes_after) == ([], 3)
    assert "resumes after step 3" in as_text(report)
    [text] = problems(make(data, output=str(tmp_path / "run"), train={"steps": 10, "seed": 1}))
    assert "cannot resume, because this is another run now" in text
    assert "train.seed" in text
    with pytest.raises(ConfigError, match="cannot resume"):
        fit(make(data, output=str(tmp_path / "run"), train={"steps": 10, "seed": 1}))


def small_device(size: float) -> Callable[..., Device]:
    return lambda *of: this_device(*of)._replace(name="small", memory=math.ceil(1.5 * size + 1.5e9))


def test_a_run_that_does_not_fit_says_what_would(data, monkeypatch):
    run = make(data, batch={"tokens": 8 * LENGTH, "micro_rows": 8})
    needed = check(run).memory
    assert needed is not None
    monkeypatch.setattr(module, "this_device", small_device(needed.total - 1))
    report = check(run)
    [text] = [str(problem) for problem in report.problems]
    assert text.startswith("memory: the run needs ")
    assert [change.setting for change in report.remedies] == [
        "batch.micro_rows: 4",
        "train.checkpointing: selective",
        "precision: bf16",
    ]
    assert all(change.total < needed.total and change.setting in text for change in report.remedies)
    assert "does not fit into" in as_text(report)


def test_a_run_that_nothing_makes_fit_says_so(data, monkeypatch):
    monkeypatch.setattr(module, "this_device", small_device(1000))
    assert "a smaller model, `lora`, or a device with more memory would help" in problems(make(data))[0]


BIG = LLAMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}


def test_a_run_that_needs_more_gpus_says_how_many(data, monkeypatch):
    run = make(data, model={"from_config": BIG}, precision="bf16", batch={"tokens": 8 * LENGTH})
    needed = check(run, "H100").memory
    limit = needed.total - needed.fixed // 2
    monkeypatch.setattr(Device, "room", limit)
    report = check(run, "H100")
    tp, dp, offload = (change for change in report.remedies if change.setting.startswith("parallel."))
    assert (tp.setting, dp.setting, offload.setting) == (
        "parallel.tp: 2 on 2 devices", "parallel.dp: 4 (4 devices)", "parallel.offload: true",
    )  # fmt: skip
    changed = run.model_copy(update={"parallel": run.parallel.model_copy(update={"dp": 4})})
    assert check(changed, "H100").memory.total == dp.total <= limit
    assert check(run, "H100", devices=4).problems == []


def test_devices_that_are_there_are_used_before_more_are_asked_for(data, monkeypatch):
    run = make(data, model={"from_config": BIG}, precision="bf16", batch={"tokens": 8 * LENGTH})
    monkeypatch.setattr(Device, "room", check(run, "H100", devices=2).memory.total - 1)
    settings = [change.setting for change in check(run, "H100", devices=2).remedies]
    assert "parallel.tp: 2" in settings


def test_a_model_without_a_plan_is_not_told_to_use_tp(data, monkeypatch):
    model = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    run = make(data, model={"from_config": model})
    monkeypatch.setattr(Device, "room", check(run, "H100").memory.total - 1)
    settings = [change.setting for change in check(run, "H100").remedies]
    assert not any("tp" in setting for setting in settings)
    assert "parallel.offload: true" in settings


def test_a_model_that_cannot_run_without_numbers_is_described_without_memory(data, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("numbers wanted\nmore")

    monkeypatch.setattr(module, "estimate_memory", fail)
    report = check(make(data))
    assert (report.problems, report.memory) == ([], None)
    assert "memory  not known: RuntimeError: numbers wanted" in as_text(report)


def test_a_run_over_devices_is_described(data):
    report = check(make(data, parallel={"cp": 2, "tp": 2, "replicate": 2}, batch={"tokens": 16 * LENGTH}), "H100", 16)
    assert report.problems == []
    assert report.layout == Layout(replicate=2, shard=2, cp=2, tp=2)
    assert (report.run.micro_rows, report.run.rows_at_once, report.run.micro_batches) == (1, 4, 4)
    assert report.run.device_tokens == LENGTH // 2


@pytest.mark.parametrize(
    ("layout", "first"), [(Layout(), "model     llama"), (Layout(shard=2, tp=2), "devices   4: dp 2 x tp 2 (sp)")]
)
def test_fit_says_first_how_a_run_lies_over_devices(data, layout, first):
    config, dataset, model = make(data), open_dataset(data), tiny("llama")
    plan = plan_run(dataset.train, config.batch, config.train, layout.dp)
    mesh = Mesh(layout, Place(0, 0, 0, 0), None, ALONE, ALONE, ALONE, ALONE)
    made = Setup(config, mesh, dataset, plan, model, None, None, build_task(config), {})
    assert describe(made, 0).splitlines()[0].startswith(first)


def test_devices_share_memory_and_time(data):
    run = make(data, precision="bf16", batch={"tokens": 4 * LENGTH})
    one, four = check(run, "H100"), check(run, "H100", 4)
    assert four.memory.optimizer == pytest.approx(one.memory.optimizer / 4, rel=0.01)
    assert four.time.flops_per_step == one.time.flops_per_step
    assert four.time.seconds == pytest.approx(one.time.seconds / 4)


def test_processes_of_one_cpu_share_it(data, monkeypatch):
    monkeypatch.setattr(devices, "measured_flops", lambda *_: 1e9)
    one, two = (check(make(data, parallel={"dp": dp})) for dp in (1, 2))
    assert (two.device.memory, two.device.flops) == (one.device.memory // 2, 5e8)
    assert two.time.seconds == one.time.seconds


@pytest.mark.parametrize(
    ("parallel", "changes", "word"),
    [
        ({"dp": 3, "cp": 1}, {}, "dp 3 x cp 1 x tp 1 cannot be 12 processes"),
        ({"replicate": 5}, {}, "parallel.replicate: 5 does not divide dp, which is 12"),
        ({"cp": 3}, {}, "length 16 does not divide by 3; legal for such rows: 1, 2, 4, 8, 16; or pack rows of 15"),
        ({"tp": 3}, {}, "parallel.tp: 3 does not divide llama's 4 attention heads"),
        ({"tp": 4}, {}, "2 key/value heads; legal: 1, 2"),
        ({"tp": 2}, {"lora": {}}, "adapters (lora) cannot be shared out by tp; set `parallel: {tp: 1}`"),
        ({"tp": 2}, {"model": {"from_config": {"model_type": "gpt2", "n_embd": 32, "n_head": 4}}}, "has no plan"),
        ({"cp": 6}, {}, "parallel.cp: 6 does not divide llama's 4 attention heads; legal: 1, 2, 4"),
        (
            {"cp": 3, "tp": 2},
            {},
            "parallel.cp: 3 does not divide llama's 2 attention heads (of 4, by tp 2); legal: 1, 2",
        ),
    ],
)
def test_a_layout_that_cannot_be_says_why(data, parallel, changes, word):
    found = [str(problem) for problem in check(make(data, parallel=parallel, **changes), "H100", 12).problems]
    assert any(word in text for text in found), found


def test_problems_of_a_layout_are_told_with_all_others(data):
    parallel = {"dp": 2, "cp": 3, "tp": 3, "replicate": 2}
    wrong = make(data, parallel=parallel, batch={"tokens": 81}, attention="flash2")
    found = problems(wrong)
    words = ("= 9 ranks share the tokens", "batch.tokens: 81", "attention: flash2", "parallel.tp: 3", "parallel.cp: 3")
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True)), found


def test_fit_refuses_a_layout_with_the_same_words(data):
    wrong = make(data, parallel={"sp": False}, batch={"tokens": 81}, attention="flash2")
    with pytest.raises(ConfigError) as caught:
        fit(wrong)
    assert str(caught.value).splitlines() == problems(wrong)


def test_what_a_layout_wastes_is_noted(data):
    text = as_text(check(make(data, parallel={"tp": 2}, batch={"tokens": 2 * LENGTH}), "H100", 8))
    assert "a step has 2 rows for dp 4, so 2 of these have none" in text
    odd = make(data, parallel={"tp": 2}, model={"from_config": LLAMA | {"vocab_size": 41}})
    assert "tp 2 does not divide the 41 rows of embedding and output layer" in as_text(check(odd, "H100", 2))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmt-train", "check", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (caught.value.code or 0, *capsys.readouterr())

    return called


@pytest.fixture
def path(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(make(data).model_dump(mode="json", exclude_unset=True)))
    return path


def test_the_report_is_one_aligned_table(call, path):
    code, out, err = call("--config", path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines if not line.startswith(" ")] == [
        "config", "data", "tokens", "model", "step", "run", "memory", "time",
    ]  # fmt: skip
    starts = {len(line) - len(line[17:].lstrip()) for line in lines if not line.startswith("  ")}
    assert starts == {19}
    assert "5 rows = 80 tokens, in 3 micro-batches of at most 2 rows; the last has 3 rows" in out


def test_the_report_is_data_for_a_script(call, path):
    code, out, _ = call("--config", path, "--json", "--on", "H100")
    report = json.loads(out)
    assert code == 0
    assert report["problems"] == []
    assert report["device"] == {"name": "H100 80 GB", "memory": 80 * 10**9, "room": 78.5e9, "flops": None}
    assert report["memory"]["total"] == sum(size for name, size in report["memory"].items() if name != "total")
    assert report["run"]["steps"] == 10


def test_the_report_of_many_devices_says_what_each_has(call, path):
    code, out, err = call("--config", path, "--on", "L4", "--devices", 4, "parallel={tp: 2}", "precision=bf16")
    assert (code, err) == (0, "")
    assert "devices            4: dp 2 x tp 2 (sp), each L4 24 GB" in out
    assert "in 2 micro-batches of at most 4 rows on all devices, 32 tokens on each" in out
    assert "MB on each device at the fullest moment; fits into" in out
    assert "  whole layers" in out
    assert "at 40% of L4's 121 TFLOP/s on 4 devices, communication not counted" in out.replace("L4 24 GB", "L4")


def test_the_report_of_many_devices_is_data(call, path):
    _, out, _ = call("--config", path, "--on", "L4", "--devices", 4, "parallel={tp: 2, offload: true}", "--json")
    report = json.loads(out)
    assert report["layout"] == {"devices": 4, "dp": 2, "replicate": 1, "shard": 2, "cp": 1, "tp": 2}
    assert report["sp"]
    assert report["run"]["rows_at_once"] == 4
    memory = report["memory"]
    assert memory["host"] > 0
    assert memory["total"] == sum(size for name, size in memory.items() if name not in ("total", "host"))


def test_problems_go_to_stderr_and_what_is_known_to_stdout(call, path):
    code, out, err = call("--config", path, "batch.tokens=81", "attention=flash2")
    assert code == 2
    assert err.startswith("error: batch.tokens: 81")
    assert err.count("\n") == 2
    assert "Traceback" not in err
    assert out.startswith("config  ok\ndata ")
    code, out, err = call("--config", path, "batch.tokens=81", "--json")
    assert (code, json.loads(out)["problems"]) == (2, [err.removeprefix("error: ").strip()])


def test_a_dataset_that_is_damaged_keeps_its_exit_code(call, path):
    code, _, err = call("--config", path, "data=/nowhere")
    assert (code, err.count("error: ")) == (3, 1)


def test_an_unknown_gpu_is_a_mistake_of_the_command_line(call, path):
    code, out, err = call("--config", path, "--on", "H1O0")
    assert (code, out) == (2, "")
    assert "did you mean 'H100'?" in err


def test_no_gpu_is_asked_for(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("wakes up a GPU"))
    assert check(make(data), "H100").problems == []
