"""Attention in the many ways that people write it: every spelling is found, rewritten and computes the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .capture import EXACT
from .compare import ENCODER_LAYERS_NEED_A_LENGTH, assert_refused, assert_rewritten, compare

LENGTHS = [(13, 23), (11, 11), (5, 37), (29, 29), (17, 31)]
"""Queries and keys: primes, so that no other size is a multiple of both."""

BATCH, HEADS, GROUPS, CHANNELS, VALUE_CHANNELS = 3, 2, 2, 12, 10
SCALE = 0.3

Attend = Callable[..., Any]


def batch_and_heads_joined(queries: int, keys: int) -> list[Tensor]:
    shapes = (queries, CHANNELS), (keys, CHANNELS), (keys, VALUE_CHANNELS)
    return [torch.randn(BATCH * HEADS, *shape) for shape in shapes]


def heads_first(queries: int, keys: int) -> list[Tensor]:
    return [x.unflatten(0, (BATCH, HEADS)) for x in batch_and_heads_joined(queries, keys)]


def length_first(queries: int, keys: int) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous() for x in heads_first(queries, keys)]


def heads_in_channels(queries: int, keys: int) -> list[Tensor]:
    return [x.flatten(2) for x in length_first(queries, keys)]


def packed(queries: int, keys: int) -> list[Tensor]:
    return [torch.randn(BATCH, keys, 3 * HEADS * CHANNELS)]


def grouped(queries: int, keys: int) -> list[Tensor]:
    return [torch.randn(BATCH, GROUPS * HEADS, queries, CHANNELS), *heads_first(queries, keys)[1:]]


def split_heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)


def dot(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(dot(q, k) * SCALE, dim=-1) @ v


def scored(score: Callable[[Tensor, Tensor], Tensor]) -> Attend:
    """Attention with scores of another spelling."""
    return lambda q, k, v: torch.softmax(score(q, k), dim=-1) @ v


def normalised(normalise: Callable[[Tensor], Tensor]) -> Attend:
    """Attention with a softmax of another spelling."""
    return lambda q, k, v: normalise(dot(q, k) * SCALE) @ v


def einsums(scores: str, output: str) -> Attend:
    return lambda q, k, v: torch.einsum(output, torch.softmax(torch.einsum(scores, q, k) * SCALE, dim=-1), v)


def einsum_keys_before_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = torch.einsum("bhid,bhjd->bhji", q, k).mul(SCALE).softmax(dim=2)
    return torch.einsum("bhji,bhjd->bhid", probabilities, v)


def keys_before_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT * SCALE).softmax(-2).mT @ v


def value_on_the_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ (dot(q, k) * SCALE).softmax(-1).mT).mT


def flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads = q.shape[:2]
    q, k, v = (x.reshape(batch * heads, x.shape[2], x.shape[3]) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(SCALE).softmax(-1), v).view(batch, heads, q.shape[1], -1)


def baddbmm_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    nothing = torch.empty(q.shape[0], q.shape[1], k.shape[1])
    return torch.bmm(torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=SCALE).softmax(-1), v)


def baddbmm_of_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    zeros = torch.zeros(q.shape[0], q.shape[1], k.shape[1])
    return torch.baddbmm(zeros, q, k.transpose(1, 2), alpha=SCALE).softmax(-1).bmm(v)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def merged_by_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).permute(0, 2, 1, 3).contiguous().view(q.shape[0], q.shape[2], -1)


def by_transposes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def fairseq(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """From and to [length, batch, channels], with batch and heads joined in between."""
    batch, queries, _ = q.shape
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    q, k, v = (x.contiguous().view(x.shape[0], batch * HEADS, -1).transpose(0, 1) for x in (q, k, v))
    output = torch.bmm(F.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), dim=-1), v)
    return output.transpose(0, 1).contiguous().view(queries, batch, -1)


def split_and_merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merged(*(split_heads(x) for x in (q, k, v)))


def in_place_scale(q: Tensor, k: Tensor) -> Tensor:
    scores = dot(q, k)
    scores *= SCALE
    return scores


def written_out(scores: Tensor) -> Tensor:
    exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


def written_out_by_methods(scores: Tensor) -> Tensor:
    exponentials = scores.sub(scores.max(dim=-1, keepdim=True).values).exp()
    return exponentials.div(exponentials.sum(dim=-1, keepdim=True))


def written_out_in_place(scores: Tensor) -> Tensor:
    scores -= scores.max(dim=-1, keepdim=True)[0]
    scores.exp_()
    scores /= scores.sum(dim=-1, keepdim=True)
    return scores


def without_maximum(scores: Tensor) -> Tensor:
    exponentials = scores.exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def repeat_kv(x: Tensor) -> Tensor:
    """As transformers has it."""
    batch, heads, length, channels = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, GROUPS, length, channels)
    return x.reshape(batch, heads * GROUPS, length, channels)


def repeated(repeat: Callable[[Tensor], Tensor]) -> Attend:
    return lambda q, k, v: attend(q, repeat(k), repeat(v))


def five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q.unflatten(1, (HEADS, GROUPS)), k.unsqueeze(2), v.unsqueeze(2)).flatten(1, 2)


def einsum_of_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bkgqd,bksd->bkgqs", q.view(q.shape[0], HEADS, GROUPS, *q.shape[2:]), k)
    return torch.einsum("bkgqs,bksd->bkgqd", (scores * SCALE).softmax(-1), v).flatten(1, 2)


def unbound(qkv: Tensor) -> Tensor:
    return merged(*qkv.view(*qkv.shape[:2], 3, HEADS, CHANNELS).permute(2, 0, 3, 1, 4).unbind(0))


def indexed(qkv: Tensor) -> Tensor:
    qkv = qkv.view(*qkv.shape[:2], 3, HEADS, CHANNELS)
    return by_transposes(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])


SPELLINGS: dict[Callable[[int, int], list[Tensor]], dict[str, Attend]] = {
    heads_first: {
        "operators": attend,
        "matmul": scored(lambda q, k: torch.matmul(q, k.mT)),
        "permute": scored(lambda q, k: q.matmul(k.permute(0, 1, 3, 2))),
        "swapaxes": scored(lambda q, k: q.matmul(k.swapaxes(-1, 2))),
        "movedim": scored(lambda q, k: q.matmul(torch.movedim(k, 3, 2))),
        "einsum": einsums("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"),
        "einsum, other letters": einsums("n h l e, n h s e -> n h l s", "n h l s, n h s D -> n h l D"),
        "einsum, ellipsis": einsums("...id,...jd->...ij", "...ij,...jd->...id"),
        "einsum, numbers": scored(lambda q, k: torch.einsum(q, [0, 1, 2, 4], k, [0, 1, 3, 4], [0, 1, 2, 3])),
        "einsum, keys before queries": einsum_keys_before_queries,
        "einsum, key on the left": scored(lambda q, k: torch.einsum("bhkd,bhqd->bhqk", k, q)),
        "keys before queries": keys_before_queries,
        "value on the left": value_on_the_left,
        "flattened": flattened,
        "no scale": scored(dot),
        "query scaled": scored(lambda q, k: dot(q * SCALE, k)),
        "key scaled": scored(lambda q, k: dot(q, SCALE * k)),
        "both scaled": scored(lambda q, k: dot(q * CHANNELS**-0.25, k * CHANNELS**-0.25)),
        "transposed key scaled": scored(lambda q, k: q @ (k.mT / 3)),
        "divided by math.sqrt": scored(lambda q, k: dot(q, k) / math.sqrt(q.size(-1))),
        "divided by a power": scored(lambda q, k: dot(q, k).div(k.shape[-1] ** 0.5)),
        "divided by torch.sqrt": scored(lambda q, k: dot(q, k) / torch.sqrt(torch.tensor(12.0))),
        "multiplied by a tensor": scored(lambda q, k: torch.tensor(0.3) * dot(q, k)),
        "multiplied by torch.full": scored(lambda q, k: dot(q, k) * torch.full((), 0.3)),
        "scaled by a magic method": scored(lambda q, k: dot(q, k).__mul__(SCALE)),
        "symbolic scale": scored(lambda q, k: dot(q, k) * k.shape[2] ** -0.5),
        "several scales": scored(lambda q, k: dot(q / 2, k).mul(3) / 4),
        "scaled in place": scored(in_place_scale),
        "scaled in place by a method": scored(lambda q, k: dot(q, k).mul_(SCALE)),
        "constant added": scored(lambda q, k: dot(q, k) + 1),
        "zeros added": scored(lambda q, k: dot(q, k) + torch.zeros(q.shape[2], k.shape[2])),
        "F.softmax": normalised(lambda scores: F.softmax(scores, -1)),
        "axis": normalised(lambda scores: torch.softmax(scores, axis=-1)),
        "method": normalised(lambda scores: scores.softmax(dim=3)),
        "torch.special": normalised(lambda scores: torch.special.softmax(scores, -1)),
        "nn.Softmax": normalised(nn.Softmax(dim=-1)),
        "log_softmax": normalised(lambda scores: F.log_softmax(scores, dim=-1).exp()),
        "logsumexp": normalised(lambda scores: torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))),
        "written out": normalised(written_out),
        "written out by methods": normalised(written_out_by_methods),
        "written out in place": normalised(written_out_in_place),
        "without maximum": normalised(without_maximum),
        "exponential twice": normalised(lambda scores: scores.exp() / torch.sum(scores.exp(), dim=-1, keepdim=True)),
        "double softmax": normalised(lambda scores: scores.double().softmax(-1).float()),
        "dropout of 0": normalised(lambda scores: F.dropout(scores.softmax(-1), 0.0)),
        "dropout, not training": normalised(lambda scores: F.dropout(scores.softmax(-1), 0.1, training=False)),
        "nn.Dropout": normalised(nn.Sequential(nn.Softmax(-1), nn.Dropout(0.1)).eval()),
        "merged": merged,
        "merged by view": merged_by_view,
    },
    length_first: {
        "transposes": by_transposes,
        "einsum": einsums("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"),
        "einsum, heads after queries": einsums("bqhd,bkhd->bqhk", "bqhk,bkhd->bqhd"),
        "einsum, heads flattened": lambda q, k, v: einsums("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd")(q, k, v).flatten(2),
    },
    batch_and_heads_joined: {
        "bmm": lambda q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(SCALE).softmax(-1), v),
        "einsum": einsums("nqd,nkd->nqk", "nqk,nkd->nqd"),
        "baddbmm of nothing": baddbmm_of_nothing,
        "baddbmm of zeros": baddbmm_of_zeros,
        "one head": lambda q, k, v: (q[0] @ k[0].T * SCALE).softmax(-1).mm(v[0]),
        "aten.mT": lambda q, k, v: torch.ops.aten.mT((k @ q.mT * SCALE).softmax(-2)) @ v,
        "aten.numpy_T": lambda q, k, v: torch.ops.aten.numpy_T((k[0] @ q[0].T * SCALE).softmax(0)) @ v[0],
    },
    heads_in_channels: {
        "split and merged": split_and_merged,
        "fairseq": fairseq,
    },
    packed: {
        "chunk": lambda qkv: split_and_merged(*qkv.chunk(3, dim=-1)),
        "split": lambda qkv: split_and_merged(*qkv.split(HEADS * CHANNELS, dim=2)),
        "unbind": unbound,
        "indices": indexed,
    },
    grouped: {
        "repeat_interleave": repeated(lambda x: x.repeat_interleave(GROUPS, dim=1)),
        "torch.repeat_interleave": repeated(lambda x: torch.repeat_interleave(x, GROUPS, 1)),
        "expand, reshape": repeated(repeat_kv),
        "repeat, flatten": repeated(lambda x: x.unsqueeze(2).repeat(1, 1, GROUPS, 1, 1).flatten(1, 2)),
        "stack, flatten": repeated(lambda x: torch.stack([x] * GROUPS, 2).flatten(1, 2)),
        "five dimensions": five_dimensions,
        "einsum": einsum_of_groups,
        "whole heads repeated": repeated(lambda x: x.repeat(1, GROUPS, 1, 1)),
    },
}
CASES = [
    pytest.param(layout, name, id=f"{layout.__name__}-{name}") for layout, named in SPELLINGS.items() for name in named
]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_static(layout: Callable[[int, int], list[Tensor]], name: str) -> None:
    assert_rewritten(SPELLINGS[layout][name], layout(*LENGTHS[0]))


SECOND_CASES = [
    pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] * (number % 2)) for number, case in enumerate(CASES)
]
"""Tables have spellings of one kind beside each other; Dynamo takes five times as long where lengths are dynamic."""


@pytest.mark.parametrize(("layout", "name"), SECOND_CASES)
def test_dynamic(layout: Callable[[int, int], list[Tensor]], name: str) -> None:
    assert_rewritten(SPELLINGS[layout][name], *(layout(*lengths) for lengths in LENGTHS), dynamic=True)


@pytest.mark.parametrize("name", sorted(SPELLINGS[grouped].keys() - {"stack, flatten", "whole heads repeated"}))
def test_repeated_heads_are_not_stored(name: str) -> None:
    captured = assert_rewritten(SPELLINGS[grouped][name], grouped(*LENGTHS[0]))
    (operator,) = captured.operators()
    assert [captured.shapes[node][1] for node in operator.args] == [HEADS * GROUPS, HEADS, HEADS]


VIEWED: dict[str, Callable[[Tensor], Tensor]] = {
    "viewed": lambda output: output.view(-1),
    "viewed as another": lambda output: output.view_as(torch.empty(BATCH * HEADS, 13, VALUE_CHANNELS)),
    "viewed by an operator": lambda output: torch.ops.aten.view(output, [-1]),
    "one of a batch, viewed": lambda output: output[0].view(-1),
    "detached, viewed": lambda output: output.detach().view(-1),
    "scaled, viewed": lambda output: output.mul(2).view(-1),
    "strided": lambda output: output.as_strided((5, 5), (5, 1)),
}


@pytest.mark.parametrize("name", VIEWED)
def test_memory_of_the_output(name: str) -> None:
    """What was contiguous stays contiguous for code that was traced with it."""
    assert_rewritten(lambda q, k, v: VIEWED[name](attend(q, k, v)), heads_first(*LENGTHS[0]))


def test_memory_of_an_output_that_leaves_the_graph() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = attend(q, k, v)
        torch._dynamo.graph_break()
        return output.view(-1)

    assert_rewritten(function, heads_first(*LENGTHS[0]))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 23), (13, 1)], ids=str)
@pytest.mark.parametrize("groups", [(1, 1, 1), (3, 1, 1), (1, 2, 1), (1, 1, 4), (3, 2, 2)], ids=str)
def test_sizes_of_one(groups: tuple[int, int, int], lengths: tuple[int, int]) -> None:
    (batch, heads, repeats), (queries, keys) = groups, lengths
    q, k, v = (torch.randn(batch, heads, length, CHANNELS) for length in (queries * repeats, keys, keys))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q.unflatten(2, (repeats, queries)), k.unsqueeze(2), v.unsqueeze(2))

    assert compare(function, [q, k, v]).only().rewritten


def test_layers_in_place() -> None:
    """What one attention's rewriting removes, the next one's search does not trip over."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(3):
            q = scored(lambda q, k: after_a_scale(dot(q, k)))(q, k, v)
            q.mul_(1.5)
        return q

    captured = compare(function, [torch.randn(BATCH, HEADS, length, CHANNELS) for length in (13, 23, 23)])
    assert [decision.mask for decision in captured.decisions] == ["causal, offset 0"] * 3


def test_autocast() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v)

    assert_rewritten(function, heads_first(*LENGTHS[0]), atol=3e-2, rtol=3e-2)


def allowed(scores: Tensor) -> Tensor:
    """The causal mask, true where a query sees a key."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


def hidden(scores: Tensor) -> Tensor:
    return torch.triu(torch.ones(scores.shape[-2:]), diagonal=1)


def positions(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[-2])[:, None] >= torch.arange(scores.shape[-1])


def largest_mask(scores: Tensor) -> Tensor:
    """The last queries of a mask that is larger, as GPT-2 has it."""
    queries, keys = scores.shape[-2:]
    return torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64)[:, :, keys - queries : keys, :keys]


def documented(scores: Tensor) -> Tensor:
    """As the documentation of scaled_dot_product_attention writes it out."""
    bias = torch.zeros(scores.shape[-2:])
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(diagonal=0)
    bias.masked_fill_(mask.logical_not(), float("-inf"))
    scores += bias
    return scores


def in_place_addition(scores: Tensor) -> Tensor:
    scores += hidden(scores) * -1e9
    return scores


def after_a_scale(scores: Tensor) -> Tensor:
    scores *= 0.5
    return scores.masked_fill_(~allowed(scores), -math.inf)


MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "filled with -inf": lambda scores: scores.masked_fill(~allowed(scores), -math.inf),
    "filled with finfo.min": lambda scores: scores.masked_fill(hidden(scores).bool(), torch.finfo(torch.float32).min),
    "filled with -1e9": lambda scores: scores.masked_fill(allowed(scores) == 0, -1e9),
    "filled with -1e4": lambda scores: torch.masked_fill(scores, hidden(scores) == 1, -1e4),
    "filled with a tensor": lambda scores: scores.masked_fill(~positions(scores), torch.tensor(-math.inf)),
    "where": lambda scores: torch.where(allowed(scores), scores, -math.inf),
    "where, tensor": lambda scores: torch.where(positions(scores), scores, torch.full([], -3e38)),
    "where, inverted": lambda scores: torch.where(hidden(scores) > 0, -1e9, scores),
    "where, method": lambda scores: scores.where(allowed(scores), torch.tensor(-1e9)),
    "where, like": lambda scores: torch.where(allowed(scores), scores, torch.full_like(scores, -math.inf)),
    "added triu": lambda scores: scores + torch.triu(torch.full(scores.shape[-2:], -math.inf), diagonal=1),
    "added multiple": lambda scores: scores + (1.0 - allowed(scores).float()) * torch.finfo(torch.float32).min,
    "added where": lambda scores: torch.where(allowed(scores), 0.0, torch.finfo(torch.float32).min) + scores,
    "added filled": lambda scores: scores + torch.zeros(scores.shape[-2:]).masked_fill(~allowed(scores), -math.inf),
    "subtracted": lambda scores: scores - 1e9 * hidden(scores),
    "added in four dimensions": lambda scores: scores + (hidden(scores) * -1e9)[None, None],
    "expanded": lambda scores: scores.masked_fill(~allowed(scores).expand_as(scores), -math.inf),
    "repeated": lambda scores: scores + (hidden(scores) * -1e9).repeat(*scores.shape[:2], 1, 1),
    "documented": documented,
    "added in place": in_place_addition,
    "filled in place": after_a_scale,
    "scaled after": lambda scores: scores.masked_fill(~allowed(scores), -math.inf) * 0.5,
    "in float32": lambda scores: (scores.half().float() + hidden(scores) * -1e9).half().float(),
    "square": lambda scores: scores.masked_fill(~nn.Transformer.generate_square_subsequent_mask(64).eq(0)
        [: scores.shape[-2], : scores.shape[-1]], -math.inf),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        *((name, False) for name in MASKED),
        *(pytest.param(name, True, marks=[pytest.mark.slow] * (number % 2)) for number, name in enumerate(MASKED)),
    ],
)
def test_causal(name: str, dynamic: bool) -> None:
    calls = [heads_first(*lengths) for lengths in LENGTHS[: None if dynamic else 1]]
    rounding = {"atol": 5e-3, "rtol": 5e-3} if "float32" in name else {}
    function = scored(lambda q, k: MASKED[name](dot(q, k)))
    assert_rewritten(function, *calls, mask="causal, offset 0", dynamic=dynamic, **rounding)


LAST_QUERIES: dict[str, Callable[[Tensor], Tensor]] = {
    "tril": lambda scores: scores.masked_fill(
        torch.ones(scores.shape[-2:]).tril(scores.shape[-1] - scores.shape[-2]) == 0, -math.inf
    ),
    "triu": lambda scores: (
        scores + torch.full(scores.shape[-2:], -math.inf).triu(1 + scores.shape[-1] - scores.shape[-2])
    ),
    "slice": lambda scores: scores.masked_fill(largest_mask(scores) == 0, -1e9),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", LAST_QUERIES)
def test_causal_from_the_last_query(name: str, dynamic: bool) -> None:
    calls = [heads_first(*lengths) for lengths in LENGTHS[: None if dynamic else 1]]
    captured = assert_rewritten(scored(lambda q, k: LAST_QUERIES[name](dot(q, k))), *calls, mask=None, dynamic=dynamic)
    assert captured.only().mask.startswith("causal, offset" if dynamic else "causal, offset 10")


def with_joined_heads(scores: Tensor, pad: Tensor) -> Tensor:
    hidden = (~pad).view(BATCH, 1, 1, -1).expand(-1, HEADS, -1, -1).reshape(BATCH * HEADS, 1, -1)
    return scores.flatten(0, 1).masked_fill(hidden, -math.inf).view_as(scores)


def with_separated_heads(scores: Tensor, pad: Tensor) -> Tensor:
    separated = scores.flatten(0, 1).view(BATCH, HEADS, *scores.shape[2:])
    return separated.masked_fill(~pad[:, None, None], -math.inf).flatten(0, 1).view_as(scores)


PADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "filled": lambda scores, pad: scores.masked_fill(~pad[:, None, None], -math.inf),
    "filled from numbers": lambda scores, pad: scores.masked_fill((pad.long() == 0).unsqueeze(1).unsqueeze(2), -1e9),
    "where": lambda scores, pad: torch.where(pad[:, None, None, :], scores, -math.inf),
    "added": lambda scores, pad: scores + (1.0 - pad[:, None, None, :].float()) * -10000.0,
    "joined heads": with_joined_heads,
    "separated heads": with_separated_heads,
}


CAUSAL_AND_PADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "and": lambda scores, pad: torch.where(allowed(scores) & pad[:, None, None], scores, -math.inf),
    "or": lambda scores, pad: scores.masked_fill(hidden(scores).bool() | ~pad[:, None, None], -math.inf),
    "filled twice": lambda scores, pad: scores.masked_fill(~allowed(scores), -1e9).masked_fill(
        ~pad[:, None, None], -1e9
    ),
    "sum": lambda scores, pad: (
        scores + (torch.where(pad[:, None, None], 0.0, -math.inf) + torch.full(scores.shape[-2:], -math.inf).triu(1))
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [*PADDED, *CAUSAL_AND_PADDED])
def test_padding(name: str, dynamic: bool) -> None:
    change = PADDED.get(name) or CAUSAL_AND_PADDED[name]
    mask = "key padding" if name in PADDED else "causal, offset 0; key padding"

    def function(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return torch.softmax(change(dot(q, k), pad), dim=-1) @ v

    calls = [
        [*heads_first(queries, keys), torch.arange(keys) < keys - torch.arange(BATCH)[:, None]]
        for queries, keys in LENGTHS[: None if dynamic else 1]
    ]
    assert_rewritten(function, *calls, mask=mask, dynamic=dynamic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_softmax_of_half_scores(dtype: torch.dtype) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(dot(q, k) * SCALE, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    tensors = [x.to(dtype) for x in heads_first(*LENGTHS[0])]
    assert_rewritten(function, tensors, atol=3e-2, rtol=3e-2)


def test_float_scale_that_varies() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return torch.softmax(dot(q, k) * scale, dim=-1) @ v

    calls = [[*heads_first(*lengths), 0.1 * n + 0.3] for n, lengths in enumerate(LENGTHS)]
    assert_rewritten(function, *calls, dynamic=True)


WIDTH = HEADS * CHANNELS
MODULES: dict[str, Callable[[], Attend]] = {
    "attention": lambda: nn.MultiheadAttention(WIDTH, HEADS).eval(),
    "attention, batch first": lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval(),
    "encoder layer, batch first": lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True).eval(),
    "encoder layer, training": lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0).train(),
    "encoder, batch first": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True), 1
    ).eval(),
}


def called(name: str) -> Attend:
    module = MODULES[name]()

    def call(x: Tensor) -> Tensor:
        if isinstance(module, nn.MultiheadAttention):
            return module(x, x, x, need_weights=False)[0]
        return module(x)

    return call if "first" in name else lambda x: call(x.transpose(0, 1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, dynamic: bool) -> None:
    calls = [[torch.randn(BATCH, keys, WIDTH)] for _, keys in LENGTHS[: None if dynamic else 1]]
    if ENCODER_LAYERS_NEED_A_LENGTH and dynamic and name.startswith("encoder") and "training" not in name:
        assert compare(called(name), *calls, dynamic=True, atol=1e-5, rtol=1e-4).decisions == []
        return
    assert_rewritten(called(name), *calls, dynamic=dynamic, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [False, True])
def test_modules_that_return_their_weights(batch_first: bool) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).eval()
    assert_refused(lambda x: module(x, x, x), [torch.randn(BATCH, 23, WIDTH)], reason="used elsewhere")


@pytest.mark.parametrize("dynamic", [False, True])
def test_through_inductor(dynamic: bool) -> None:
    function = scored(lambda q, k: MASKED["filled in place"](dot(q, k)))
    compiled = torch.compile(function, backend="s2o", options=EXACT.to_dict(), fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for lengths in LENGTHS[: 2 if dynamic else 1]:
            args = heads_first(*lengths)
            torch.testing.assert_close(compiled(*args), function(*args))
