"""The command line: fast help, one message per failure, the right exit code, results on stdout only."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from train.tiny_dataset import WORDS, write_dataset

from llmt_train.cli import main
from llmt_train.config import RunConfig
from llmt_train.watch.metrics import read_metrics

Call = Callable[..., tuple[int, str, str]]
CONFIG = """\
task: pretrain
model:
  from_config: {{model_type: llama, vocab_size: {words}, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,
                num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 32}}
data: {folder}/data
output: {folder}/run
batch: {{tokens: 80, micro_rows: 2}}
train: {{steps: 60}}
optim: {{lr: 1e-2}}
save: {{every: 7}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_dataset(folder / "data")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, words=WORDS))
    return folder


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmt_train.cli", *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(*arguments: object) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The console script, without the seconds that a process of its own takes to load torch."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmt-train", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (caught.value.code or 0, *capsys.readouterr())

    return called


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    while process.poll() is None and not any(record["step"] >= step for record in read_metrics(output)):
        time.sleep(0.001)


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(output) if "loss" in record]


def test_killed_stopped_and_resumed_from_the_command_line(folder: Path) -> None:
    fit = ("fit", "--config", folder / "run.yaml")
    process = start(*fit)
    wait_for_step(process, folder / "run", 23)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    logged = max(record["step"] for record in read_metrics(folder / "run"))  # what the run logs again is cut first
    process = start(*fit)
    wait_for_step(process, folder / "run", 1 + logged)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (4, "")
    assert "stopped: " in err
    assert "run the same command again to resume" in err

    code, out, err = run(*fit, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == 60
    assert result["resumed_from"] >= 24
    assert "Warning" not in err

    code, out, err = run(*fit, f"output={folder}/whole")
    assert code == 0, err
    assert out.startswith("60 steps, 4,800 tokens: loss ")
    assert losses(folder / "run") == losses(folder / "whole")

    code, out, err = run("export", folder / "run", folder / "exported", "--check", "--json")
    assert code == 0, err
    assert json.loads(out)["largest_difference"] <= 1e-5


def test_all_mistakes_of_a_config_come_in_one_message(folder: Path, call: Call) -> None:
    path = folder / "wrong.yaml"
    path.write_text((folder / "run.yaml").read_text().replace("lr: 1e-2", "lr: fast").replace("steps: 60", "step: 60"))
    code, out, err = call("fit", "--config", path)
    assert (code, out) == (2, "")
    assert f"{path}:8: train.step: unknown key, did you mean 'steps'?" in err
    assert f"{path}:9: optim.lr: found 'fast'" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data=/nowhere", 3, "/nowhere: no such dataset"),
        ("batch.tokens=81", 2, "nearest legal values: 80 and 96"),
        ("model=/no/such/folder/anywhere", 2, "/no/such/folder/anywhere"),
        ("model.from_config.hidden_sizes=3", 2, "did you mean 'hidden_size'?"),
        ("optim.lr", 2, "is not an override"),
        ("attention=flash2", 2, "flash2"),
    ],
)
def test_a_failure_is_one_message_with_its_exit_code(
    folder: Path, override: str, code: int, message: str, call: Call
) -> None:
    found, out, err = call("fit", "--config", folder / "run.yaml", f"output={folder}/other", override)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert err.count("error: ") == 1


def test_a_size_of_files_that_is_none_is_told(folder: Path, call: Call) -> None:
    code, out, err = call("export", folder / "run", folder / "x", "--max-shard", "many")
    assert (code, out) == (2, "")
    assert "--max-shard: " in err
    assert "many" in err


def test_a_run_that_does_not_exist_is_no_source_of_an_export(folder: Path, call: Call) -> None:
    code, out, err = call("export", folder / "nowhere", folder / "x")
    assert (code, out) == (2, "")
    assert "no such folder; wanted the `output` of `llmt-train fit`" in err


def test_a_folder_without_a_run_is_no_source_of_an_export(folder: Path, call: Call, tmp_path: Path) -> None:
    code, out, err = call("export", tmp_path, folder / "x")
    assert (code, out) == (3, "")
    assert "no complete checkpoint" in err


def test_the_schema_is_that_of_the_config(call: Call) -> None:
    code, out, _ = call("schema")
    assert code == 0
    assert json.loads(out) == RunConfig.model_json_schema()


@pytest.mark.parametrize("command", [[], ["fit"], ["check"], ["validate"], ["export"], ["schema"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    program = (
        "import sys; from llmt_train.cli import app\n"
        f"try: app({[*command, '--help']!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'pyarrow', 'zarr', 'numba', 'numpy'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Usage" in result.stdout
    assert result.stdout.endswith("HEAVY []\n")


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "llmt_train", "--version"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.startswith("llmt ")
