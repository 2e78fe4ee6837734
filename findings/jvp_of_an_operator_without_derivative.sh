#!/usr/bin/env bash
# torch 2.13.0, CPU: an operator made by torch.library.custom_op without a derivative, which multiplies by 2, has a zero
# derivative in forward mode: torch.func.jvp and jacfwd give zeros without an error. Reverse mode of the same operator,
# torch.func.grad, raises a RuntimeError.
# Seen: "jvp [0.0, 0.0, 0.0], jacfwd sum 0.0, grad RuntimeError". Exit code 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch


@torch.library.custom_op("finding::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


x = torch.ones(3)
tangent = torch.func.jvp(double, (x,), (x,))[1].tolist()
jacobian = torch.func.jacfwd(double)(x).abs().sum().item()
try:
    backward = str(torch.func.grad(lambda x: double(x).sum())(x).tolist())
except Exception as error:
    backward = type(error).__name__
print(f"torch {torch.__version__}: jvp {tangent}, jacfwd sum {jacobian}, grad {backward}")
assert (tangent, jacobian, backward) == ([0.0, 0.0, 0.0], 0.0, "RuntimeError"), "this has changed"
PYTHON
