"""Export a model with sparse attention in its graph, and package it with AOTInductor.

python docs/examples/export.py path/to/model --output model.pt2
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from models import Length, Model, load
from torch.export import Dim

import s2o_compile


class Logits(torch.nn.Module):
    """A language model as a function of token ids [B, L] alone; gives the logits [B, L, vocabulary]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits of all positions."""
        return self.model(input_ids, use_cache=False).logits


def main(
    model: Model = None,
    length: Length = 256,
    output: Annotated[Path, typer.Option(help="The package to write.")] = Path("model.pt2"),
) -> None:
    """Export for any length, compile ahead of time, load the package and compare it with the dense model."""
    loaded, prompt = load(model, length, attention="sdpa")
    wrapped = Logits(loaded)
    config = s2o_compile.S2OConfig(threshold=1e-3, min_length=0)
    program = s2o_compile.export(wrapped, (prompt,), dynamic_shapes=({1: Dim.AUTO},), config=config)
    torch._inductor.aoti_compile_and_package(program, package_path=str(output))

    run = torch._inductor.aoti_load_package(str(output))
    for ids in (prompt, prompt[:, : length // 2]):
        with torch.no_grad():
            dense = wrapped(ids)
        error = (run(ids) - dense).square().sum() / dense.square().sum()
        print(f"{ids.shape[1]} tokens: relative squared error of the logits {error:.1e}")


if __name__ == "__main__":
    typer.run(main)
