"""``attn_implementation="s2o"`` in transformers' continuous batching, as ``generate_batch`` runs it.

Its engine packs the queries of many requests into one sequence, and its cache gives each layer the keys of all these
requests, packed too. It knows the names of the attention that may be given such a cache, so this module adds one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from ..ops.observe import working_for_all
from ..ops.requests import on_host
from .settings import IMPLEMENTATION

Lengths = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Where the queries of each request start and the last one's end [N + 1], and the same of keys by type of layer."""


class Step:
    """A forward pass of an engine; its layers share the lengths of its requests."""

    def __init__(self) -> None:
        self._lengths: Lengths | None = None

    def lengths(self, queries: torch.Tensor, keys: dict[str, torch.Tensor]) -> Lengths:
        """The same on the host; only the first layer that asks waits for a GPU."""
        if self._lengths is None:
            first, *rest = (torch.tensor(numbers) for numbers in on_host(queries, *keys.values()))
            self._lengths = first, dict(zip(keys, rest, strict=True))
        return self._lengths


_step: ContextVar[Step | None] = ContextVar("s2o_step", default=None)


def in_engine() -> bool:
    """Whether an engine runs a model right now, so that no mask says which tokens belong together."""
    return not torch.compiler.is_compiling() and _step.get() is not None


def attend_step(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: dict[str, Any],
    **arguments: Any,
) -> torch.Tensor:
    """Store the keys and values of a step, and attend to all that their requests have.

    Args:
        module: The layer.
        query: [1, Hq, T, D], the requests of the step one after the other.
        key: [1, Hkv, T, D], of the same tokens.
        value: [1, Hkv, T, Dv].
        options: What the engine passes with them, such as `cache` and `cu_seq_lens_q`.
        **arguments: Others of ``torch.ops.s2o.attention_varlen``.

    Returns:
        The output [1, T, Hq, Dv].

    Raises:
        ValueError: No engine that this module knows runs the model.
    """
    step, cache = _step.get(), options["cache"]
    if step is None:
        raise ValueError(
            "attn_implementation='s2o' takes a paged cache from the manager of transformers' continuous batching "
            "alone, as generate_batch makes it; use 'sdpa' elsewhere"
        )
    kind = cache.layer_to_allocator[module.layer_idx]
    starts, starts_of_keys = step.lengths(options["cu_seq_lens_q"], options["cu_seq_lens_k"])
    most_queries, most_keys = options["max_length_q"], options["max_length_k"][kind.layer_type]
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=dict(options))
    window = getattr(kind, "sliding_window", None)
    output = torch.ops.s2o.attention_varlen(
        *(x[0].transpose(0, 1) for x in (query, key, value)), starts, starts_of_keys[kind.layer_type], most_queries,
        most_keys, window_size=(-1 if window is None else window - 1, 0), **arguments,
    )  # fmt: skip
    return output[None]


def _runs_here(model: torch.nn.Module) -> bool:
    return bool(getattr(model.config, "_attn_implementation", None) == IMPLEMENTATION)


def _keep_implementation(
    choose: Callable[..., None], manager: ContinuousBatchingManager, model: torch.nn.Module, *rest: Any, **options: Any
) -> None:
    """Leave this implementation in place, which the engine would refuse, or replace by FlashAttention."""
    if not _runs_here(model):
        choose(manager, model, *rest, **options)
    elif not _IS_SUPPORTED:
        raise ValueError(
            "continuous batching with attn_implementation='s2o' needs transformers 5.19 or later, in which a cache "
            f"packs the keys of requests, and this is {transformers.__version__}; use 'sdpa'"
        )


def _check_settings(create: Callable[..., Any], manager: ContinuousBatchingManager) -> Any:
    """Refuse what cannot be: lengths of requests must be known on the host, in each step anew."""
    if _runs_here(manager.model):
        settings = manager.continuous_batching_config
        for name, is_on in (
            ("use_cuda_graph", any(settings.cuda_graph_booleans)),
            ("varlen_compile_config", settings.varlen_compile_config is not None),
        ):
            if is_on:
                raise ValueError(
                    f"{name} must be off in continuous batching with attn_implementation='s2o', which runs eagerly"
                )
    return create(manager)


def _run_step(run: Callable[..., None], manager: ContinuousBatchingManager) -> None:
    """Run a step of a model with this implementation, in which `in_engine` is true and all profiles see its calls."""
    if not _runs_here(manager.model):
        return run(manager)
    with _entered(), working_for_all():
        return run(manager)


@contextmanager
def _entered() -> Iterator[None]:
    token = _step.set(Step())
    try:
        yield
    finally:
        _step.reset(token)


def _wrap(name: str, wrapper: Callable[..., Any]) -> None:
    """Let `wrapper` be called with a method of the engine, and what that is called with."""
    method = getattr(ContinuousBatchingManager, name)

    @functools.wraps(method)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        return wrapper(method, *arguments, **options)

    setattr(ContinuousBatchingManager, name, wrapped)


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "switch_to_cb_friendly_attn": _keep_implementation,
    "_create_batch_processor": _check_settings,
    "_generation_step": _run_step,
}
_IS_SUPPORTED = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters and all(
    hasattr(ContinuousBatchingManager, name) for name in _WRAPPERS
)
"""Whether the cache gives each layer its own lengths, and the engine has the methods that this module wraps."""


def register() -> None:
    """Let the engine run models with this implementation; others it runs as before."""
    for name, wrapper in _WRAPPERS.items():
        if hasattr(ContinuousBatchingManager, name):
            _wrap(name, wrapper)
