"""Checks whether an attention site can become an operator: its tensors, its call, its length and its mask.

Each check raises `Refused` with the reason where it cannot.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from ..ops.config import S2OConfig
from ..ops.dispatch import choose_sparse, why_dense
from ..ops.validation import DTYPES, LARGEST_SOFTCAP, MAX_HEAD_DIM, dtype_name
from ..ops.visibility import Visibility
from .graph.autocast import autocast_at
from .graph.node_values import constant, fake_tensor, needs_gradients, why_unknown
from .graph.operations import Cleaned
from .graph.read_operations import read_operation
from .graph.torch_internals import guard_or_false
from .logit_terms import are_known, softcap_of
from .mask.empty_rows import EmptyRows
from .mask.prover import Prover
from .mask.refused import Refused
from .mask.terms import Mask
from .match.site import AttentionSite


def check_inputs(site: AttentionSite) -> tuple[torch.Tensor, torch.Tensor]:
    """The fake tensors of a site's query and key, if the operator takes them and its value."""
    if site.obstacle:
        raise Refused(site.obstacle)
    query, key, value = (item.tensor for item in (site.query, site.key, site.value))
    if query is None or key is None or value is None:
        raise Refused(_why_unknown(site))
    _check_tensors(query, key, value, constant(site.enable_gqa))
    _check_dtype(site, query)
    return query, key


def check_call(site: AttentionSite) -> None:
    """Check what a call does besides scaling and masking."""
    if constant(site.dropout_p) != 0:
        raise Refused("dropout is active; call model.eval() or set dropout_p to 0")
    if site.softcap is not None and not are_known(site.softcap):
        raise Refused("the soft-cap is computed while the model runs; use a number")
    if site.softcap is not None and not 0 < softcap_of(site.softcap) <= LARGEST_SOFTCAP:
        raise Refused(f"a soft-cap of {softcap_of(site.softcap):g} caps nothing; leave it out")
    if isinstance(site.is_causal, Node):
        raise Refused("is_causal is computed in the graph; pass True or False")
    if fake_tensor(site.node) is None or needs_gradients(site.node):
        raise Refused("gradients are needed and the operator has no backward; run under torch.no_grad()")


def check_length(site: AttentionSite, config: S2OConfig, mask: Mask | None = None) -> bool:
    """Whether a call is enough work to be sparse at all of its lengths, whatever its mask hides if that is not known.

    Raises:
        Refused: It is not at any.
    """
    query, key, value = (item.tensor for item in (site.query, site.key, site.value))
    assert query is not None and key is not None and value is not None
    terms = None if mask is None else _known_terms(mask)
    shapes = query.shape, key.shape, value.shape
    chosen = choose_sparse(*shapes, terms or Visibility(), query.device, query.dtype, config)
    if chosen is False:
        raise Refused(why_dense(*shapes, terms, query.device, query.dtype, config))
    return chosen is True


def _known_terms(mask: Mask) -> Visibility:
    """What of a mask bounds the keys that a query sees, as far as that is known while compiling."""
    if not isinstance(mask.offset, sympy.Integer):
        return Visibility()
    window = int(mask.window) if isinstance(mask.window, sympy.Integer) else None
    return Visibility(mask.is_causal, int(mask.offset), window=window)


def check_scores(site: AttentionSite, unused: set[Node]) -> None:
    """Check that the scores and probabilities of a site are among the nodes that nothing uses without it."""
    if not site.scores <= unused:
        raise Refused("the attention scores or probabilities are used elsewhere; do not return or keep them")


def proven_mask(site: AttentionSite, prover: Prover) -> Mask:
    """The mask that the masks and the causal flag of a site amount to; its query and key are known tensors."""
    query, key = site.query_and_key
    if site.mask_mod is not None:
        return prover.prove_mask_mod(site.mask_mod, query, key)
    if not site.is_causal:
        mask = prover.prove(site.masks, query, key, has_sinks=site.sinks is not None)
        if mask.empty_rows is EmptyRows.MEAN and any(isinstance(read_operation(x), Cleaned) for x in site.scores):
            raise Refused("NaN of the probabilities is replaced, and masks are finite; hide keys with -inf")
        return mask
    if site.masks:
        raise Refused("attn_mask and is_causal=True exclude each other; pass one of them")
    return Mask(is_causal=True)


def _why_unknown(site: AttentionSite) -> str:
    """Why the tensor of query, key or value is not known."""
    for name, item in {"query": site.query, "key": site.key, "value": site.value}.items():
        kind = why_unknown(item.node) if item.tensor is None else None
        if kind is not None:
            return f"{name} is {kind}"
    return "the shapes of query, key and value are not known while compiling"


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: Any) -> None:
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dim() != 4:
            raise Refused(f"{name} has {tensor.dim()} dimensions; pass [batch, heads, length, channels]")
        if tensor.dtype not in DTYPES:
            raise Refused(f"{name} is {dtype_name(tensor.dtype)}; use float16, bfloat16 or float32")
        if not guard_or_false(tensor.shape[3] <= MAX_HEAD_DIM):
            raise Refused(f"{name} has {tensor.shape[3]} channels a head; at most {MAX_HEAD_DIM} are supported")
        if not guard_or_false(tensor.shape[0] == query.shape[0]):
            raise Refused(f"{name} has another batch size than query; expand it to the batch of query")
    if guard_or_false(query.shape[3] == 0):
        raise Refused("query has no channels, for which releases of PyTorch give different numbers")
    if guard_or_false(key.shape[2] != value.shape[2]):
        raise Refused(f"key has {key.shape[2]} positions and value {value.shape[2]}; pass as many")
    if query.device.type not in ("cpu", "cuda"):
        raise Refused(f"the tensors are on {query.device}; use a CPU or a CUDA device")
    _check_heads(query.shape[1], key.shape[1], value.shape[1], enable_gqa)


def _check_dtype(site: AttentionSite, query: torch.Tensor) -> None:
    """Refuse a site that gives another dtype than the operator: under vmap not all is cast that autocast casts."""
    output, device = fake_tensor(site.node), query.device.type
    with autocast_at(site.node):
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        given = torch.get_autocast_dtype(device) if casts else query.dtype
    for name, arguments in site.output:
        given = arguments[0] if name == "to" else given
    if output is not None and output.dtype != given:
        short, wanted = map(dtype_name, (given, output.dtype))
        raise Refused(f"attention gives {wanted} here, where the operator gives {short}; cast its inputs to {wanted}")


def _check_heads(query: int, key: int, value: int, enable_gqa: Any) -> None:
    if not guard_or_false(key == value):
        raise Refused(f"key has {key} heads and value {value}; expand them to the same number")
    if guard_or_false(query == key):
        return
    if enable_gqa is not True and not guard_or_false(key == 1):
        raise Refused(f"query has {query} heads and key {key}; pass enable_gqa=True")
    if not guard_or_false(query % key == 0):
        raise Refused(f"the {query} heads of query are not a multiple of the {key} heads of key")
