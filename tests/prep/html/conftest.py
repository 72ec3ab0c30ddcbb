"""A dataset that tries to break out of a page."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_tokenizers

from llmt_prep.config import MixConfig
from llmt_prep.pipeline import build_dataset

ATTACKS = [
    "<script>window.broken = 1</script>",
    "</script></style></textarea><img src=x onerror='window.broken = 2'>",
    '"\'><svg onload="window.broken = 3"> --> ]]> <!-- &lt;b&gt; &#60;i&#62;',
    "{{ 7 * 7 }} {% for x in y %} \\u003cscript>",
    "\x00\x07\x1b[31m\x7f\x9b \u202e\u2066 \u2028 naïve 🙂 日本語 <|endoftext|>",
]


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, file names and the dataset's own name hold markup, quotes and control characters."""
    folder = tmp_path_factory.mktemp("hostile") / "<b onclick='x'>\"&amp;"
    folder.mkdir()
    texts = [f"{attack} {number}" for number in range(4) for attack in ATTACKS]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "<img src=x onerror=alert(1)>&\"'.jsonl").write_text(lines, "utf-8")
    pq.write_table(pa.table({"text": texts}), folder / "\x1b[31m.parquet")
    saved = small_tokenizers.save(
        small_tokenizers.byte_level_bpe(), folder / "tokenizer", eos_token=small_tokenizers.EOT
    )
    mix = {
        "output": folder / "<script>window.broken = 4<", "tokenizer": str(saved), "sequence": {"length": 512},
        "holdout": {"fraction": 0.2},
        "sources": {"näme.1-_": {"path": str(folder / "*.jsonl")}, "b" * 60: {"path": str(folder / "*.parquet")}},
    }  # fmt: skip
    return build_dataset(MixConfig.model_validate(mix), workers=1).path
