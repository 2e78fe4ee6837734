"""A serving loop: prompts are prefilled in chunks into one static cache, then answered token by token.

python docs/examples/serving.py path/to/model --length 16384 --chunk 4096
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from models import Length, Model, load
from transformers import StaticCache

import s2o_compile


def prefill(model: Any, prompt: torch.Tensor, cache: StaticCache, chunk: int) -> torch.Tensor:
    """Fill the cache with a prompt [1, L], `chunk` tokens a call; gives the most likely next token [1, 1].

    Each chunk attends to all keys in the cache: causal with an offset. Chunks should be much longer than a segment
    (32 queries), and see enough keys, or the call runs dense.
    """
    for part in prompt.split(chunk, dim=1):
        output = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1)


def decode(model: Any, token: torch.Tensor, cache: StaticCache, count: int) -> list[int]:
    """Greedily generate `count` tokens, `token` [1, 1] first. Calls of one query run dense."""
    answer = [int(token)]
    while len(answer) < count:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        answer.append(int(token))
    return answer


@torch.inference_mode()
def main(
    model: Model = None,
    length: Length = 600,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a call of the prefill.")] = 256,
    threshold: Annotated[float, typer.Option(help="0 is dense attention to rounding.")] = 4e-3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 8,
) -> None:
    """Serve three requests of different lengths, one after the other."""
    loaded, prompt = load(model, length, attention="s2o")
    # min_length=0 takes the sparse path even for the short prompts of this example; leave it out for real ones.
    s2o_compile.configure(loaded, s2o_compile.S2OConfig(threshold=threshold, min_length=0))
    cache = StaticCache(config=loaded.config, max_cache_len=length + tokens)
    for request in (prompt, prompt[:, : length // 2], prompt[:, length // 3 :]):
        cache.reset()
        start = time.perf_counter()
        first = prefill(loaded, request, cache, chunk)
        seconds = time.perf_counter() - start
        answer = decode(loaded, first, cache, tokens)
        print(f"{request.shape[1]} tokens, first answer after {seconds:.2f} s: {answer}")


if __name__ == "__main__":
    typer.run(main)
