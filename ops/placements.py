"""Where the tensors of a call may lie when they are DTensors: whole on each rank, or sharded over batch or heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.tensor import Placement, Replicate, Shard

BATCH, HEADS = 0, 1

_DIMENSIONS: dict[str, tuple[int | None, int | None]] = {
    "query": (0, 1),
    "key": (0, 1),
    "value": (0, 1),
    "key_padding": (0, None),
    "query_documents": (0, None),
    "key_documents": (0, None),
    "mask": (-4, -3),
    "sinks": (None, 0),
}
"""The dimensions of each tensor that are the batch and the query heads (for key and value: the KV heads)."""


def placements_of_inputs(given: Mapping[str, Any]) -> dict[str, tuple[Placement, ...]]:
    """The placements with which the operators take tensors, so that each rank has what its part of the query needs.

    They differ from those given at most where a tensor is whole and is cut, without communication.

    Args:
        given: DTensors or their specs, by the names of the arguments of ``s2o::attention``; with a query and a key.

    Raises:
        ValueError: A tensor is on another mesh, or sharded in another way, which would need communication.
    """
    query, kv_heads = given["query"], given["key"].shape[1]
    _check_query(query, kv_heads)
    return {name: _placements(name, tensor, query, kv_heads) for name, tensor in given.items()}


def local_shape(tensor: Any) -> tuple[Any, ...]:
    """The largest shape of a part of a DTensor; it is the same on all ranks."""
    shape = list(tensor.shape)
    for placement, ranks in zip(tensor.placements, tensor.device_mesh.shape, strict=True):
        if type(placement) is Shard:
            shape[placement.dim] = -(-shape[placement.dim] // ranks)
    return tuple(shape)


def _check_query(query: Any, kv_heads: int) -> None:
    for placement in query.placements:
        if _dimension(placement) not in (None, BATCH, HEADS):
            raise ValueError(
                f"query must be whole, or sharded over the batch (dimension 0) or the heads (1), not {placement}: "
                "redistribute query, key and value, for example to [Shard(1)]"
            )
    ranks = _ranks_of_heads(query)
    divided, name = (kv_heads, "key") if kv_heads != 1 else (query.shape[1], "query")
    if divided % ranks:
        raise ValueError(
            f"{name} must have a multiple of {ranks} heads, over as many ranks as the heads of query are sharded, "
            f"not {divided}: shard fewer ways, or the batch"
        )


def _ranks_of_heads(query: Any) -> int:
    sizes = zip(query.placements, _mesh(query).shape, strict=True)
    return math.prod(size for placement, size in sizes if placement == Shard(HEADS))


def _placements(name: str, tensor: Any, query: Any, kv_heads: int) -> tuple[Placement, ...]:
    if _mesh(tensor) != _mesh(query):
        raise ValueError(f"{name} must be on the mesh of query, {_mesh(query)}, not {_mesh(tensor)}")
    wanted = tuple(_placement(name, tensor.shape, placement, kv_heads) for placement in query.placements)
    if any(one not in (another, Replicate()) for one, another in zip(tensor.placements, wanted, strict=True)):
        raise ValueError(
            f"{name} must be placed as {list(wanted)}, or whole, where query is {list(query.placements)}, "
            f"not {list(tensor.placements)}: redistribute it"
        )
    return wanted


def _placement(name: str, shape: Sequence[Any], query: Placement, kv_heads: int) -> Placement:
    """The placement of a tensor on a mesh dimension where that of the query is known."""
    dimension = _dimension(query)
    if dimension is None or (dimension == HEADS and name in ("key", "value") and kv_heads == 1):
        return Replicate()
    own = _DIMENSIONS[name][dimension]
    if own is None or -own > len(shape):
        return Replicate()
    own %= len(shape)
    return Replicate() if name == "mask" and shape[own] == 1 else Shard(own)


def _dimension(placement: Placement) -> int | None:
    """The dimension that is sharded, None where the tensor is whole, and -1 for all other placements."""
    if type(placement) is Shard:
        return placement.dim
    return None if type(placement) is Replicate else -1


def _mesh(tensor: Any) -> Any:
    return getattr(tensor, "device_mesh", None) or tensor.mesh
