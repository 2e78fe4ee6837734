"""Generate text with a sparse prefill, without torch.compile.

python docs/examples/generate.py path/to/model --length 16384
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from models import Length, Model, load

import s2o_compile


def main(
    model: Model = None,
    length: Length = 512,
    threshold: Annotated[float, typer.Option(help="0 is dense attention to rounding.")] = 4e-3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 16,
) -> None:
    """Generate from one prompt with sparse and with dense attention and compare."""
    loaded, prompt = load(model, length, attention="s2o")
    # min_length=0 takes the sparse path even for the short prompt of this example; leave it out for real ones.
    s2o_compile.configure(loaded, s2o_compile.S2OConfig(threshold=threshold, min_length=0))
    with s2o_compile.profile() as profile:
        sparse = loaded.generate(prompt, max_new_tokens=tokens, do_sample=False)[:, length:]
    print(profile)

    loaded.set_attn_implementation("sdpa")
    dense = loaded.generate(prompt, max_new_tokens=tokens, do_sample=False)[:, length:]
    same = int(torch.cumprod(sparse == dense, dim=1).sum())
    print(f"The first {same} of {tokens} tokens are those of dense attention.")


if __name__ == "__main__":
    typer.run(main)
