"""``attn_implementation="s2o"`` for the models of transformers, registered there by importing this module."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import output_capturing
from transformers.utils.import_utils import is_tracing

from ..ops.dense import positive_scale
from ..ops.dispatch import choose_sparse
from ..ops.validation import DTYPES, MAX_HEAD_DIM
from ..ops.visibility import Visibility
from .continuous_batching import attend_step, register
from .lazy_mask import LazyMask
from .masks import s2o_mask, visible_keys
from .settings import IMPLEMENTATION, fields_of, settings_of, sharding_in


def s2o_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as ``transformers.AttentionInterface`` calls it.

    Calls that the operator cannot take, or need not, go to the SDPA attention of transformers: dropout, gradients,
    position biases, one query, short calls, and all that is traced, where a backend decides. With a soft cap or sinks,
    which SDPA lacks, all calls go to the operator, and with a mesh to that which gathers the keys of all ranks. What
    SDPA would drop, though it changes the result, is refused. With a paged `cache`, all calls go to the operator for
    many requests (`integrations.continuous_batching`).

    Args:
        module: The layer, which may have `is_causal` and has the `config` of its model.
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        attention_mask: What the mask interface returned, or a mask of a user.
        dropout: Probability; above 0 the call runs dense.
        scaling: Factor of the logits, by default D ** -0.5.
        is_causal: Whether a missing mask means a causal one, by default what `module` says.
        softcap: See ``s2o_compile.attention``.
        s_aux: The sinks, [Hq].
        **kwargs: For ``sdpa_attention_forward`` of transformers.

    Returns:
        The output [B, Lq, Hq, Dv], and no probabilities.

    Raises:
        ValueError: A mesh, a soft cap or sinks come with what only SDPA can do, or something is asked for that neither
            does, such as attention weights; or a paged cache comes from elsewhere than continuous batching, or with a
            mesh.
    """
    terms_of_softmax = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    sharding = sharding_in(module.config)
    if kwargs.get("cache") is not None:
        _refuse(module, kwargs)
        if sharding is not None:
            raise ValueError("mesh must be None for continuous batching, whose keys are not shared over ranks")
        settings = fields_of(module)
        return attend_step(module, query, key, value, kwargs, site=_site(module), **terms_of_softmax, **settings), None
    attention_mask = _as_given(attention_mask, query, key)
    _refuse(module, kwargs)
    _refuse_documents(attention_mask, kwargs.get("cu_seq_lens_q"))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    obstacle = _obstacle(query, key, value, dropout, kwargs.get("position_bias"))
    if sharding is not None:
        _refuse_on_ranks(obstacle, attention_mask)
    elif softcap is None and s_aux is None:
        if obstacle or _runs_dense(attention_mask, query, key, value, is_causal, module):
            return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    elif obstacle:
        raise ValueError(f"attn_implementation='s2o' has no soft cap and no sinks {obstacle}; use 'eager'")
    terms = _terms(attention_mask, is_causal and (query.shape[2] > 1 or sharding is not None))
    keys = visible_keys(terms, query.shape[2], key.shape[2])
    operator = torch.ops.s2o.attention if sharding is None else torch.ops.s2o.attention_context
    output = operator(
        query,
        key[:, :, :keys],
        value[:, :, :keys],
        is_causal=terms.is_causal,
        causal_offset=terms.causal_offset,
        key_padding=None if terms.key_padding is None else terms.key_padding[:, :keys],
        window=terms.window,
        mask=terms.mask,
        site=_site(module),
        **terms_of_softmax,
        **fields_of(module),
        **({} if sharding is None else sharding._asdict()),
    )
    return output.transpose(1, 2).contiguous(), None


_collector = getattr(output_capturing, "_active_collector", None)
"""What the model that runs collects from its layers for its caller."""
_REFUSED = {
    "block_indices": "cannot attend to the blocks of keys that a model picks; use 'sdpa'",
    "indices": "cannot attend to the keys that a model picks; use 'sdpa'",
    "sinks": "has one sink for each head, and the model one for each query too; use 'eager'",
}
"""Arguments that change the result and are not passed on, and what to say of them."""


def _refuse(module: torch.nn.Module, options: dict[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"attn_implementation='s2o' {reason}")
    if _asks_for_weights(module, options):
        raise ValueError(
            "attn_implementation='s2o' computes no attention weights, which output_attentions=True asks for; "
            "use 'eager' (model.set_attn_implementation('eager'))"
        )


def _refuse_documents(mask: torch.Tensor | None, documents: torch.Tensor | None) -> None:
    """Refuse `documents`, the cu_seq_lens_q of a call without a paged cache, where the mask does not know them."""
    if documents is not None and documents.numel() > 2 and (mask is None or isinstance(mask, LazyMask)):
        raise ValueError(
            f"cu_seq_lens_q packs {documents.numel() - 1} documents, which the mask does not tell apart, and "
            "attn_implementation='s2o' follows the mask: most models make it of position_ids where there is neither an "
            "attention_mask nor a cache (use_cache=False)"
        )


def _asks_for_weights(module: torch.nn.Module, options: dict[str, Any]) -> bool:
    """Whether the caller of the model wants attention weights, as far as an attention function is told."""
    asked = options.get("output_attentions", getattr(module.config, "output_attentions", False))
    collected = None if torch.compiler.is_compiling() or _collector is None else _collector.get()
    return bool(asked) or any(name.endswith("attentions") for name in collected or ())


def _as_given(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The mask as a plain tensor where it is no longer what the mask interface made, or made for another call."""
    if not isinstance(mask, LazyMask):
        return mask
    if mask.is_lazy and mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2]):
        return mask
    return mask.read()


def _refuse_on_ranks(obstacle: str | None, mask: torch.Tensor | None) -> None:
    """Refuse a call of one rank that cannot attend to the keys of all."""
    if obstacle is None and mask is not None and not isinstance(mask, LazyMask):
        obstacle = f"with a mask of shape {list(mask.shape)}: pass an attention_mask [batch, tokens of the rank]"
    if obstacle is not None:
        raise ValueError(f"attn_implementation='s2o' cannot attend to the keys of all ranks of its mesh {obstacle}")


def _site(module: torch.nn.Module) -> str:
    """What profiles call a layer, which does not know its place in the model."""
    index = getattr(module, "layer_idx", None)
    kind = type(module).__name__
    return kind if index is None else f"{kind} {index}"


def _obstacle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, position_bias: torch.Tensor | None
) -> str | None:
    """Why the operator cannot take a call, or None."""
    tensors = (query, key, value)
    if dropout > 0:
        return "under dropout"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "where gradients are needed"
    if position_bias is not None:
        return "with a position bias"
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return f"for heads of more than {MAX_HEAD_DIM} channels"
    if query.dtype not in DTYPES or query.device.type not in ("cpu", "cuda") or query.shape[0] != key.shape[0]:
        return f"for queries of shape {list(query.shape)} in {query.dtype} on {query.device}"
    return None


def _runs_dense(
    mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    module: torch.nn.Module,
) -> bool:
    """Whether a call is for SDPA. The mask interface decides that; where it was not asked, the shapes do."""
    if mask is not None or query.shape[2] == 1 or is_tracing(query):
        return not isinstance(mask, LazyMask)
    shapes = query.shape, key.shape, value.shape
    terms, settings = Visibility(is_causal), settings_of(module.config)
    return not choose_sparse(*shapes, terms, query.device, query.dtype, settings)


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if isinstance(mask, LazyMask):
        mask = mask.read()
    query, scaling = positive_scale(query, scaling)
    output: torch.Tensor
    output, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return output, None


def _terms(mask: torch.Tensor | None, is_causal: bool) -> Visibility:
    """A mask of any form as terms of the operator; `is_causal` says what a missing one means."""
    if isinstance(mask, LazyMask):
        return mask.terms
    if mask is None:
        return Visibility(is_causal=is_causal)
    if mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask must be boolean for a soft cap or sinks with attn_implementation='s2o'; it is {mask.dtype}"
        )
    return Visibility(mask=mask)


AttentionInterface.register(IMPLEMENTATION, s2o_attention)
AttentionMaskInterface.register(IMPLEMENTATION, s2o_mask)
register()
