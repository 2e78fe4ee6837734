"""The block sizes of each kernel, by what fits into a multiprocessor's shared memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from triton import next_power_of_2

MAX_ROWS = 128
"""Rows of queries that a kernel handles at once."""
SHARED_MEMORY = 96 * 1024
"""Bytes that operands may take while they wait for their turn; every GPU that is supported has as many."""
CHUNK = 4096
"""Keys that one program scores."""
MERGED_ROWS = 32
"""Guides of a segment that a kernel takes at once where queries are merged, and there may be few."""
AMONG = 32
"""Consecutive segments among which those of about as many guides are scored together then."""
MOST_PARTS = 3
"""Parts of the guides of a segment that are scored for each time that keys are loaded, where queries are merged."""
HALVINGS = 1
"""How often the last part may be halved: 2 saves 1% of a call at 131,072 keys, for half as long again to compile."""
SHARED_REGISTERS = 168
"""Of a thread, so that three programs of four warps share a multiprocessor of 65,536."""
FOLDED_REGISTERS = 128
"""The same for four programs."""
MAX_GUIDE_BYTES = 32 * 1024
"""Bytes of guides that stay with a program while it goes through its keys."""
DECODED_BLOCKS = 2
"""Blocks of keys that wait in shared memory for a program, when requests decode."""
SHORTEST_SPLIT = 256
"""Keys of a request that one program attends to, at least: fewer would pay for its start and for the sum of all."""
PROGRAMS = 6
"""Of a multiprocessor then: some have more to do than others, and two or three run at a time."""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; 1 for what is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may take on a device, as far as PyTorch knows them."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY)


class Tiling(NamedTuple):
    """Rows and keys that a kernel multiplies at once, and how it is compiled."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def arguments(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {"BLOCK_M": self.rows, "BLOCK_N": self.keys, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def segments(self, guides: int) -> int:
        """The number of segments of `guides` each that are multiplied at once."""
        return self.rows // rows_per_list(guides, self.rows)


def ranking_tiling(channels: int, itemsize: int) -> Tiling:
    """Of the kernels that multiply guides by keys, for the channels of a key and the bytes of each."""
    if itemsize <= 2 and channels <= 128:
        return Tiling(MAX_ROWS, 64, 4, 4) if itemsize == 1 else Tiling(MAX_ROWS, 128, 8, 2)
    return Tiling(64, 64, 4, 2) if channels * itemsize <= 512 else Tiling(32, 32, 4, 2)


@functools.cache
def normaliser_tiling(channels: int, itemsize: int, guides: int) -> Tiling:
    """Of `normaliser_kernel`, which goes through two blocks of keys at once where nothing is masked.

    Few `guides` of a segment need small blocks to fill the GPU.
    """
    if itemsize == 1 and channels <= 128:
        return Tiling(64 if guides <= 64 else MAX_ROWS, 64, 4, 3)
    tiling = ranking_tiling(channels, itemsize)
    return tiling._replace(keys=tiling.keys // 2)


class ImportanceTiling(NamedTuple):
    """Of `importance_kernel`: a part of `guides` rows at a time, a last one of `rest` beside them (0 for none)."""

    guides: Tiling
    rest: int
    resident: bool

    @property
    def arguments(self) -> dict[str, int | bool]:
        """As arguments of a launch."""
        return {**self.guides.arguments, "BLOCK_REST": self.rest, "GUIDES_RESIDENT": self.resident}


@functools.cache
def importance_tiling(channels: int, itemsize: int, guides: int, half: bool) -> ImportanceTiling:
    """Of `importance_kernel`, for `guides` of a list; `half` says that products are summed in half precision."""
    tiling = ranking_tiling(channels, itemsize)
    left = guides % tiling.rows
    rest = max(16, next_power_of_2(left)) if left and guides > tiling.rows else 0
    if half:
        tiling = Tiling(MAX_ROWS, 64 if 0 < rest < MAX_ROWS else 128, 4, 3)
    if guides <= tiling.rows:
        return ImportanceTiling(tiling, 0, True)
    total = (guides // tiling.rows * tiling.rows + rest) * channels * itemsize
    if total <= MAX_GUIDE_BYTES:
        return ImportanceTiling(tiling, rest, True)
    stage = total + tiling.keys * channels * itemsize
    stages = max(1, min(tiling.num_stages, SHARED_MEMORY // stage))
    return ImportanceTiling(tiling._replace(num_stages=stages), rest, False)


@functools.cache
def merged_importance_tiling(channels: int, itemsize: int, half: bool) -> Tiling:
    """Of `merged_importance_kernel`: a part of the guides of several segments at a time, two parts at most."""
    return Tiling(MAX_ROWS, 64, 4, 3) if half else ranking_tiling(channels, itemsize)


@functools.cache
def attend_tiling(channels: int, itemsize: int, rows: int, is_fixed: bool, shared: int) -> Tiling:
    """Of `attend_kernel`, for rows of a tile, the channels of the wider of a key and a value, and the bytes of each.

    With a fixed maximum a block costs little beside its keys, and small ones leave room to gather two ahead, if the
    bytes of `shared` memory are enough for two programs.
    """
    rows, row_bytes = max(16, next_power_of_2(rows)), next_power_of_2(channels) * itemsize
    if itemsize > 2:
        return Tiling(rows, 32 if row_bytes <= 512 else 16, 8 if rows > 128 or row_bytes > 256 else 4, 2)
    if is_fixed and channels <= 128 and rows <= 128:
        keys = 64 if channels <= 64 or rows <= 64 else 32
        if 2 * (3 * 2 * keys + rows) * row_bytes <= shared:
            return Tiling(rows, keys, 4, 5)
    keys = 128 if channels <= 64 else 64 if channels <= 128 else 32
    return Tiling(rows, keys, 8 if rows > 128 or channels > 128 else 4, 2)


@functools.cache
def dense_tiling(channels: int, itemsize: int, shared: int) -> Tiling:
    """Of `dense_kernel`, for the channels of the wider of a key and a value, and the bytes of each.

    As many keys as the bytes of `shared` memory have room for.
    """
    rows, row_bytes = MAX_ROWS if itemsize <= 2 else 64, next_power_of_2(channels) * itemsize
    stages = 3 if channels <= 128 else 2
    room = (shared // row_bytes - rows) // (2 * stages)
    keys = next(keys for keys in (64, 32, 16) if keys <= max(16, room))
    return Tiling(rows, keys, 4 if channels <= 64 else 8, stages)


def decoded_rows(itemsize: int) -> int:
    """How many rows of queries, over the query heads of a KV head, `decode_kernel` takes at once at most."""
    return 64 if itemsize <= 2 else 16


@functools.cache
def decode_tiling(channels: int, itemsize: int, rows: int, shared: int) -> Tiling:
    """Of `decode_kernel`, for rows of queries, the channels of the wider of a key and a value, and the bytes of each.

    Two blocks are on their way while one program computes; keys are as many as leave room for three such programs in
    the bytes of `shared` memory.
    """
    rows, block_bytes = max(16, next_power_of_2(rows)), 2 * next_power_of_2(channels) * itemsize
    most = shared // (3 * DECODED_BLOCKS * block_bytes)
    keys = next((keys for keys in (128, 64, 32) if keys <= most), 16) if itemsize <= 2 else 16
    return Tiling(rows, keys, 4, 1 + DECODED_BLOCKS)


def keys_per_split(keys: int, lists: int, multiprocessors: int) -> int:
    """How many keys of a request one program attends to at most, where all requests have so many in so many `lists`.

    A power of two, so that it rarely changes while requests grow.
    """
    wanted = max(SHORTEST_SPLIT, keys * lists // (PROGRAMS * multiprocessors))
    return 1 << (wanted.bit_length() - 1)


@functools.cache
def rows_per_list(rows: int, most: int) -> int:
    """How many guides of a list a kernel scores at once: the power of two that leaves the fewest places empty."""
    if rows <= most:
        return next_power_of_2(rows)
    return min(most, most // 2, key=lambda chunk: -(-rows // chunk) * chunk)
