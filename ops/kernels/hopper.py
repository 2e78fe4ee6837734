"""When `attend_hopper_kernel` attends instead of `attend_kernel`, and its launch."""

from __future__ import annotations

import torch
import triton

from ..result import AttentionResult
from .call import Call
from .plan import FIELDS, plan_kernel
from .rank import Lists

TRITON = "3.6"
"""Gluon is experimental: its kernel is used with the version of Triton that it was measured with."""
ROWS = 128
CHANNELS = 128
"""Rows of a tile and channels of keys and values: with fewer it was slower than `attend_kernel`, or is not measured."""
_ALIGNED = 16
_ITEMS = 128


def is_suited(call: Call, rows: int) -> bool:
    """Whether `attend_hopper_kernel` attends tiles of so many rows: on sm_90, if nothing hides but the causal mask."""
    config, visibility = call.config, call.visibility
    sizes = {call.key.shape[-1], call.value.shape[-1]}
    return (
        ROWS // 2 < rows <= ROWS
        and sizes == {CHANNELS}
        and call.query.dtype in (torch.float16, torch.bfloat16)
        and not (visibility.varies or visibility.key_padding is not None or call.softcap)
        and config.stop == "importance"
        and not (config.has_means or config.bounds_weights(CHANNELS))
        and all(_is_aligned(x) for x in (call.query, call.key, call.value))
        and is_available(call.query.device)
    )


def is_available(device: torch.device) -> bool:
    """Whether the kernel runs on a GPU."""
    return triton.__version__.startswith(f"{TRITON}.") and torch.cuda.get_device_capability(device) == (9, 0)


def _is_aligned(x: torch.Tensor) -> bool:
    """Whether rows [B, H, L, D] can be copied 16 bytes at a time."""
    return x.data_ptr() % _ALIGNED == 0 and all(stride % _ALIGNED == 0 for stride in x.stride()[:3])


def attend(call: Call, lists: Lists, segments: range, tiles: int, heads: int, result: AttentionResult) -> None:
    """Attend a run of segments, as `launch.attend` does: so many tiles, of so many heads at once."""
    from .attend_hopper import attend_hopper_kernel

    config, geometry, batch = call.config, call.geometry, call.query.shape[0]
    items = call.groups * call.lists * -(-call.group // call.lists // heads) * tiles
    plan = torch.empty(batch, FIELDS.value, items, dtype=torch.int32, device=call.query.device)
    plan_kernel[(-(-items // _ITEMS), batch)](
        lists.count, plan,
        **{name: call.shared[name] for name in _PLANNED},
        first_segment=segments.start, segments=len(segments), tiles=tiles, items=items,
        TILE=config.tile, GROUP=call.group, LISTS=call.lists, HEADS=heads, BLOCK_N=_ITEMS, num_warps=4,
    )  # fmt: skip
    programs = min(items, torch.cuda.get_device_properties(call.query.device).multi_processor_count)
    attend_hopper_kernel[(programs, batch)](
        call.query, call.key, call.value, lists.index, lists.weights, plan, *result,
        *call.query.stride()[:3], *call.key.stride()[:2], *call.value.stride()[:2], *result.output.stride()[:3],
        geometry.queries, geometry.keys, geometry.tiles, call.query.shape[1], geometry.offset,
        lists.index.shape[-1], items, call.shared["scale"],
        TILE=config.tile, HEADS=heads, CAUSAL=call.shared["CAUSAL"], SAMPLED=config.has_samples,
        KEY_STRIDE=call.key.stride(2), VALUE_STRIDE=call.value.stride(2), D=CHANNELS, DV=CHANNELS,
        num_warps=4,
    )  # fmt: skip


_PLANNED = ("groups", "queries", "keys", "ranked_segments", "offset", "near_keys", "SEGMENT", "CAUSAL")
