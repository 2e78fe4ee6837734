#!/usr/bin/env bash
# torch 2.13.0, CPU: nn.TransformerEncoderLayer in evaluation, under autocast to bfloat16 and without gradients, returns
# bfloat16 uncompiled (its fast path) and float32 under torch.compile's own backends aot_eager and inductor.
# Seen: "eager bfloat16, aot_eager float32". Exit code 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(32, 4, 16, dropout=0.0, batch_first=True).eval()
x = torch.randn(1, 13, 32)


def encode(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x)


with torch.inference_mode():
    eager, compiled = encode(x).dtype, torch.compile(encode, backend="aot_eager")(x).dtype
print(f"torch {torch.__version__}: eager {eager}, aot_eager {compiled}")
assert (eager, compiled) == (torch.bfloat16, torch.float32), "this has changed"
PYTHON
