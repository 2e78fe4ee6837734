"""Compile the kernels, as calls of one dtype launch them, to machine code of the GPUs that are supported."""

from __future__ import annotations

import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.ops.kernels import attend, decode, dense, pipeline, quantise
from s2o_compile.ops.kernels.launch import launching
from s2o_compile.ops.part import Part
from s2o_compile.ops.places import Places
from s2o_compile.ops.requests import Request
from s2o_compile.ops.visibility import Visibility

MERGED = S2OConfig(ranking=Ranking(merge_length=0))
FOLDED = S2OConfig(ranking=Ranking(merge_length=0, channels=40))
"""With digits in the place of some of the channels that are picked."""
CAPABILITIES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may take, by compute capability."""
OTHERS = (
    S2OConfig(ranking=Ranking(channels=32)),
    S2OConfig(ranking=Ranking(channels=16, measure="output")),
    S2OConfig(ranking=Ranking(rule="dropped", lists="head")),
    S2OConfig(ranking=Ranking(pool=8, guides="kv_head", rule="dropped", combine="mean")),
)
ALL_KERNELS = S2OConfig(ranking=Ranking(channels=32, pool=8, guides="kv_head", rule="dropped", combine="mean"))
"""With the default setting it reaches every kernel."""
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def linear_reductions(ttgir: str) -> Iterator[tuple[int, dict[str, list[list[int]]]]]:
    """The axis of each reduction of a tensor in a linear layout, and the bases of that layout."""
    layouts = {
        name: dict(re.findall(r"(\w+) = (\[.*?\])(?=, \w+ =|\}>)", text))
        for name, text in re.findall(r"^(#\w+) = (#ttg\.linear<.*>)$", ttgir, re.MULTILINE)
    }
    for axis, name in re.findall(r'"tt\.reduce"\(.*?axis = (\d+).*?\}\) : \(tensor<[^,]*, (#\w+)>', ttgir, re.DOTALL):
        if name in layouts:
            yield int(axis), {part: json.loads(bases) for part, bases in layouts[name].items()}


def is_reduced_right(axis: int, layout: dict[str, list[list[int]]]) -> bool:
    """Whether Triton reduces a linear layout as it should.

    Across warps, Triton 3.6 takes the lanes of each axis to follow one another. Where they do not, several lanes write
    their share of a sum or a maximum to one address.
    """
    if not any(base[axis] for base in layout["warp"]):
        return True
    along = [place for base in layout["lane"] for place, step in enumerate(base) if step]
    return len(list(itertools.groupby(along))) == len(set(along))


def shuffled_products(ptx: str) -> list[str]:
    """The products in float32 that shuffles pass on to other lanes as they are.

    In a sum over lanes each may add its own before it is rounded: the sums then differ in their last bits by lane, and
    lanes write different numbers to one address.
    """
    pattern = r"^\s*([a-z][\w.]*)\s+(%\w+)(?:\|%\w+)?, (.*);$"
    made = {result: (operation, operands) for operation, result, operands in re.findall(pattern, ptx, re.MULTILINE)}

    def origin(register: str) -> str:
        for _ in made:
            operation, operands = made.get(register, ("", ""))
            if operation != "mov.b32":
                return operation
            register = operands
        return "mov.b32"

    shuffled = [operands for operation, operands in made.values() if operation.startswith("shfl.sync.bfly")]
    return [operands for operands in shuffled if origin(operands.split(",")[0]).startswith("mul.f")]


def build(capability: int, kernel: Any, grid: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Compile a kernel instead of launching it; products of float32 alone must not be rounded to TF32."""
    values = dict(zip(kernel.arg_names, positional, strict=False)) | named
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(parameter.num,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp64" if isinstance(value, float) else "i32"
    source, target = ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32)
    names = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
    options = {name: values[name] for name in names if name in values}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = triton.compile(source, target=target, options=options)
    assert compiled.asm["cubin"]
    operands = {TYPES[value.dtype] for value in values.values() if isinstance(value, torch.Tensor)}
    assert operands & {"*fp16", "*bf16", "*fp8e4nv"} or ".tf32" not in compiled.asm["ptx"], kernel.__name__
    reductions = list(linear_reductions(compiled.asm["ttgir"]))
    assert all(is_reduced_right(*reduction) for reduction in reductions), (kernel.__name__, reductions)
    products = shuffled_products(compiled.asm["ptx"])
    assert not products, (kernel.__name__, products)
    assert compiled.metadata.shared <= CAPABILITIES[capability], (kernel.__name__, compiled.metadata)
    print(kernel.__name__)


def build_decoding(
    dtype: torch.dtype, channels: int, group_size: int, queries: int, keys: int, has_terms: bool
) -> None:
    """Build the kernels for requests of few queries: of pages with all terms, and of packed keys without."""
    query = torch.empty(queries, 2 * group_size, channels, dtype=dtype)
    pages, packed = torch.empty(40, 16, 2, channels, dtype=dtype), torch.empty(keys, 2, channels, dtype=dtype)
    table, request = torch.zeros(1, 40, dtype=torch.int32), Request(0, slice(0, queries), slice(0, keys))
    pool, table, window = (pages, table, (290, 0)) if has_terms else (packed, None, (-1, 0))
    softcap, sinks = (30.0, torch.empty(2 * group_size)) if has_terms else (0.0, None)
    decode.decode(query, query, pool, pool, table, [request], window, 0.125, softcap, sinks)


def main(dtype: torch.dtype, capability: int, is_all: bool) -> None:
    """The default setting, and other settings where there is float8; all terms at once where there is none.

    With `is_all` both, many heads of a group, and each of the other settings.
    """
    attend.shared_memory = dense.shared_memory = decode.shared_memory = lambda device: CAPABILITIES[capability]
    decode.multiprocessors = lambda device: 132
    query, key = torch.empty(1, 4, 300, 64, dtype=dtype), torch.empty(1, 2, 300, 64, dtype=dtype)
    many = torch.empty(1, 12, 300, 64, dtype=dtype)
    documents, mask = torch.zeros(1, 300, dtype=torch.int64), torch.ones(1, 1, 300, 300, dtype=torch.bool)
    terms = Visibility(True, 0, mask[0, 0, :1], 200, documents.int(), documents, mask)
    has_float8 = dtype != torch.float32 and capability >= 89
    quantise.ranks_in_float8 = lambda guides, softcap, device: has_float8 and not softcap and guides.shape[-1] >= 32
    quantise.adds_in_half = lambda device: capability == 90
    has_terms = dtype != torch.float32 and (is_all or not has_float8)
    if is_all or not has_terms:
        merged = FOLDED if capability == 90 and has_float8 else MERGED
        pipeline.sparse_attention(query, key, key, Visibility(True), 0.125, 0.0, merged)
    if dtype != torch.float32:
        dense.attend_densely(query, key, key, terms._replace(mask=None), 0.125, 0.0)
    build_decoding(dtype, 128, 4, 1, 300, True)
    for channels, group_size, queries in ((64, 6, 1), (128, 4, 1), (128, 7, 8), (256, 2, 8)) if is_all else ():
        build_decoding(dtype, channels, group_size, queries, 300, True)
        build_decoding(dtype, channels, group_size, queries, 200, False)
    for config in (OTHERS if is_all else [ALL_KERNELS]) if has_float8 else ():
        padded = Visibility(True, key_padding=mask[0, 0, :1])
        pipeline.sparse_attention(query, key, key, padded, 0.125, 0.0, config)
    if is_all:
        pipeline.sparse_attention(many, key, key, Visibility(True), 0.125, 0.0, MERGED)
        if has_float8:
            part = Part(places=Places(torch.empty(300, dtype=torch.int32), 300))
            pipeline.sparse_attention(query, key, key, Visibility(True), 0.125, 0.0, MERGED, part)
        pipeline.sparse_attention(many, key, key, Visibility(True, mask=mask), 0.125, 0.0, S2OConfig())
    if has_terms:
        pipeline.sparse_attention(query, key, key, terms, 0.125, 30.0, S2OConfig(ranking=Ranking(channels=32)))


if __name__ == "__main__":
    with launching(partial(build, int(sys.argv[2]))):
        main(getattr(torch, sys.argv[1]), int(sys.argv[2]), "all" in sys.argv[3:])
