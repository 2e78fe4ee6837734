"""A model of transformers over several processes, its heads sharded over them, compared with one process.

torchrun --nproc-per-node 2 docs/examples/tensor_parallel.py path/to/model --length 16384
"""

from __future__ import annotations

import torch
import torch.distributed
import typer
from models import Length, load
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import s2o_compile


@torch.inference_mode()
def main(model: str, length: Length = 600, threshold: float = 4e-3) -> None:
    """Prefill a prompt, once with a part of the heads in each process and once with all of them."""
    sharded = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", attn_implementation="s2o", distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()
    whole, prompt = load(model, length, attention="s2o")
    # min_length=0 takes the sparse path even for the short prompt of this example; leave it out for real ones.
    config = s2o_compile.S2OConfig(threshold=threshold, min_length=0)
    for one in (sharded, whole):
        s2o_compile.configure(one, config)
    logits, expected = (one(prompt, use_cache=False).logits for one in (sharded, whole))
    if torch.distributed.get_rank() == 0:
        print(f"largest difference {float((logits - expected).abs().max()):.1e} of {float(expected.abs().max()):.1f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
