"""Peak memory of an export above what its process has before, for a checkpoint of 1.3 GB, each way in its own process.

    PYTHONPATH=tests python tests/benchmarks/export_memory.py [--layers 16] [--hidden 1024] [--max-shard 500000000]

The checkpoint is a Llama's with random weights in fp32, as one process writes it. Ways: tensor by tensor, and the whole
model at once, as it has to be where adapters are merged.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("streamed", "whole")
_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 16,
           "num_key_value_heads": 16, "tie_word_embeddings": False, "vocab_size": 32_000}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--max-shard", type=int, default=500_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size, largest = build(Path(folder) / "run", options.layers, options.hidden)
        shard = options.max_shard / 1e6
        print(f"checkpoint {size / 1e6:,.0f} MB, largest tensor {largest / 1e6:,.0f} MB, files of {shard:,.0f} MB")
        print("way        growth of the peak, MB   seconds")
        for way in WAYS:
            found = in_process(Path(folder) / "run", way, options.max_shard)
            print(f"{way:10} {found['growth'] / 1e6:23,.0f}   {found['seconds']:7.1f}", flush=True)


def build(run: Path, layers: int, hidden: int) -> tuple[int, int]:
    """Write a run's folder; return the bytes of its weights and of the largest tensor."""
    import torch
    from train.tiny_dataset import write_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmt_train import checkpoints

    config = _CONFIG | {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model = skeleton.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_()
    state = checkpoints.State(step=1, rows_consumed=1, rows_per_step=1, digest="", seed=0)
    documents = {
        "config.yaml": {"precision": "fp32", "lora": None},
        "config.json": config,
        "generation_config.json": {},
    }
    snapshot = checkpoints.take({}, model, [], trained_alone=False)
    checkpoints.save_checkpoint(run, state, documents, lambda folder: checkpoints.save_training(folder, snapshot))
    write_tokenizer(run / "tokenizer")
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return sum(sizes), max(sizes)


def in_process(run: Path, way: str, max_shard: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(run), way, str(max_shard)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(run: Path, way: str, max_shard: int) -> dict[str, float]:
    """Export, after everything is imported; bytes of resident memory and seconds."""
    from llmt_train import export as exporting

    if way == "whole":
        exporting._stream = lambda *_: False
    before, begun = resident("VmRSS"), time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    exporting.export(run, run.parent / way, max_shard=max_shard, force=True)
    return {"growth": resident("VmHWM") - before, "seconds": time.monotonic() - begun}


def resident(field: str) -> int:
    """Bytes of this process, mapped pages included."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
    else:
        main()
