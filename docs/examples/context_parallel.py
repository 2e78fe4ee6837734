"""A prompt sharded over several processes, each with some of its tokens, compared with one process.

torchrun --nproc-per-node 2 docs/examples/context_parallel.py path/to/model --length 16384
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import typer
from models import Length, load

import s2o_compile


@torch.inference_mode()
def main(model: str, length: Length = 600, threshold: float = 4e-3) -> None:
    """Prefill a prompt, once with a part of the tokens in each process and once with all of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = dist.init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("cp",))
    rank, ranks = mesh.get_local_rank(), mesh.size()
    loaded, prompt = load(model, length, attention="s2o")
    prompt = prompt[:, : length // (2 * ranks) * (2 * ranks)]
    # min_length=0 takes the sparse path even for the short prompt of this example; leave it out for real ones.
    config = s2o_compile.S2OConfig(threshold=threshold, min_length=0)
    s2o_compile.configure(loaded, config)
    expected = loaded(prompt).logits

    blocks = torch.arange(prompt.shape[1], device=prompt.device).chunk(2 * ranks)
    own = torch.cat([blocks[rank], blocks[2 * ranks - 1 - rank]])  # Head-tail: as much work on each rank.
    s2o_compile.configure(loaded, config, mesh["cp"])
    logits = loaded(prompt[:, own], position_ids=own[None]).logits
    difference = (logits - expected[:, own]).abs().max()
    print(f"rank {rank}: largest difference {float(difference):.1e} of {float(expected.abs().max()):.1f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
