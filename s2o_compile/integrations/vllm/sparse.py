"""What is added to a dense attention backend of vLLM: it runs as before, but for long requests, which run sparse.

`SparseBuilder` decides once a step, on the host, for all layers. Where no request is long, as while all decode, the
step is that of the dense backend. Else it is cut into runs of neighbours (`runs`): the dense backend gets those that
are short, and ``torch.ops.s2o.attention_varlen_out`` those that are long, with their pages.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

from ...ops.dispatch import dense_queries
from ...ops.memory import workspace
from ...ops.observe import working_for_all
from .runs import Layer, Run, pages_in_window
from .settings import settings_of

logger = init_logger("vllm.s2o")

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")


class Long(NamedTuple):
    """Requests that run sparse: lengths on the host, and their rows of the block table."""

    tokens: slice
    starts: torch.Tensor
    keys: torch.Tensor
    table: torch.Tensor


class Short(NamedTuple):
    """Requests that run dense, with the dense backend's metadata for them alone."""

    tokens: slice
    metadata: Any


class SparseBuilder:
    """Of the metadata of a step; stands before a dense backend's builder among the bases of a class."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        # A draft would keep the metadata of a step for the next ones, and with it what is long.
        self.supports_draft_decode_metadata_update = False
        layers = [layer.impl for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()]
        # Layers that share a cache have one shape; the operator looks at each layer's own window.
        windows = {layer.window_size[0] for layer in layers}
        window = -1 if -1 in windows else max(windows)
        self.layer = Layer(
            layers[0].num_heads, layers[0].num_kv_heads, layers[0].head_size, (window, 0), device,
            vllm_config.model_config.dtype, layers[0].s2o,
        )  # fmt: skip

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *rest: Any, **named: Any
    ) -> Any:
        """The dense backend's metadata, whose attribute `s2o` holds the parts of a step that has long requests."""
        dense = super().build  # type: ignore[misc]
        metadata = dense(common_prefix_len, common_attn_metadata, *rest, **named)
        runs = self._runs(common_attn_metadata)
        metadata.s2o = None
        if any(run.is_sparse for run in runs):
            short = [run for run in runs if not run.is_sparse]
            slices = [UBatchSlice(run.requests, run.tokens) for run in short]
            parts = split_attn_metadata(slices, common_attn_metadata)
            metadata.s2o = [_long(run, common_attn_metadata) for run in runs if run.is_sparse] + [
                Short(run.tokens, dense(common_prefix_len, part, *rest, **named))
                for run, part in zip(short, parts, strict=True)
            ]
        return metadata

    def _runs(self, common: CommonAttentionMetadata) -> list[Run]:
        # The host may know no more than a bound of the keys of a request that decodes, but those of a prompt it knows.
        lengths = common.seq_lens_cpu_upper_bound
        is_short = common.max_query_len <= dense_queries(self.layer.config)
        if is_short or common.causal is not True:
            return []
        if lengths is None:
            logger.warning_once("s2o: vLLM does not say on the host how long requests are, so that all run dense")
            return []
        return self.layer.runs(common.query_start_loc_cpu.tolist(), lengths.tolist())


def _long(run: Run, common: CommonAttentionMetadata) -> Long:
    requests, starts = run.requests, common.query_start_loc_cpu
    assert common.seq_lens_cpu_upper_bound is not None
    return Long(
        run.tokens,
        starts[requests.start : requests.stop + 1] - starts[requests.start],
        common.seq_lens_cpu_upper_bound[requests].clone(),
        common.block_table_tensor[requests],
    )


class SparseImpl:
    """Of one layer's attention; stands before a dense backend's implementation among the bases of a class."""

    _has_run = False
    _has_claimed = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        vllm_config = get_current_vllm_config()
        given = {"alibi_slopes": alibi_slopes, **others}
        _refuse(kv_cache_dtype, vllm_config.model_config.dtype, attn_type, given)
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, sinks,
        )  # type: ignore[call-arg]  # fmt: skip
        self.supports_quant_query_input = False
        self.s2o = settings_of(vllm_config.additional_config)
        self.window_size = (-1 if sliding_window is None else sliding_window - 1, 0)
        self.max_keys: int = vllm_config.model_config.max_model_len
        self.max_queries: int = vllm_config.scheduler_config.max_num_batched_tokens
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.arguments = {"scale": float(scale), "softcap": logits_soft_cap or 0.0, "window_size": self.window_size}
        self.sinks = sinks

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Outputs have the dtype of the model."""
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *rest: Any,
        **named: Any,
    ) -> torch.Tensor:
        """Write the attention of all requests of a step to `output` [T, Hq, D]; shapes as in vLLM's backends."""
        dense = super().forward  # type: ignore[misc]
        if attn_metadata is None and not self._has_claimed:
            self._has_claimed = True
            self.claim_memory(query)
        parts = getattr(attn_metadata, "s2o", None)
        if parts is None:
            return dense(layer, query, key, value, kv_cache, attn_metadata, output, *rest, **named)
        for part in parts:
            rows = query[part.tokens]
            if isinstance(part, Long):
                self._attend_sparsely(layer, rows, kv_cache, part, output[part.tokens])
            else:
                new = (None if x is None else x[part.tokens] for x in (key, value))
                dense(layer, rows, *new, kv_cache, part.metadata, output[part.tokens], *rest, **named)
        return output

    def _attend_sparsely(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, part: Long, output: torch.Tensor
    ) -> None:
        """Attend to pages of `kv_cache` [blocks, Hkv, block size, 2 D], a key and its value side by side."""
        pages = kv_cache.transpose(1, 2)
        keys, values = pages[..., : self.head_size], pages[..., self.head_size :]
        queries = part.starts.diff()
        seen, table = pages_in_window(queries, part.keys, part.table, self.window_size[0], pages.shape[1])
        self._log(layer, int(queries.max()), int(part.keys.max()))
        with working_for_all():
            torch.ops.s2o.attention_varlen_out(
                output, query, keys, values, part.starts, None, int(queries.max()), int(seen.max()),
                seqused_k=seen, block_table=table, sinks=self.sinks, site=layer.layer_name,
                **self.arguments, **self.s2o.arguments(),
            )  # fmt: skip

    def _log(self, layer: Any, queries: int, keys: int) -> None:
        """Say once, in each process, that something runs sparse."""
        if not SparseImpl._has_run:
            SparseImpl._has_run = True
            logger.info(
                "s2o: long requests run sparse, from now on without a word; the first is in layer %s, %d queries over "
                "%d keys, threshold %g",
                layer.layer_name, queries, keys, self.s2o.threshold,
            )  # fmt: skip

    def claim_memory(self, query: torch.Tensor) -> int:
        """Allocate as many bytes as the largest sparse call, and let them go: vLLM measures what its first run takes.

        The keys and values of the longest request may have to be gathered, keys are copied in float8, and lists take a
        workspace.

        Returns:
            How many bytes.
        """
        keys = self.max_keys * self.num_kv_heads * self.head_size * (2 * query.element_size() + 1)
        outputs = self.max_queries * self.num_heads * self.head_size * query.element_size()
        size = workspace() + keys + outputs
        torch.empty(size, dtype=torch.uint8, device=query.device)
        return size


def _refuse(kv_cache_dtype: str, dtype: torch.dtype, attn_type: str, options: dict[str, Any]) -> None:
    """Refuse what would change the result and is not known.

    Raises:
        ValueError: There is such a thing.
    """
    of_model = str(dtype).removeprefix("torch.")
    if kv_cache_dtype not in KV_CACHE_DTYPES or kv_cache_dtype not in ("auto", of_model):
        raise ValueError(
            f"kv_cache_dtype must be 'auto' or the model's {of_model!r} with s2o attention, not {kv_cache_dtype!r}"
        )
    if attn_type != AttentionType.DECODER:
        raise ValueError(f"s2o attention is for decoders, and this layer's type is {str(attn_type)!r}")
    unknown = [name for name, value in options.items() if value not in (None, False, -1)]
    if unknown:
        raise ValueError(f"s2o attention has no {min(unknown)}; choose another attention backend for this model")
