"""The command line: exit codes, one clear message for each mistake, nothing heavy loaded for --help."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llmt_shared.dataset import open_dataset

HEAVY = ("torch", "zarr", "numba", "datasets", "transformers")
COMMAND = [sys.executable, "-m", "llmt_prep"]


def run(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, **more)


def written(mix: dict[str, Any], path: Path) -> Path:
    with path.open("w") as file:
        YAML().dump(mix, file)
    return path


def error_of(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The one message of a failed command; no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    message = [line for line in result.stderr.splitlines() if line.startswith(("error:", "stopped:"))]
    assert len(message) == 1
    return result.stderr[result.stderr.index(message[0]) :]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pack", "--help"], ["verify", "--help"], ["cache", "prune", "--help"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom llmt_prep.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_no_command_and_no_reader_loads_torch(mix: dict[str, Any], corpus_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    table = pa.table({"text": [f"document {i}" for i in range(40)]})
    pq.write_table(table, tmp_path / "a.parquet")
    Dataset(table).save_to_disk(tmp_path / "saved")
    mix["sources"] |= {
        "parquet": {"path": str(tmp_path / "a.parquet")},
        "arrow": {"path": str(tmp_path / "saved")},
        "hub": {"hf": str(corpus_dir / "help")},
    }
    path = written(mix, tmp_path / "mix.yaml")
    output = mix["output"]
    commands = [
        ["pack", "--mix", str(path), "--workers", "1", "--dry-run"],
        ["pack", "--mix", str(path), "--workers", "1"],
        ["stats", output],
        ["inspect", output, "--row", "0"],
        ["verify", output],
        ["schema"],
    ]
    code = (
        "import sys\nfrom llmt_prep.cli import app\n"
        f"for command in {commands!r}:\n"
        "    try: app(command)\n"
        "    except SystemExit as stop: assert not stop.code, (command, stop.code)\n"
        "    assert 'torch' not in sys.modules, command\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert open_dataset(output).sources == ("help", "more", "plain", "parquet", "arrow", "hub")


def test_pack_of_lines_loads_no_pandas(mix: dict[str, Any], tmp_path: Path) -> None:
    path = written(mix, tmp_path / "mix.yaml")
    code = (
        "import sys\nfrom llmt_prep.cli import app\n"
        f"try: app(['pack', '--mix', {str(path)!r}, '--workers', '1'])\n"
        "except SystemExit: print([name for name in ('pandas', 'numba', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_pack_prints_its_result_on_stdout_and_the_rest_on_stderr(mix: dict[str, Any], tmp_path: Path) -> None:
    result = run("pack", "--mix", written(mix, tmp_path / "mix.yaml"), "--json", "--workers", "1")
    assert result.returncode == 0
    summary = json.loads(result.stdout)
    assert summary["digest"] == open_dataset(mix["output"]).digest
    assert "tokenize" in result.stderr


def test_all_config_mistakes_come_at_once_with_their_lines(mix: dict[str, Any], tmp_path: Path) -> None:
    mix |= {"sead": 1, "sequence": {"length": 1}, "budget": "20X"}
    mix["sources"]["help"] = {"path": "x", "weight": 1, "epochs": 2, "feild": "body"}
    message = error_of(run("pack", "--mix", written(mix, tmp_path / "mix.yaml")), 2)
    for wanted in (
        r"sead: unknown key, did you mean 'seed'",
        "sequence.length: a row of 1 token has no target",
        "budget: found '20X'; wanted a size",
        "sources.help: says weight and epochs",
        "sources.help.feild: unknown key",
    ):
        assert wanted in message
    assert all(f"{tmp_path}/mix.yaml:" in line for line in message.splitlines())


def _broken(mix: dict[str, Any], folder: Path) -> Iterator[tuple[str, dict[str, Any], int, str]]:
    def source(name: str, content: bytes, **more: Any) -> dict[str, Any]:
        (folder / name).write_bytes(content)
        return {"sources": {"a": {"path": str(folder / name)} | more}, "holdout": {"fraction": 0}}

    good = b'{"text": "some words here"}\n'
    yield "missing file", {"sources": {"a": {"path": "no/such/*.jsonl"}}}, 2, "no/such/*.jsonl"
    yield "missing tokenizer", {"tokenizer": str(folder / "none")}, 2, "no such tokenizer"
    yield "empty source", source("empty.jsonl", b""), 1, "sources.a: no documents"
    yield "wrong field", source("field.jsonl", good, text_field="body"), 1, "field.jsonl:1: "
    yield "not a string", source("number.jsonl", b'{"text": 5}\n'), 1, "number.jsonl:1: "
    yield "invalid UTF-8", source("latin.jsonl", b'{"text": "\xff"}\n'), 1, "latin.jsonl:1: "
    yield "lone surrogate", source("surrogate.jsonl", b'{"text": "\\ud800"}\n'), 1, "surrogate.jsonl:1: "
    yield "broken line", source("broken.jsonl", good + b'{"text": \n'), 1, "broken.jsonl:2: "
    yield "truncated gzip", source("cut.jsonl.gz", b"\x1f\x8b\x08\x00"), 1, "cut.jsonl.gz"
    yield "budget not met", source("small.jsonl", good, weight=1) | {"budget": "1M"}, 2, "sources.a"
    yield "weight without budget", source("w.jsonl", good, weight=1), 2, "`budget` is needed"
    yield (
        "control string",
        source("c.jsonl", b'{"text": "<|pad|>"}\n') | {"special_tokens_in_text": "error"},
        1,
        "c.jsonl:1",
    )


@pytest.mark.parametrize("case", range(12))
def test_bad_input_gets_one_message_with_place_and_code(case: int, mix: dict[str, Any], tmp_path: Path) -> None:
    name, change, code, wanted = list(_broken(mix, tmp_path))[case]
    message = error_of(run("pack", "--mix", written(mix | change, tmp_path / "mix.yaml"), "--workers", "1"), code)
    assert wanted in message, name
    assert not Path(mix["output"]).exists()


def test_there_are_as_many_bad_cases_as_are_run(mix: dict[str, Any], tmp_path: Path) -> None:
    assert len(list(_broken(mix, tmp_path))) == 12


def test_the_cache_is_explained_listed_and_pruned(mix: dict[str, Any], tmp_path: Path) -> None:
    path = written(mix, tmp_path / "mix.yaml")

    def told(*arguments: str) -> Any:
        result = run(*arguments, "--mix", path, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    assert told("pack", "--explain-cache")["sources"]["help"]["reasons"][0]["why"] == ["never seen"]
    assert not Path(mix["output"]).parent.exists()
    told("pack", "--workers", "1")
    assert told("cache", "list")["units"] == 13
    assert told("cache", "prune", "--unused-by", str(path))["kept_units"] == 13
    assert told("cache", "prune", "--max-size", "0", "--dry-run")["removed_units"] == 13
    assert told("cache", "prune", "--older-than", "1d", "--max-size", "10GB")["removed_units"] == 0
    assert told("pack", "--explain-cache")["sources"]["help"]["reused"]["units"] == 2


def test_two_packs_that_share_a_cache_at_once_make_the_same_dataset(mix: dict[str, Any], tmp_path: Path) -> None:
    path, outputs = written(mix, tmp_path / "mix.yaml"), [tmp_path / "out" / name for name in ("one", "two")]
    processes = [
        subprocess.Popen([*COMMAND, "pack", "--mix", str(path), f"output={output}", "--workers", "1"])
        for output in outputs
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert open_dataset(outputs[0]).digest == open_dataset(outputs[1]).digest
    assert json.loads(run("cache", "list", tmp_path / "out" / ".llmt-cache", "--json").stdout)["leftovers"] == 0


def test_a_cache_must_be_said_and_be_one(tmp_path: Path, mix: dict[str, Any]) -> None:
    assert "wanted either its folder or --mix" in error_of(run("cache", "list"), 2)
    assert "no cache of llmt-prep" in error_of(run("cache", "prune", tmp_path), 2)
    assert "wanted minutes, hours, days or weeks" in error_of(run("cache", "prune", tmp_path, "--older-than", "1y"), 2)


def test_a_dataset_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "no such dataset" in error_of(run("stats", tmp_path / "none"), 3)
    assert "holds no MANIFEST.json" in error_of(run("inspect", tmp_path, "--row", "0"), 3)


def test_two_runs_on_one_output_the_second_says_who_holds_it(mix: dict[str, Any], tmp_path: Path) -> None:
    from llmt_prep.staging import locked

    with locked(Path(mix["output"])):
        message = error_of(run("pack", "--mix", written(mix, tmp_path / "mix.yaml")), 2)
    assert f"process {os.getpid()} on " in message


def test_a_full_disk_ends_with_4_and_goes_on_when_there_is_room(mix: dict[str, Any], tmp_path: Path) -> None:
    import resource

    path = written(mix | {"cache": str(tmp_path / "cache")}, tmp_path / "mix.yaml")

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the tokens of one shard are more

    message = error_of(run("pack", "--mix", path, "--workers", "1", preexec_fn=no_room), 4)
    assert "no room left on the disk" in message
    assert run("pack", "--mix", path, "--workers", "1").returncode == 0
    assert open_dataset(mix["output"]).train.num_rows


def test_sigterm_ends_with_4_and_says_how_to_go_on(mix: dict[str, Any], tmp_path: Path) -> None:
    path = written(mix | {"engine": "tokenizers"}, tmp_path / "mix.yaml")
    process = subprocess.Popen([*COMMAND, "pack", "--mix", str(path)], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("out/.llmt-cache/units/*/.*.tmp")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate()
    assert process.returncode == 4, log
    assert "stopped: by SIGTERM; nothing is lost: run the same command again" in log


def test_schema_is_a_json_schema_of_the_mix() -> None:
    for arguments in ([], ["--json"]):
        schema = json.loads(run("schema", *arguments).stdout)
        assert {"sources", "budget", "sequence"} <= schema["properties"].keys()
        assert schema["additionalProperties"] is False
