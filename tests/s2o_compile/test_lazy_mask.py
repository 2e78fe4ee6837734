"""The mask of ``attn_implementation="s2o"`` is in every operation the tensor that it stands for."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2o_compile.ops.visibility import Visibility

from ..passes.capture import EXACT
from .test_transformers import MODELS, pair, prompts

lazy_mask = pytest.importorskip("s2o_compile.integrations.lazy_mask")
attention = pytest.importorskip("s2o_compile.integrations.transformers").s2o_attention

SHAPE = (2, 1, 6, 10)


def both(seed: int = 0) -> tuple[Any, torch.Tensor]:
    """A lazy mask, and the plain one it stands for."""
    torch.manual_seed(seed)
    terms = Visibility(is_causal=True, causal_offset=4, window=7, key_padding=torch.rand(SHAPE[0], SHAPE[3]) < 0.7)
    lazy = lazy_mask.LazyMask(terms, SHAPE, torch.device("cpu"))
    return lazy, terms.as_mask(2, 6, 10, torch.device("cpu")).clone()


def other(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator) < 0.5


def saved(mask: torch.Tensor) -> Any:
    file = io.BytesIO()
    torch.save({"mask": mask, "again": mask}, file)
    file.seek(0)
    return torch.load(file)


def set_(name: str, value: Any) -> Callable[[torch.Tensor], Any]:
    return lambda mask: setattr(mask, name, value)


def module_of(mask: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer("mask", mask)
    return module


def item(index: Any, value: Any) -> Callable[[torch.Tensor], Any]:
    return lambda mask: mask.__setitem__(index, value)


def through(view: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    return lambda mask: torch.from_numpy(view(mask)).logical_not_()


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda mask: (mask.shape, mask.dtype, mask.device, mask.ndim, mask.size(1), mask.dim(), len(mask)),
    "strides": lambda mask: (mask.stride(), mask.is_contiguous(), mask.storage_offset(), mask.element_size()),
    "class": lambda mask: (isinstance(mask, torch.Tensor), torch.is_tensor(mask), isinstance(mask, torch.BoolTensor)),
    "kind": lambda mask: (torch.is_floating_point(mask), torch.is_complex(input=mask), mask.grad_fn, mask.is_leaf),
    "bytes": lambda mask: (mask.nbytes, mask.untyped_storage().nbytes(), len(mask.storage())),
    "and": lambda mask: mask & other(),
    "reversed": lambda mask: (other() & mask, other() | mask, other() ^ mask),
    "compare": lambda mask: (mask == other(), mask != other(), torch.equal(mask, other())),
    "not": lambda mask: (~mask, mask.logical_not(), torch.logical_not(mask)),
    "arithmetic": lambda mask: (mask + 1, 1.0 - mask.float(), mask * torch.rand(10, generator=torch.Generator())),
    "reduce": lambda mask: (mask.sum(), mask.any(-1), mask.all(), mask.float().mean(), mask.max(-1), mask.nonzero()),
    "to": lambda mask: (mask.to(torch.float16), mask.to("meta").shape, mask.int(), mask.type(torch.long), mask.half()),
    "of another": lambda mask: (torch.ones(3).to(mask), mask.to(torch.ones(3)), torch.ones(3).type_as(mask)),
    "new": lambda mask: (torch.zeros_like(mask), mask.new_ones(3), torch.empty_like(mask).shape),
    "clone": lambda mask: (mask.clone(), mask.detach(), mask.data, torch.tensor(mask), torch.as_tensor(mask) is mask),
    "same": lambda mask: [same is mask for same in (mask.to("cpu"), mask.cpu(), mask.bool(), mask.contiguous())],
    "where": lambda mask: (torch.where(mask, 1.0, -1.0), torch.ones(6, 10).masked_fill(mask, 0)),
    "index": lambda mask: (mask[0, 0, 1:, ::2], mask[..., -1], mask[other()], torch.arange(10)[mask[0, 0, 0]]),
    "views": lambda mask: (mask[:, :, :, :5], mask.expand(2, 3, 6, 10), mask.view(-1), mask.mT, mask.squeeze(1)),
    "unpack": lambda mask: (*mask, *mask.unbind(2), *mask.chunk(2), *mask.split(4, dim=-1)),
    "join": lambda mask: (torch.cat([mask, other()]), torch.stack([mask, mask]), torch.nn.functional.pad(mask, (0, 2))),
    "collate": lambda mask: torch.utils.data.default_collate([mask, mask]),
    "repeat": lambda mask: (mask.repeat(1, 2, 1, 1), mask.repeat_interleave(2, 0), mask.roll(1, -1), mask.flip(-1)),
    "python": lambda mask: (mask.tolist(), mask[0, 0, 0, 0].item(), bool(mask.any()), [len(row) for row in mask]),
    "numpy": lambda mask: (mask.numpy(), numpy.asarray(mask), numpy.array(mask), mask.__array__()),
    "dlpack": lambda mask: (torch.from_dlpack(mask), numpy.from_dlpack(mask), mask.__dlpack_device__()),
    "copy": lambda mask: (copy.copy(mask), copy.deepcopy(mask), copy.deepcopy({"a": mask, "b": [mask]})),
    "copy of views": lambda mask: shares(copy.deepcopy({"mask": mask, "view": mask[:, :, 1]})),
    "pickle": lambda mask: (pickle.loads(pickle.dumps(mask)), saved(mask), len(ForkingPickler.dumps(mask)) > 0),
    "state": lambda mask: module_of(mask).state_dict()["mask"],
    "module": lambda mask: (copy.deepcopy(module_of(mask)).mask, module_of(mask).to(torch.float32).mask),
    "vmap": lambda mask: (torch.vmap(lambda row: row.sum())(mask), torch.vmap(torch.logical_not, 3)(mask)),
    "attention": lambda mask: torch.nn.functional.scaled_dot_product_attention(*tensors(), attn_mask=mask),
    "hash": lambda mask: (hash(mask) == id(mask), {mask: 1}[mask], mask in {mask}),
    "format": lambda mask: mask.sum().__format__("d"),
    "mode": lambda mask: under_device(mask),
}  # fmt: skip


def shares(tensors: dict[str, torch.Tensor]) -> bool:
    mask, view = tensors.values()
    return mask.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()


def under_device(mask: torch.Tensor) -> Any:
    with torch.device("cpu"):
        return mask.shape, mask.sum(), mask[..., 0]


def tensors() -> list[torch.Tensor]:
    """Query, key and value for a mask."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 4, length, 8, generator=generator) for length in (6, 10, 10)]


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": item((..., 5), False),
    "items": item((0, slice(None), slice(None, None, 2)), other((1, 3, 10))),
    "by mask": item(other(), True),
    "by index": item((slice(None), slice(None), slice(None), torch.tensor([1, 3])), False),
    "fill": lambda mask: mask.fill_(True) is mask,
    "zero": lambda mask: mask.zero_(),
    "masked fill": lambda mask: mask.masked_fill_(other(), False),
    "and": lambda mask: mask.__iand__(other()),
    "or": lambda mask: mask.__ior__(other()),
    "xor": lambda mask: mask.bitwise_xor_(other()),
    "method": lambda mask: mask.logical_and_(other()) is mask,
    "copy": lambda mask: mask.copy_(other()),
    "scatter": lambda mask: mask.scatter_(3, torch.zeros(2, 1, 6, 1, dtype=torch.long), True),
    "index fill": lambda mask: mask.index_fill_(3, torch.tensor([2]), False),
    "triangle": lambda mask: mask.tril_(),
    "out": lambda mask: torch.logical_not(mask, out=mask) is mask,
    "out of another": lambda mask: torch.logical_or(other(), other(), out=mask),
    "where, out": lambda mask: torch.where(other(), mask, other(), out=mask),
    "data": lambda mask: mask.data.logical_not_(),
    "detach": lambda mask: mask.detach().fill_(True),
    "set data": set_("data", other()),
    "slice": lambda mask: mask[:, :, :, :5].fill_(False),
    "narrow": lambda mask: mask.narrow(2, 1, 3).zero_(),
    "view": lambda mask: mask.view(-1)[::3].logical_not_(),
    "transposed": lambda mask: mask.transpose(2, 3)[:, :, 4].fill_(True),
    "unbind": lambda mask: [row.logical_not_() for row in mask.unbind(2)[::2]],
    "chunk": lambda mask: mask.chunk(2)[1].fill_(False),
    "iteration": lambda mask: next(row.fill_(True) for row in mask),
    "strided": lambda mask: mask.as_strided((3,), (7,)).logical_not_(),
    "diagonal": lambda mask: mask[0, 0].fill_diagonal_(False),
    "each": lambda mask: torch._foreach_copy_([mask], [other()]),
    "numpy": through(lambda mask: mask.numpy()),
    "array": through(numpy.asarray),
    "dlpack": lambda mask: torch.from_dlpack(mask).logical_not_(),
    "storage": lambda mask: mask.untyped_storage().fill_(1),
    "typed storage": lambda mask: mask.storage().__setitem__(3, True),
    "copied": lambda mask: copy.copy(mask).logical_not_(),
    "shared": lambda mask: mask.share_memory_().fill_(True),
    "buffer": lambda mask: module_of(mask).mask.fill_(True),
    "state": lambda mask: module_of(mask).state_dict()["mask"].fill_(False),
    "load": lambda mask: module_of(mask).load_state_dict({"mask": other()}),
    "vmap": lambda mask: torch.vmap(lambda row: row.logical_not_())(mask),
    "no function": lambda mask: without_function(mask),
    "random": lambda mask: mask.bernoulli_(generator=torch.Generator().manual_seed(3)),
}
"""All keep the shape."""


def without_function(mask: torch.Tensor) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return mask.logical_and_(other())


METADATA: dict[str, Callable[[torch.Tensor], Any]] = {
    "unsqueeze": lambda mask: mask.unsqueeze_(0) is mask,
    "squeeze": lambda mask: mask.squeeze_(1),
    "transpose": lambda mask: mask.transpose_(2, 3),
    "resize": lambda mask: mask.resize_(2, 1, 6, 4),
    "resize as": lambda mask: mask.resize_as_(other((1, 1, 2, 2))),
    "set": lambda mask: mask.set_(other((3, 3))),
    "float": set_("data", torch.rand(SHAPE)),
    "strided": lambda mask: mask.as_strided_((2, 2), (1, 2)),
    "requires": lambda mask: mask.requires_grad_(False) is mask,
}


def assert_same(found: Any, expected: Any) -> None:
    """Equal in type, value and layout."""
    if isinstance(expected, torch.Tensor):
        assert type(found) in (torch.Tensor, lazy_mask.LazyMask)
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert expected.is_meta or torch.equal(found, expected)
    elif isinstance(expected, numpy.ndarray):
        assert type(found) is numpy.ndarray and numpy.array_equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected)
        for one, another in zip(found, expected, strict=True):
            assert_same(one, another)
    else:
        assert found == expected or str(found) == str(expected)


def assert_stands_for(lazy: torch.Tensor, plain: torch.Tensor) -> None:
    """All that reads the mask sees what it would see of the plain one."""
    assert_same(lazy, plain)
    assert_same(lazy.clone(), plain.clone())
    if plain.dtype == torch.bool and plain.shape == SHAPE:
        assert torch.equal(attended(lazy), attended(plain))


def attended(mask: torch.Tensor) -> torch.Tensor:
    """What attention with a soft cap, which always runs the operator, makes of a mask."""
    module = torch.nn.Module()
    module.config = MODELS["llama"][1](s2o={"min_length": 0, "threshold": 0.0})
    with torch.no_grad():
        output: torch.Tensor = attention(module, *tensors(), mask, softcap=5.0)[0]
    return output


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TypedStorage", "ignore:To copy construct")
@pytest.mark.parametrize("name", READS)
def test_reads(name: str) -> None:
    lazy, plain = both()
    assert_same(READS[name](lazy), READS[name](plain))
    assert_stands_for(lazy, plain)
    assert_same(READS[name](lazy), READS[name](plain))


@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str) -> None:
    lazy, plain = both()
    assert_same(WRITES[name](lazy), WRITES[name](plain))
    assert_stands_for(lazy, plain)


@pytest.mark.parametrize("name", METADATA)
def test_metadata_changed_in_place(name: str) -> None:
    lazy, plain = both()
    assert_same(METADATA[name](lazy), METADATA[name](plain))
    assert_stands_for(lazy, plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TypedStorage", "ignore:To copy construct")
@given(st.lists(st.sampled_from(sorted({*READS, *WRITES})), min_size=2, max_size=5), st.booleans())
def test_sequences(names: list[str], viewed: bool) -> None:
    lazy, plain = both()
    views = [mask[:, :, 1:, ::2] for mask in (lazy, plain)] if viewed else []
    for name in names:
        operation = {**READS, **WRITES}[name]
        assert_same(operation(lazy), operation(plain))
        assert_same(views[:1], views[1:])
    assert_stands_for(lazy, plain)


@pytest.mark.parametrize("name", WRITES)
def test_inference_mode_ends_before_the_write(name: str) -> None:
    with torch.inference_mode():
        lazy, _ = both()
    _, plain = both()
    assert_same(WRITES[name](lazy), WRITES[name](plain))
    assert_stands_for(lazy, plain)


def test_elements_are_held_only_where_they_may_be_written() -> None:
    lazy, _ = both()
    for name in ("shape", "and", "where", "attention", "hash"):
        READS[name](lazy)
    assert torch.equal(lazy, lazy.to("cpu")) and lazy.is_lazy and "window=7" in repr(lazy)
    moved = lazy.to("meta")
    assert type(moved) is lazy_mask.LazyMask and moved.is_lazy and moved.is_meta
    lazy[:, :, 1:]
    assert not lazy.is_lazy and repr(lazy).startswith("tensor(")


def test_memory_that_does_not_exist_is_not_given_away() -> None:
    lazy, _ = both()
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(lazy)


COMPILED: dict[str, Callable[..., Any]] = {
    "ask": lambda mask, query, key, value: query + mask.shape[-1] + mask.dim() + mask.to(query.device).size(0),
    "read": lambda mask, query, key, value: query[..., :1].masked_fill(~mask.all(-1, keepdim=True), 0),
    "attend": lambda mask, *tensors: torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask),
    "slice": lambda mask, query, key, value: torch.nn.functional.scaled_dot_product_attention(
        query, key[:, :, :5], value[:, :, :5], attn_mask=mask[..., :5]
    ),
    "write": lambda mask, query, key, value: mask.masked_fill_(query[:, :1, :, :1] > 0, False) & (key.sum() < 0),
    "item": lambda mask, query, key, value: (mask.__setitem__((..., 5), False), query + 1),
    "view": lambda mask, query, key, value: (mask[:, :, :, :5].logical_not_(), mask | True),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions(name: str, backend: str) -> None:
    function = COMPILED[name]
    compiled = torch.compile(function, backend=backend, fullgraph=name == "attend")
    for seed in range(2):
        lazy, plain = both(seed)
        with torch.no_grad():
            assert_same(compiled(lazy, *tensors()), function(plain, *tensors()))
        assert lazy.is_lazy == (name in ("ask", "read", "attend"))
        assert_stands_for(lazy, plain)


HOOKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": item((..., 12), False),
    "masked fill": lambda mask: mask.masked_fill_(torch.eye(mask.shape[-1], dtype=torch.bool).roll(-1, 1), False),
    "and": lambda mask: mask.__iand__(torch.arange(mask.shape[-1]) % 7 != 0),
    "copy": lambda mask: mask.copy_(mask.clone().logical_or_(torch.arange(mask.shape[-1]) == 11)),
    "data": lambda mask: mask.data[:, :, :, 10:12].fill_(False),
    "out": lambda mask: torch.logical_and(mask, torch.arange(mask.shape[-1]) % 5 != 3, out=mask),
    "numpy": lambda mask: mask.numpy().__setitem__((..., 12), False),
}


@pytest.mark.parametrize("min_length", [0, 1_000])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_write(name: str, layer: int, min_length: int) -> None:
    _, sparse = pair("llama", dataclasses.replace(EXACT, min_length=min_length))
    dense = copy.deepcopy(sparse)
    dense.set_attn_implementation("sdpa")
    with torch.no_grad():
        before = sparse(**prompts()).logits
    for model in (dense, sparse):
        model.model.layers[layer].register_forward_pre_hook(
            lambda module, args, kwargs: (HOOKS[name](kwargs["attention_mask"]), None)[1], with_kwargs=True
        )
    with torch.no_grad():
        want, got = (model(**prompts()).logits[:, 9:] for model in (dense, sparse))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (want - before[:, 9:]).abs().max() > 1e-2
