"""Masks of transformers as terms of the operator, instead of tensors of [Lq, Lk] elements."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

from ..ops.dense import LARGE_MASK
from ..ops.dispatch import choose_sparse
from ..ops.layout import Sharding
from ..ops.process_group import group_of
from ..ops.visibility import Visibility
from .continuous_batching import in_engine
from .lazy_mask import LazyMask
from .settings import settings_of, sharding_in
from .shapes import attention_shapes

_AND = and_masks(causal_mask_function).__code__
_PACKED = packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_remapped = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # Of later releases.
_REMAPPED = None if _remapped is None else _remapped(causal_mask_function, torch.zeros(1, 1)).__code__
_WINDOW = sliding_window_overlay(1).__code__
_WINDOW_ON_BOTH_SIDES = sliding_window_bidirectional_overlay(1).__code__


class Band(NamedTuple):
    """The keys that a query sees by position: so many before its own and after it, or all where None."""

    before: int | None = None
    after: int | None = None

    def __and__(self, other: Band) -> Band:
        return Band(_least(self.before, other.before), _least(self.after, other.after))

    def terms(self, offset: int) -> Visibility:
        """The same as terms of the operator, where query i is at the position of key i + `offset`."""
        ahead = self.after or 0
        return Visibility(
            is_causal=self.after is not None,
            causal_offset=offset + ahead,
            window=None if self.before is None else self.before + ahead + 1,
        )


def _least(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)


def read_band(
    function: Callable[..., Any], hides_nothing: Callable[[torch.Tensor], bool] = lambda _: False
) -> Band | None:
    """What a mask function of transformers says; None if it is none of those that depend on the distance alone.

    Mask functions are closures over their numbers, so they are known by their code. Of the documents [B, L] that it
    tells apart, `hides_nothing` says whether they are one after all.
    """
    if function is causal_mask_function:
        return Band(after=0)
    if function is bidirectional_mask_function:
        return Band()
    code = getattr(function, "__code__", None)
    if code is _WINDOW:
        return Band(before=_closed_over(function, "sliding_window") - 1)
    if code is _WINDOW_ON_BOTH_SIDES:
        return Band(*[_closed_over(function, "sliding_window")] * 2)
    if code is not None and code is _REMAPPED:  # To positions in documents, which are told apart beside this.
        return read_band(_closed_over(function, "mask_function"))
    if code is _PACKED and hides_nothing(_closed_over(function, "packed_sequence_mask")):
        return Band()
    if code is not _AND:
        return None
    band = Band()
    for of_part in _closed_over(function, "mask_functions"):
        part = read_band(of_part, hides_nothing)
        if part is None:
            return None
        band &= part
    return band


def _closed_over(function: Callable[..., Any], name: str) -> Any:
    return inspect.getclosurevars(function).nonlocals[name]


def s2o_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask for the layers of one forward pass, as ``transformers.AttentionMaskInterface`` asks for it.

    Calls that will run dense get the mask of SDPA where that is none or small, as those that gradients may be needed of
    do. So do calls whose mask must be a tensor or says more than causal, sliding window and padding, and all that is
    traced: there a backend reads the mask in the graph.

    On a GPU this waits once for each padding mask, so that calls without padding run without one, and once for an
    offset that a tensor holds, since the operator takes a number. The SDPA masks of transformers wait for the same.

    In continuous batching there is no mask, as the lengths of requests say all.

    Args:
        batch_size: B.
        q_length: Lq.
        kv_length: Lk.
        q_offset: The position of the first query, a number or a tensor that holds one.
        kv_offset: The position of the first key.
        mask_function: Whether a query sees a key, as transformers writes it.
        attention_mask: [B, at most Lk + `kv_offset`] boolean, False for padding.
        allow_is_causal_skip: Whether the mask may be something other than a tensor, where it is causal.
        allow_is_bidirectional_skip: The same where it is bidirectional.
        config: The configuration of the model.
        device: Of the mask.
        **kwargs: For ``transformers.masking_utils.sdpa_mask``; `dtype` is that of the model.

    Raises:
        ValueError: The model's sequences are sharded over ranks, and the mask says more than causal, window and padding
            of the whole sequence, or is traced.
    """
    if in_engine():
        return None
    sharding = sharding_in(config)
    if sharding is not None:
        shape, is_at_start = (batch_size, 1, q_length, kv_length), int(q_offset) == kv_offset == 0
        return _mask_of_rank(shape, is_at_start, mask_function, attention_mask, torch.device(device), sharding)
    may_skip = allow_is_causal_skip or allow_is_bidirectional_skip
    if q_length > 1 and may_skip and not torch.is_grad_enabled() and not is_tracing(attention_mask):
        band = read_band(mask_function)
        if band is not None:
            terms = band.terms(int(q_offset) - int(kv_offset))
            keys = visible_keys(terms, q_length, kv_length)
            shapes = attention_shapes(config, batch_size, q_length, keys)
            dtype = kwargs.get("dtype", torch.float32)
            is_sparse = choose_sparse(*shapes, terms, torch.device(device), dtype, settings_of(config))
            if is_sparse or q_length * keys >= LARGE_MASK:
                padding = _padding(attention_mask, kv_length, kv_offset)
                if padding is not None and not padding[:, :keys].all():
                    terms = terms._replace(key_padding=padding.clone())
                if is_sparse or _needs_mask(terms, q_length, kv_length):
                    return LazyMask(terms, (batch_size, 1, q_length, kv_length), torch.device(device))
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        device=device,
        **kwargs,
    )


def _mask_of_rank(
    shape: tuple[int, int, int, int],
    is_at_start: bool,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None,
    device: torch.device,
    sharding: Sharding,
) -> LazyMask | None:
    """The mask [B, 1, Lq, Lk] of the tokens of a rank, in the terms of the whole sequence; None for a causal one.

    It keeps a padding that hides nothing, as other ranks may have one that does.
    """
    band, keys = read_band(mask_function, lambda documents: _is_one_document(documents, sharding)), shape[3]
    if band is None or shape[2] != keys or not is_at_start:
        raise ValueError(
            "attn_implementation='s2o' with a mesh needs a mask that is causal or a window, of as many keys as "
            f"queries, not another of {shape[2]} queries and {keys} keys: transformers sees documents where "
            "position_ids jump unless it is given an attention_mask, such as one of ones, or a cache"
        )
    if band == Band(after=0) and attention_mask is None:
        return None
    if is_tracing(attention_mask):
        raise ValueError(
            "attn_implementation='s2o' with a mesh cannot have its masks compiled; compile a model with 'sdpa', and "
            "pass options={'mesh': mesh} to the backend"
        )
    padding = _padding(attention_mask, keys, 0)
    return LazyMask(band.terms(0)._replace(key_padding=None if padding is None else padding.clone()), shape, device)


def _is_one_document(documents: torch.Tensor, sharding: Sharding) -> bool:
    """Whether the documents [B, L] that transformers sees in the positions of a rank are the rank's two blocks.

    The blocks of the last rank are neighbours, so that a jump between them is one in the sequence.
    """
    group = group_of(sharding.group)
    if is_tracing(documents) or sharding.layout == "contiguous" or group.rank() == group.size() - 1:
        return False
    length = documents.shape[1]
    return torch.equal(
        documents, torch.arange(length, device=documents.device).ge(length // 2).long().expand_as(documents)
    )


def _padding(mask: torch.Tensor | None, keys: int, first: int) -> torch.Tensor | None:
    """The padding mask of so many keys from the first."""
    mask = prepare_padding_mask(mask, keys, first)
    return None if mask is None else mask[:, first : first + keys]


def _needs_mask(terms: Visibility, queries: int, keys: int) -> bool:
    """Whether SDPA needs a mask for terms."""
    terms = terms.simplified(queries, keys)
    is_plain = not terms.is_causal or (terms.causal_offset == 0 and queries == keys)
    return not (is_plain and terms.window is None and terms.key_padding is None)


def visible_keys(terms: Visibility, queries: int, keys: int) -> int:
    """How many of the keys come before the end of what the last query may see."""
    return max(0, min(keys, queries + terms.causal_offset)) if terms.is_causal else keys
