"""Call the operator directly, on several documents packed into one sequence.

python docs/examples/documents.py --length 4096 --documents 3
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile


def main(
    length: Annotated[int, typer.Option(min=1, help="Positions.")] = 4096,
    documents: Annotated[int, typer.Option(min=1, help="Documents of about equal length.")] = 3,
    threshold: Annotated[float, typer.Option(help="0 is dense attention to rounding.")] = 4e-3,
) -> None:
    """Attend causally inside each document, and compare with SDPA and a [Lq, Lk] mask."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # As in real models, neighbouring queries look for the same keys.
    query = 4 * torch.randn(1, 8, -(-length // 64), 64, device=device).repeat_interleave(64, dim=2)[:, :, :length]
    key, value = (torch.randn(1, 2, length, 64, device=device) for _ in range(2))
    ids = torch.arange(length, device=device)[None] * documents // length  # [B, L], which document a position is of

    config = s2o_compile.S2OConfig(threshold=threshold, min_length=0)
    result = s2o_compile.attention(
        query, key, value, is_causal=True, query_documents=ids, key_documents=ids, config=config, return_stats=True
    )

    mask = (ids[:, :, None] == ids[:, None, :]).tril()
    dense = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], enable_gqa=True)
    error = (result.output - dense).square().sum() / dense.square().sum()
    visited = result.visited.sum() / (mask.sum() * query.shape[1])
    print(f"relative squared error {error:.1e}; {visited:.2f} visited pairs for each that the mask allows")


if __name__ == "__main__":
    typer.run(main)
