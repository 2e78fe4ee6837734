"""The lists of keys that segments visit, as the kernels lay them out in memory.

Ranking first writes, for each batch entry, KV head, list of that KV head and segment of a run, one of two contiguous
tensors:

- where the tail is sampled, *importance* [B, Hkv, lists, segments, capacity], float32, or float16 for inputs in half
  precision. It is in units of the threshold: a key of 1 or more, or NaN, is sure to be visited, one of -1 never is.
- else *flags* [B, Hkv, lists, segments, capacity / 16] int16, a bit for each key, set if it is visited, the
  first of 16 keys lowest.

In both, the place of a key is its position less the start of the segment's history (`Geometry`). What follows the end
of a history is undefined. Importance or flags then become `Lists`. A CPU has a layout of its own, in `ops.cpu.rank`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .arguments import Arguments
from .helpers import FLAGS_PER_WORD
from .scoring import Scoring


@dataclass(frozen=True)
class Lists:
    """The keys to visit, one list for each batch entry, KV head, list of it and segment of a run; contiguous tensors.

    Attributes:
        index: [B, Hkv, lists, segments, capacity] int32, the rows of keys, whose positions are in ascending order;
            undefined after `count`. A row is the position, or `Arguments.places` of it.
        count: [B, Hkv, lists, segments] int32, the length of each list.
        log_weights: [B, Hkv, lists, segments, capacity], logs of what the keys of `index` weigh, base-2 logarithms of
            at least 0. They alias importance, which `sample_kernel` overwrites in place, and have its dtype. Not read
            where the tail is not sampled.
        guide_lse: [B, Hkv, guide heads, guides] float32, the guides' log-sum-exps to base 2. Read only where
            weights are bounded (`S2OConfig.bounds_weights`).
        owner: [B, Hkv, G, Lq] int32, the place of each query's guide in its segment, where queries are merged; else
            not read.
    """

    index: torch.Tensor
    count: torch.Tensor
    log_weights: torch.Tensor
    guide_lse: torch.Tensor
    owner: torch.Tensor

    @classmethod
    def to_fill(cls, arguments: Arguments, segments: range, importance: torch.Tensor, scoring: Scoring) -> Lists:
        """Lists with an uninitialised index, of keys with this importance or these flags."""
        capacity = arguments.capacity(segments[-1])
        index = torch.empty(*importance.shape[:-1], capacity, dtype=torch.int32, device=importance.device)
        owner = scoring.guide_lse if scoring.merged is None else scoring.merged.owner
        return cls(index, index.new_empty(importance.shape[:-1]), importance, scoring.guide_lse, owner)

    @classmethod
    def without_keys(cls, arguments: Arguments) -> Lists:
        """Empty lists of all segments."""
        shape = _shape(arguments, range(arguments.geometry.segments))
        absent = arguments.key.new_empty(1)
        count = arguments.key.new_empty(shape, dtype=torch.int32).zero_()
        return cls(count[..., None], count, absent, absent, absent)

    @property
    def capacity(self) -> int:
        """Room for keys in each list."""
        return self.index.shape[-1]


def empty_importance(arguments: Arguments, segments: range) -> torch.Tensor:
    """Uninitialised importance, or flags where the tail is not sampled, of the histories of a run of segments."""
    shape, capacity = _shape(arguments, segments), arguments.capacity(segments[-1])
    if arguments.config.has_samples:
        return torch.empty(*shape, capacity, dtype=importance_dtype(arguments), device=arguments.key.device)
    return torch.empty(*shape, capacity // FLAGS_PER_WORD, dtype=torch.int16, device=arguments.key.device)


def bits_of_a_key(arguments: Arguments) -> int:
    """Bits of memory for each key of a history: its place in the index, and its importance or flag."""
    return 32 + (8 * importance_dtype(arguments).itemsize if arguments.config.has_samples else 1)


def importance_dtype(arguments: Arguments) -> torch.dtype:
    """Half precision for inputs in half precision: a key is drawn, and weighs, by its importance as stored."""
    return torch.float32 if arguments.query.dtype == torch.float32 else torch.float16


def _shape(arguments: Arguments, segments: range) -> tuple[int, ...]:
    return arguments.query.shape[0], arguments.kv_heads, arguments.lists, len(segments)
