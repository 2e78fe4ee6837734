"""A prefill of a sequence that is sharded over the ranks of this process's group."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import distributed

from s2o_compile.integrations.settings import configure
from s2o_compile.ops.layout import blocks_of_rank
from s2o_compile.timing import kernel_seconds

from ..prefill.budget import with_density
from ..prefill.calls import prefill_inputs
from ..prefill.models import load
from .ranks import device_of_rank, of_all, of_slowest, peak_mebibytes, seconds_of_ranks
from .row import Case, Row


def measure_prefill(case: Case, setting: float | None, logits: torch.Tensor | None) -> tuple[Row, torch.Tensor]:
    """The row of this group, and the last token's logits; `setting` is the threshold, found if it is None.

    Args:
        case: What to do.
        setting: The threshold; None to find the one for the density.
        logits: Of one rank; None if this is it.
    """
    device = device_of_rank(case.device)
    subject = load(case.subject, case.layers, device, case.dtype)
    tokens = subject.tokens(case.length, case.document)
    config = case.config
    if setting is None and case.density is not None:
        config = with_density(subject.model, prefill_inputs(tokens, None), config, case.density)
    elif setting is not None:
        config = dataclasses.replace(config, threshold=setting)
    count, rank = distributed.get_world_size(), distributed.get_rank()
    layout = case.layout if count > 1 else "contiguous"
    blocks = blocks_of_rank(rank, count, case.length // count, layout, config.ranking.segment)
    positions = torch.cat([torch.arange(b.position, b.position + b.length, device=device) for b in blocks])
    subject.model.set_attn_implementation("s2o")
    configure(subject.model, config, distributed.group.WORLD if count > 1 else None, layout)
    inputs = prefill_inputs(tokens[:, positions], None) | {"position_ids": positions[None]}

    def call() -> Any:
        return subject.model(**inputs).logits

    row = Row(subject.name, case.length, count, case.layout if count > 1 else "", setting=config.threshold)
    row.seconds, row.spread = of_slowest(seconds_of_ranks(call, device, case.repetitions))
    row.mebibytes = peak_mebibytes(call, device)
    if device.type == "cuda":
        sent = [seconds for name, seconds in kernel_seconds(call).items() if "nccl" in name.lower()]
        row.gather = max(of_all(sum(sent))) if count > 1 else None
    last = call()[0, -1].float()
    if logits is not None:
        # The last token is on the first rank in head-tail order, and on the last one in a contiguous one.
        own = float((last - logits.to(device)).square().sum() / logits.square().sum())
        row.difference = of_all(own if positions[-1] == case.length - 1 else None)[0 if layout == "head-tail" else -1]
    return row, last.cpu()
