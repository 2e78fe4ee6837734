"""The operators ``torch.ops.s2o.attention`` and ``torch.ops.s2o.attention_stats``.

Both are compositions: they validate, cast under autocast, choose between sparse and dense, and call one of
`sparse_triton` (a `triton_op`, whose kernels Inductor sees) and `sparse` (opaque: on a CPU, and for symbolic shapes).
Where lengths are symbolic and the choice depends on them, they call `attention_dynamic`, which chooses at run time.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from . import cpu
from .choice import choose_sparse
from .config import S2OConfig
from .dense import dense_attention
from .geometry import Geometry
from .result import AttentionResult
from .validation import validate

_TYPES = {"float": "float", "int": "int", "int | None": "int?", "str": "str", "bool": "bool"}


def _schema_default(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


_FIELDS = ", ".join(
    f"{_TYPES[str(field.type)]} {field.name}={_schema_default(field.default)}"
    for field in dataclasses.fields(S2OConfig)
)
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, bool is_causal=False, SymInt causal_offset=0, "
    f"Tensor? key_padding=None, float? scale=None, *, {_FIELDS})"
)
_RESULT = "(Tensor output, Tensor lse, Tensor visited)"

library = torch.library.Library("s2o", "DEF")
library.define(f"attention{SCHEMA} -> Tensor")
library.define(f"attention_stats{SCHEMA} -> {_RESULT}")
library.define(f"attention_dynamic{SCHEMA} -> Tensor")
library.define(
    "sparse(Tensor query, Tensor key, Tensor value, bool is_causal, SymInt causal_offset, Tensor? key_padding, "
    f"float scale, str settings) -> {_RESULT}"
)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    causal_offset: int = 0,
    key_padding: torch.Tensor | None = None,
    scale: float | None = None,
    **fields: Any,
) -> torch.Tensor:
    """Attention that visits keys in order of importance and stops when the rest no longer matters.

    Calls that are short (`S2OConfig.min_length`) or shaped like decoding run SDPA.

    Args:
        query: [B, Hq, Lq, D], float16, bfloat16 or float32; D up to 256.
        key: [B, Hkv, Lk, D], Hq a multiple of Hkv.
        value: [B, Hkv, Lk, Dv], Dv up to 256.
        is_causal: Whether query i sees only the keys up to i + `causal_offset`.
        causal_offset: 0 counts from the top left, as SDPA does; Lk - Lq suits a chunk that continues a cache.
        key_padding: [B, Lk] boolean, True for keys that may be attended; None for all.
        scale: Factor of the logits, by default D ** -0.5.
        **fields: The fields of `S2OConfig`.

    Returns:
        [B, Hq, Lq, Dv] in the dtype of `query`; zeros for rows with nothing to attend to.

    Raises:
        TypeError: A dtype or a field's type is not supported.
        ValueError: Shapes, devices or a field's value do not fit, or a gradient is asked for.
    """
    config = S2OConfig(**fields)
    query, key, value = _autocast(query, key, value)
    validate(query, key, value, key_padding, scale)
    sparse = choose_sparse(query, key, config)
    if sparse is None:
        return torch.ops.s2o.attention_dynamic(
            query, key, value, is_causal, causal_offset, key_padding, scale, **fields
        )
    if not sparse:
        return _dense(query, key, value, is_causal, causal_offset, key_padding, scale)
    return _sparse(query, key, value, is_causal, causal_offset, key_padding, scale, config).output


def attention_stats(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    causal_offset: int = 0,
    key_padding: torch.Tensor | None = None,
    scale: float | None = None,
    **fields: Any,
) -> AttentionResult:
    """`attention`, with log-sum-exp [B, Hq, Lq] (float32) and visited work [B, Hq, tiles] (int64, pairs).

    Where `attention` would run SDPA, this visits every key in the dense span instead, so that it can count.
    """
    config = S2OConfig(**fields)
    query, key, value = _autocast(query, key, value)
    validate(query, key, value, key_padding, scale)
    if choose_sparse(query, key, config) is False:
        config = dataclasses.replace(config, last_queries=max(1, query.shape[2]))
    return _sparse(query, key, value, is_causal, causal_offset, key_padding, scale, config)


def attention_dynamic(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    causal_offset: int = 0,
    key_padding: torch.Tensor | None = None,
    scale: float | None = None,
    **fields: Any,
) -> torch.Tensor:
    """`attention`, opaque to the compiler, with the output in one layout whatever is chosen."""
    output = attention(query, key, value, is_causal, causal_offset, key_padding, scale, **fields)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    causal_offset: int,
    key_padding: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    if 0 in (*query.shape, *key.shape, *value.shape):
        return query.new_zeros(*query.shape[:3], value.shape[3])
    return dense_attention(query, key, value, is_causal, causal_offset, key_padding, scale)


def _sparse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    causal_offset: int,
    key_padding: torch.Tensor | None,
    scale: float | None,
    config: S2OConfig,
) -> AttentionResult:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    settings = json.dumps(config.arguments())
    arguments = (query, key, value, is_causal, causal_offset, key_padding, scale, settings)
    symbolic = any(isinstance(size, torch.SymInt) for size in (*query.shape, *key.shape, causal_offset))
    if query.device.type == "cpu" or symbolic:
        return AttentionResult(*torch.ops.s2o.sparse(*arguments))
    return AttentionResult(*_sparse_triton(*arguments))


def _sparse_triton(*arguments: Any) -> tuple[torch.Tensor, ...]:
    from .kernels.launch import sparse_triton

    return sparse_triton(*arguments)


def _sparse_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    causal_offset: int,
    key_padding: torch.Tensor | None,
    scale: float,
    settings: str,
) -> AttentionResult:
    config = S2OConfig(**json.loads(settings))
    geometry = Geometry.of(query, key, is_causal, causal_offset, config)
    return cpu.sparse_attention(query, key, value, geometry, key_padding, scale, config)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _fake_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **fields: Any) -> torch.Tensor:
    return AttentionResult.empty(query, value, 1).output


def _fake_result(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> AttentionResult:
    return AttentionResult.empty(query, value, json.loads(rest[-1])["tile"])


library.impl("attention", attention, "CompositeImplicitAutograd")
library.impl("attention_stats", attention_stats, "CompositeImplicitAutograd")
library.impl("attention_dynamic", attention_dynamic, "CompositeExplicitAutograd")
library.impl("sparse", _sparse_cpu, "CPU")
library.impl("sparse", _sparse_triton, "CUDA")
torch.library.register_fake("s2o::attention_dynamic", _fake_output, lib=library)
torch.library.register_fake("s2o::sparse", _fake_result, lib=library)
