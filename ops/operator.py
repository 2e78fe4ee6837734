"""The operators ``torch.ops.s2o.attention`` and ``torch.ops.s2o.attention_stats``.

Both are compositions: they validate, cast under autocast, choose between sparse and dense, and call `sparse`, SDPA or,
where SDPA would need a large mask, `dense`. Of these `sparse` and `dense` are opaque to the compiler. Where Inductor
makes a package for a GPU, that has to carry the kernels, and `sparse_triton` shows them (a `triton_op`). It does not
elsewhere: Inductor takes seconds for the kernels of each call.
Where lengths are symbolic and the choice depends on them, they call `attention_dynamic`, which chooses at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from . import cpu
from .config import S2OConfig
from .dense import (
    attend_without_mask,
    attends_by_kernel,
    decode_attention,
    dense_attention,
    is_plain,
    plain_attention,
    positive_scale,
)
from .dispatch import choose_sparse, has_kernels
from .distributed import is_dtensor, local_shape, refuse_context_parallel, validate_placements
from .memory import fit_into_memory
from .observe import SparseInputs, recorded
from .outcomes import Outcome, call_key, remember, remembered
from .part import Part
from .result import AttentionResult
from .rule.sinks import add_sinks
from .sizes import statically_known_true
from .surroundings import is_packaging
from .validation import validate
from .visibility import Visibility

_DEFAULT = S2OConfig()
_FEW_QUERIES = 8
"""How many queries are shaped like decoding, where what SDPA lacks is cheapest spelled out."""

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, bool is_causal=False, SymInt causal_offset=0, "
    "Tensor? key_padding=None, float? scale=None, SymInt? window=None, Tensor? query_documents=None, "
    'Tensor? key_documents=None, Tensor? mask=None, float softcap=0.0, Tensor? sinks=None, str site="", '
    f'*, float threshold={_DEFAULT.threshold}, int? min_length=None, int last_queries=0, str settings="")'
)
_RESULT = "(Tensor output, Tensor lse, Tensor visited)"

library = torch.library.Library("s2o", "DEF")
library.define(f"attention{SCHEMA} -> Tensor")
library.define(f"attention_stats{SCHEMA} -> {_RESULT}")
library.define(f"attention_dynamic{SCHEMA} -> Tensor")
library.define(
    "sparse(Tensor query, Tensor key, Tensor value, bool is_causal, SymInt causal_offset, Tensor? key_padding, "
    "SymInt? window, Tensor? query_documents, Tensor? key_documents, Tensor? mask, float scale, float softcap, "
    f"str site, str settings) -> {_RESULT}"
)
library.define(
    "dense(Tensor query, Tensor key, Tensor value, bool is_causal, SymInt causal_offset, Tensor? key_padding, "
    "SymInt? window, Tensor? query_documents, Tensor? key_documents, float scale, float softcap, Tensor? sinks) "
    "-> Tensor"
)


def attention(*arguments: Any, **keywords: Any) -> torch.Tensor:
    """The implementation of the operator, whose arguments and errors ``s2o_compile.attention`` documents.

    Calls that are short (`S2OConfig.min_length`) or shaped like decoding run dense: by SDPA; without a mask where one
    would be large (`dense`); or with a soft cap or sinks, which SDPA lacks, by the sparse implementation with every key
    in the dense span, or spelled out for a few queries.
    """
    return Call.of(*arguments, **keywords).attend()


def attention_stats(*arguments: Any, **keywords: Any) -> AttentionResult:
    """`attention`, with log-sum-exp [B, Hq, Lq] (float32) and visited work [B, Hq, tiles] (int64, pairs).

    Where `attention` would run SDPA, this visits every key in the dense span instead, so that it can count.
    """
    call = Call.of(*arguments, **keywords)
    return call.spans() if call.chooses_sparse() is False else call.sparse()


def attention_dynamic(query: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
    """`attention`, opaque to the compiler, with the output in one layout whatever is chosen.

    Autocast took its part as the graph was traced.
    """
    with without_autocast(query.device.type):
        output = attention(query, *arguments, **keywords)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def attend_as_before(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    causal_offset: int,
    window: int | None,
    scale: float | None,
    softcap: float,
    config: S2OConfig,
) -> torch.Tensor | None:
    """What `attention` gives for a call like an earlier one, which nothing watches; None where there was none.

    The host needs less for it than for the operator's arguments in the dispatcher.
    """
    known = remembered(call_key(query, key, value, is_causal, causal_offset, window, scale, softcap, config.values))
    if known is None:
        return None
    refuse_context_parallel()
    if known.is_plain:
        return plain_attention(query, key, value, known.terms.is_causal, scale)
    call = Call(query, key, value, known.terms, scale, softcap, None, "", known.config, known.is_sparse)
    return call.attend()


def _values(
    threshold: float = _DEFAULT.threshold, min_length: int | None = None, last_queries: int = 0, settings: str = ""
) -> tuple[Any, ...]:
    """`S2OConfig.values` of arguments, of which the dispatcher leaves out those that are as in the schema."""
    return threshold, min_length, last_queries, settings


class Call(NamedTuple):
    """The arguments of a call, validated and in the form in which the implementations take them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visibility: Visibility
    scale: float | None
    softcap: float
    sinks: torch.Tensor | None
    site: str
    config: S2OConfig
    is_sparse: bool | None = None
    """What `chooses_sparse` says, where that is known already."""

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        is_causal: bool = False,
        causal_offset: int = 0,
        key_padding: torch.Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
        query_documents: torch.Tensor | None = None,
        key_documents: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        site: str = "",
        **settings: Any,
    ) -> Call:
        """Validate what an operator was called with, in the order of its schema.

        `site` is what profiles and traces call it, by default its shapes; `settings` are `S2OConfig.arguments`.
        """
        refuse_context_parallel()
        query, key, value = autocast(query, key, value)
        terms = Visibility(is_causal, causal_offset, key_padding, window, query_documents, key_documents, mask)
        known_by = None
        if sinks is None and terms.is_positional:
            of_settings = _values(**settings)
            known_by = call_key(query, key, value, is_causal, causal_offset, window, scale, softcap, of_settings)
        if (known := remembered(known_by)) is not None:
            return cls(query, key, value, known.terms, scale, softcap, None, site, known.config, known.is_sparse)
        config = S2OConfig.from_arguments(**settings)
        validate(query, key, value, terms, scale, softcap, sinks)
        validate_placements(
            query=query, key=key, value=value, key_padding=key_padding, query_documents=query_documents,
            key_documents=key_documents, mask=mask, sinks=sinks,
        )  # fmt: skip
        given = query
        query, key = with_channels(query), with_channels(key)
        query, scale = positive_scale(query, scale)
        if terms.mask is not None:
            terms = terms._replace(mask=terms.mask[(None,) * (4 - terms.mask.dim())])
        terms = terms.simplified(query.shape[2], key.shape[2])
        call = cls(query, key, value, terms, scale, softcap, sinks, site, config)
        if known_by is None or query is not given or (is_sparse := call.chooses_sparse()) is None:
            return call
        call = call._replace(is_sparse=is_sparse)
        remember(known_by, Outcome(terms, config, is_sparse, call.is_plain))
        return call

    def attend(self) -> torch.Tensor:
        """The output, sparse or dense."""
        is_sparse = self.chooses_sparse()
        if is_sparse is None:
            return self.dynamic()
        return self.sparse().output if is_sparse else self.dense()

    def chooses_sparse(self) -> bool | None:
        """Whether the call is worth the sparse path; None where that is known at run time only."""
        if self.is_sparse is not None:
            return self.is_sparse
        shapes = local_shape(self.query), local_shape(self.key), local_shape(self.value)
        return choose_sparse(*shapes, self.visibility, self.query.device, self.query.dtype, self.config)

    def dynamic(self) -> torch.Tensor:
        """The output of whichever is chosen at run time."""
        terms = self.visibility
        return torch.ops.s2o.attention_dynamic(
            self.query, self.key, self.value, terms.is_causal, terms.causal_offset, terms.key_padding, self.scale,
            terms.window, terms.query_documents, terms.key_documents, terms.mask, self.softcap, self.sinks, self.site,
            **self.config.arguments(),
        )  # fmt: skip

    @property
    def is_plain(self) -> bool:
        """Whether SDPA answers the call, without a mask."""
        if self.is_sparse is not False or self.softcap or self.sinks is not None or is_dtensor(self.query):
            return False
        return self._has_elements and is_plain(self.visibility)

    @property
    def _has_elements(self) -> bool:
        return not any(0 in x.shape for x in (self.query, self.key, self.value))

    def dense(self) -> torch.Tensor:
        """The output of dense attention, in whichever way is fastest."""
        query, key, value = self.query, self.key, self.value
        if is_dtensor(query):
            return self.dense_of_dtensors()
        if not self._has_elements:
            return query.new_zeros(*query.shape[:3], value.shape[3])
        if not self.softcap and self.sinks is None:
            return dense_attention(query, key, value, self.visibility, self.scale)
        if statically_known_true(query.shape[2] <= _FEW_QUERIES):
            return decode_attention(query, key, value, self.visibility, self.factor, self.softcap, self.sinks)
        if self.visibility.mask is None and attends_by_kernel(query) and not is_packaging():
            return self.without_mask()
        return self.spans().output

    def dense_of_dtensors(self) -> torch.Tensor:
        """The output of dense attention by operators that have sharding rules, which SDPA has not on all devices."""
        is_plain = not self.softcap and self.sinks is None
        if self.visibility.mask is None and (is_plain or attends_by_kernel(self.query)):
            return self.without_mask()
        return self.spans().output

    def without_mask(self) -> torch.Tensor:
        """The output of dense attention that writes no mask out; there is no general mask."""
        terms = self.visibility[:-1]
        return torch.ops.s2o.dense(self.query, self.key, self.value, *terms, self.factor, self.softcap, self.sinks)

    @property
    def factor(self) -> float:
        """The scale, also where it is left to its default."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def spans(self) -> AttentionResult:
        """Attend every key in the dense span."""
        return self._replace(config=self.config.without_ranking()).sparse()

    def sparse(self, part: Part | None = None) -> AttentionResult:
        """Sparse attention as the configuration says; a `part` of a sequence is computed at once, and never traced."""
        settings, value = self.config.as_json, with_channels(self.value)
        arguments = (self.query, self.key, value, *self.visibility, self.factor, self.softcap)
        if is_packaging() and self.shows_kernels():
            from .kernels.pipeline import sparse_triton

            if is_dtensor(self.query):
                from .sharding import register_rule

                register_rule(torch.ops.s2o.sparse_triton.default)
            result = AttentionResult(*sparse_triton(*arguments, settings))
        elif part is not None:
            attend = _sparse_cuda if self.query.is_cuda else _sparse_cpu
            result = attend(*arguments, self.site, settings, part)
        else:
            result = AttentionResult(*torch.ops.s2o.sparse(*arguments, self.site, settings))
        if value is not self.value:
            result = result._replace(output=result.output[..., :0])
        return result if self.sinks is None else add_sinks(result, self.sinks)

    def shows_kernels(self) -> bool:
        """Whether the compiler can see the kernels of sparse attention."""
        sizes = (*self.query.shape, *self.key.shape, self.visibility.causal_offset, self.visibility.window)
        symbolic = any(isinstance(size, torch.SymInt) for size in sizes)
        is_empty = _is_empty(self.query, self.key)
        return self.query.is_cuda and not is_empty and not symbolic and has_kernels(self.visibility, self.config)


def with_channels(x: torch.Tensor) -> torch.Tensor:
    """A query, key or value; one channel of zeros where it has none, which says as much."""
    return x.new_zeros(*x.shape[:-1], 1) if statically_known_true(x.shape[-1] == 0) else x


def _is_empty(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether there are no queries, or no keys that they could see; both have channels."""
    return 0 in query.shape or 0 in key.shape


def _sparse_cpu(*arguments: Any) -> AttentionResult:
    return _dispatched(_attend_by_torch, *arguments)


def _attend_by_torch(call: SparseInputs, config: S2OConfig) -> AttentionResult:
    call = call.in_order
    operands = (call.query, call.key, call.value, call.visibility, call.scale, call.softcap)
    return cpu.sparse_attention(*operands, config, call.part)


def _sparse_cuda(*arguments: Any) -> AttentionResult:
    return _dispatched(_attend_by_kernels, *arguments)


def _attend_by_kernels(call: SparseInputs, config: S2OConfig) -> AttentionResult:
    if not has_kernels(call.visibility, config):
        return _attend_by_torch(call, config)
    from .kernels.pipeline import reads_places, sparse_attention

    if call.has_places and not reads_places(call.query, call.visibility, call.softcap, config):
        call = call.in_order
    operands = (call.query, call.key, call.value, call.visibility, call.scale, call.softcap)
    return sparse_attention(*operands, config, call.part)


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    *terms, scale, softcap, sinks = rest
    with without_autocast(query.device.type):
        return attend_without_mask(query, key, value, Visibility(*terms), scale, softcap, sinks)


def _dispatched(
    attend: Callable[[SparseInputs, S2OConfig], AttentionResult],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: Any,
) -> AttentionResult:
    """What an implementation computes, which is not asked where there is nothing to attend to."""
    refuse_context_parallel()  # A graph may have been compiled outside.
    terms, (scale, softcap, site, settings, *part) = rest[:7], rest[7:]
    config = S2OConfig.from_json(settings)
    call = SparseInputs(site, query, key, value, Visibility(*terms), scale, softcap, config, *part)
    if _is_empty(query, key):
        return AttentionResult.of_nothing(query, value, call.config.ranking.tile)
    with without_autocast(query.device.type):
        return recorded(call, lambda: fit_into_memory(partial(attend, call), call.config))


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which nothing is cast: what an implementation computes has the dtypes that it chose."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _fake_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **settings: Any) -> torch.Tensor:
    return AttentionResult.empty(query, value, 1).output


def _fake_result(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> AttentionResult:
    return AttentionResult.empty(query, value, S2OConfig.from_json(rest[-1]).ranking.tile)


library.impl("attention", attention, "CompositeImplicitAutograd")
library.impl("attention_stats", attention_stats, "CompositeImplicitAutograd")
library.impl("attention_dynamic", attention_dynamic, "CompositeExplicitAutograd")
library.impl("dense", _dense, "CompositeExplicitAutograd")
library.impl("sparse", _sparse_cpu, "CPU")
library.impl("sparse", _sparse_cuda, "CUDA")
torch.library.register_fake("s2o::attention_dynamic", _fake_output, lib=library)
torch.library.register_fake("s2o::dense", _fake_output, lib=library)
torch.library.register_fake("s2o::sparse", _fake_result, lib=library)
