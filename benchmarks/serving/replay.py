"""Single calls of attention on a batch as vLLM packs it: requests that decode, and a part of a long prompt."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn

import s2o_compile
from s2o_compile.ops import S2OConfig
from s2o_compile.timing import Run, gpu_seconds, interleaved, median_and_spread, settled, wall_seconds, warm_up

from ..inputs import Structure
from ..speed.measure import diffuseness
from ..speed.shapes import SHAPES
from .row import CONTIGUOUS, DENSE, REPLAY, S2O, VARLEN, Case, Row, sparse_calls

CAUSAL = (-1, 0)
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""What lets `varlen_attn` take fewer KV heads; older releases have no such argument."""


class Batch(NamedTuple):
    """Requests that decode, and then the part of a prompt.

    Attributes:
        query: [T, Hq, D], packed.
        key: [sum of `keys`, Hkv, D] packed, or pages [blocks, block size, Hkv, D].
        value: As `key`.
        table: [N, M], the pages of each request; None where keys are packed.
        queries: Of each request.
        keys: Of each request.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor | None
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def in_pages(self, size: int) -> Batch:
        """The same with keys in pages of this size, in no order."""
        counts = [-(-keys // size) for keys in self.keys]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).to(self.query.device)
        table = order.new_zeros(len(counts), max(counts), dtype=torch.int32)
        slots = []
        for row, keys, pages in zip(table, self.keys, order.split(counts), strict=True):
            row[: len(pages)] = pages
            slots.append((pages[:, None] * size + torch.arange(size, device=pages.device)).flatten()[:keys])
        key, value = (_scattered(x, torch.cat(slots), sum(counts) * size) for x in (self.key, self.value))
        return self._replace(key=key.unflatten(0, (-1, size)), value=value.unflatten(0, (-1, size)), table=table)

    def attend(self, config: S2OConfig) -> torch.Tensor:
        """By the operator."""
        starts = _starts(self.keys) if self.table is None else None
        used = None if self.table is None else self.keys
        return s2o_compile.attention_varlen(
            self.query, self.key, self.value, _starts(self.queries), starts, max(self.queries), max(self.keys),
            window_size=CAUSAL, seqused_k=used, block_table=self.table, config=config,
        )  # fmt: skip

    def attend_by_torch(self) -> Run:
        """By PyTorch's attention of packed requests, whose lengths are on the device before it is called."""
        queries, keys, used = (
            torch.tensor(numbers, dtype=torch.int32, device=self.query.device)
            for numbers in (_starts(self.queries), _starts(self.keys), self.keys)
        )
        pages: dict[str, Any] = {} if self.table is None else {"block_table": self.table, "seqused_k": used}
        return partial(
            varlen_attn, self.query, self.key, self.value, queries, None if pages else keys, max(self.queries),
            max(self.keys), window_size=CAUSAL, **_GROUPED, **pages,
        )  # fmt: skip


def _scattered(x: torch.Tensor, slots: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of a tensor at these places among `size`."""
    return x.new_zeros(size, *x.shape[1:]).index_copy_(0, slots, x)


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def draw_batch(structure: Structure, diffuse: float, neighbours: int, context: int, part: int) -> Batch:
    """The last `part` queries of a prompt, with all its keys, beside requests with the first `context` of these."""
    length = structure.length
    queries, keys = (*[1] * neighbours, part), (*[context] * neighbours, length)
    last = structure.query(diffuse, slice(length - part, length))[0].transpose(0, 1)
    query = torch.cat([last[torch.arange(neighbours, device=last.device) % part], last])
    pairs = (x[0].transpose(0, 1) for x in (structure.key, structure.value))
    key, value = (torch.cat([*[x[:context]] * neighbours, x]) for x in pairs)
    return Batch(query, key, value, None, queries, keys)


def measure_replay(length: int, shape: str, sizes: Sequence[int], case: Case, show: Callable[[str], None]) -> list[Row]:
    """The rows of a prompt's last part, with contiguous keys and in pages of these sizes."""
    attention, config = SHAPES[shape], case.config
    show("inputs")
    structure = Structure.draw(length, attention.heads, attention.kv_heads, attention.channels, case.device, case.dtype)
    diffuse = diffuseness(structure, config, True, case.density)
    part = min(case.budget - case.neighbours, length)
    whole = draw_batch(structure, diffuse, case.neighbours, min(case.context, length), part)
    del structure
    batches = {CONTIGUOUS: whole} | {str(size): whole.in_pages(size) for size in sizes}
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for keys, batch in batches.items():
        show(f"keys {keys}")
        own: dict[str, Run] = {
            VARLEN: batch.attend_by_torch(),
            DENSE: partial(batch.attend, case.dense_config),
            S2O: partial(batch.attend, config),
        }
        for way, run in own.items():
            row = Row(REPLAY, length, way, keys, setting=diffuse if way == S2O else None)
            is_missing = way == VARLEN and case.device.type == "cpu"
            row.reason = "PyTorch has it on GPUs alone" if is_missing else warm_up(run)
            rows[f"{keys}, {way}"] = row
            if not row.reason:
                runs[f"{keys}, {way}"] = run
                row.sparse = sparse_calls(run)
    show("repetitions")
    clock = wall_seconds if case.device.type == "cpu" else settled(gpu_seconds)
    for name, times in interleaved(runs, case.repetitions, clock).items():
        rows[name].seconds, rows[name].spread = median_and_spread(times)
    return list(rows.values())
