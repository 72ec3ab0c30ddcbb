#!/usr/bin/env bash
# Fetches into .whl/ what the GPU suite needs on a machine without a network that has torch, lightning, transformers,
# typer, rich, numpy and safetensors, but nothing else: wheels for CPython 3.12 on x86-64 Linux, in a few MB.
#   PYTHON_TAG=3.13 bash scripts/gpu_wheels.sh
# There, in the source tree:
#   python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl && export PYTHONPATH=/tmp/site
#   bash scripts/gpu_suite.sh
# flash-attn is not among them: its wheels are made for one torch, one CUDA and one C++ ABI each, and are above the
# 64 MiB that may be carried; the suite tells it as absent.
set -euo pipefail
cd "$(dirname "$0")/.."

needed="pydantic pydantic_core annotated-types typing-inspection typing_extensions ruamel.yaml"
pinned=()
for name in $needed; do
    pinned+=("$(grep -i "^$name==" constraints.txt)")
done
pinned+=("liger-kernel==0.8.5")  # an extra, and so not in constraints.txt

platforms=()
for version in 2_34 2_28 2_27 2_17 2_12 2_5; do
    platforms+=(--platform "manylinux_${version}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

rm -rf .whl
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "${PYTHON_TAG:-3.12}" --implementation cp "${platforms[@]}" --dest .whl "${pinned[@]}"

size=$(du -sm .whl | cut -f1)
ls -l .whl
if [ "$size" -gt 60 ]; then
    echo "error: .whl holds $size MB, more than what may be carried" >&2
    exit 1
fi
