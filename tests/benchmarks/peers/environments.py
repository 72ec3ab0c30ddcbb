"""Throw-away environments: one for each peer, because their requirements exclude each other.

`python_of(peer, folder)` makes what is missing with `python -m venv` and pip; remove the folder and nothing is left.
They need 10 GB, most of it torch. Wherever the peer allows it, the tokenizer library is the one llmt was tested with.
"""

import subprocess
import sys
import venv
from pathlib import Path

TOKENIZERS = "tokenizers==0.23.3"
TORCH = "torch==2.13.0"

PACKAGES = {
    "datatrove": ("datatrove==0.10.1", "orjson==3.13.0", TOKENIZERS),
    "datasets": ("datasets==5.2.0", TOKENIZERS),
    "trl": ("trl==1.16.0", "transformers==5.23.0", "datasets==5.2.0", TOKENIZERS, TORCH),
    "litdata": ("litdata==0.2.76", TOKENIZERS, TORCH),
    # Needs transformers < 5, so an older tokenizers; and a torchvision, which works only with the torch that the
    # package index has (`===` passes over builds for CPUs alone, such as 2.13.0+cpu).
    "mosaicml": ("mosaicml-streaming==0.13.0", "tokenizers==0.22.2", "torch===2.13.0"),
    "olmo": ("ai2-olmo-core==3.0.0", TORCH),
}


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's environment under ``folder``; installs what is missing."""
    environment = folder.absolute() / peer
    python, stamp = environment / "bin" / "python", environment / "installed"
    wanted = " ".join((sys.version.split()[0], *PACKAGES[peer]))
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {peer} into {environment}", file=sys.stderr)
        venv.create(environment, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", *PACKAGES[peer]], check=True)
        stamp.write_text(wanted)
    return python
