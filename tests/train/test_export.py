"""An exported folder is what plain transformers needs, and the check would notice if it were not."""

import errno
import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from train.tiny_dataset import WORDS, write_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmt_shared.errors import ConfigError, DataError, FormatError
from llmt_train import export as export_module
from llmt_train.config import RunConfig
from llmt_train.export import export, load_checkpoint_model
from llmt_train.fit import fit

LLAMA = {
    "model_type": "llama", "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA2 = {
    "model_type": "gemma2", "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "sliding_window": 8, "query_pre_attn_scalar": 8,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}


def train(folder: Path, model: object) -> Path:
    data = folder / "data"
    if not data.exists():
        write_dataset(data)
    settings = {
        "task": "pretrain", "model": model, "data": data, "output": folder / "run", "batch": {"tokens": 64},
        "train": {"steps": 2}, "optim": {"lr": 1e-2},
    }  # fmt: skip
    fit(RunConfig.model_validate(settings))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("llama"), {"from_config": LLAMA})


def test_the_check_passes_and_says_by_how_much_they_differ(run: Path, tmp_path: Path) -> None:
    result = export(run, tmp_path / "model", check=True)
    assert result.largest_difference is not None
    assert result.largest_difference <= 1e-5
    assert result.bytes == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert result.checkpoint.endswith("step-00000002")


@pytest.mark.parametrize("model", [GPT2, GEMMA2], ids=["gpt2", "gemma2"])
def test_other_families_pass_too(tmp_path: Path, model: dict) -> None:
    result = export(train(tmp_path, {"from_config": model}), tmp_path / "model", check=True)
    assert result.largest_difference is not None
    assert result.largest_difference <= 1e-5


def test_files_are_no_larger_than_wanted_and_are_read_as_one_model(run: Path, tmp_path: Path) -> None:
    result = export(run, tmp_path / "model", check=True, max_shard=20_000)
    sizes = [path.stat().st_size for path in (tmp_path / "model").glob("model-*-of-*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) < 22_000  # with its header
    assert result.bytes == sum(sizes)


def test_the_config_is_as_transformers_writes_it(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text()
    config = json.loads(text)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["dtype"], config["use_cache"], config["eos_token_id"]) == ("float32", True, WORDS - 1)
    assert "llmt" not in text
    assert "attn_implementation" not in text
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == WORDS - 1


def test_plain_transformers_generates_with_it(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "model")
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    output = model.generate(**tokenizer("w1 w2 w3", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert output.shape[1] > 3


def test_the_tokenizer_and_template_are_the_datasets(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    bare = Tokenizer.from_file(str(run.parent / "data" / "tokenizer" / "tokenizer.json"))
    assert loaded("w1 w7 </s> zzz")["input_ids"] == bare.encode("w1 w7 </s> zzz").ids
    assert loaded.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1"
    assert loaded.eos_token == "</s>"


def test_a_pretrained_model_is_trained_on_and_exported(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "first")
    shutil.copytree(run.parent / "data", tmp_path / "data")
    again = train(tmp_path, str(tmp_path / "first"))
    result = export(again, tmp_path / "second", check=True)
    assert result.largest_difference is not None
    models = [load_checkpoint_model(path) for path in (run / "checkpoints" / "step-00000002", Path(result.checkpoint))]
    pairs = zip(*(model.parameters() for model in models), strict=True)
    assert all(0 < (a - b).abs().max() < 0.1 for a, b in pairs)  # moved on from where it was


def test_a_model_with_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"w1": 2, "w2": 1}
    path.write_text(json.dumps(content))
    shutil.copytree(run.parent / "data", tmp_path / "data")
    with pytest.raises(ConfigError, match=r"2 tokens differ, first: 'w1' is 1 in the dataset, 2 in the model's"):
        train(tmp_path, str(tmp_path / "model"))


def test_a_checkpoint_of_choice_is_exported(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints" / "step-00000002"
    assert export(folder, tmp_path / "model").checkpoint == str(folder)


def test_a_folder_that_holds_something_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    export(run, tmp_path / "model")  # empty: fine
    with pytest.raises(ConfigError, match=r"holds something already.*--force"):
        export(run, tmp_path / "model")
    export(run, tmp_path / "model", force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is no earlier export"):
        export(run, tmp_path / "mine", force=True)


def test_the_check_notices_wrong_weights_and_writes_nothing(run: Path, tmp_path: Path, monkeypatch) -> None:
    load = export_module.load_checkpoint_model

    def load_and_spoil(checkpoint: Path) -> nn.Module:
        model = load(checkpoint)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight *= 1.01
        return model

    monkeypatch.setattr(export_module, "load_checkpoint_model", load_and_spoil)
    with pytest.raises(FormatError, match="differ from ours by"):
        export(run, tmp_path / "model", check=True)
    assert list(tmp_path.iterdir()) == []


def test_the_check_notices_a_wrong_tokenizer(run: Path, tmp_path: Path, monkeypatch) -> None:
    class Wrong:
        @staticmethod
        def from_pretrained(path: Path, trust_remote_code: bool):
            return lambda text: {"input_ids": [0]}

    monkeypatch.setattr(export_module, "AutoTokenizer", Wrong)
    with pytest.raises(FormatError, match=r"AutoTokenizer builds .*PreTrainedTokenizerFast\.from_pretrained"):
        export(run, tmp_path / "model", check=True)


def test_a_checkpoint_or_the_working_folder_is_never_replaced(run: Path, tmp_path: Path, monkeypatch) -> None:
    folder = shutil.copytree(run, tmp_path / "run") / "checkpoints" / "step-00000002"
    with pytest.raises(ConfigError, match="is a checkpoint"):
        export(folder, folder, force=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="name a folder"):
        export(folder, Path())


def changed(run: Path, folder: Path, name: str, **keys: object) -> Path:
    """A copy of the run whose checkpoint has further keys in one of its JSON files."""
    checkpoint = shutil.copytree(run, folder) / "checkpoints" / "step-00000002"
    path, state = checkpoint / name, json.loads((checkpoint / "state.json").read_text())
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    state["files"][name], state["checksums"][name] = path.stat().st_size, zlib.crc32(path.read_bytes())
    (checkpoint / "state.json").write_text(json.dumps(state))
    return checkpoint


def test_generation_settings_that_transformers_would_not_save_are_kept(run: Path, tmp_path: Path) -> None:
    source = changed(run, tmp_path / "run", "generation_config.json", temperature=0.6, do_sample=False)
    export(source, tmp_path / "model", check=True)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (written["temperature"], written["eos_token_id"]) == (0.6, WORDS - 1)


def test_no_code_is_named_that_is_not_there(run: Path, tmp_path: Path) -> None:
    source = changed(run, tmp_path / "run", "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    export(source, tmp_path / "model", check=True)
    assert "auto_map" not in (tmp_path / "model" / "config.json").read_text()


def test_weights_that_cannot_be_written_are_named(run: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "write_files", full)
    with pytest.raises(DataError, match=r"cannot be written: .*No space left"):
        export(run, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_whose_parts_do_not_fit_is_named(run: Path, tmp_path: Path) -> None:
    folder = changed(run, tmp_path / "run", "config.json", num_hidden_layers=3)
    with pytest.raises(FormatError, match=r"the weights do not fit config\.json"):
        export(folder, tmp_path / "model")


def test_a_checkpoint_without_its_runs_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "checkpoints" / "step-00000002", tmp_path / "a" / "b")
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        export(folder, tmp_path / "model")
