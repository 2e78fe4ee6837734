"""Masks built, cast, combined and changed in many ways."""

from __future__ import annotations

import re

from .program import Sketch

ROW, KEY = "torch.arange(L)[:, None]", "torch.arange(S)"

TERMS = {
    "tril": "torch.ones(L, S, dtype=torch.bool).tril()",
    "arange": f"{KEY} <= {ROW}",
    "arange to the end": f"{KEY} <= {ROW} + S - L",
    "tril of floats": "torch.tril(torch.ones(L, S)) > 0",
    "tril as bool": "torch.ones(L, S).tril(S - L).bool()",
    "triu is zero": "torch.triu(torch.ones(L, S), diagonal=1) == 0",
    "full": "torch.full((L, S), True).tril(2)",
    "not triu": "~torch.ones(L, S, dtype=torch.bool).triu(1)",
    "int tril": "torch.ones(L, S, dtype=torch.int32).tril().to(torch.bool)",
    "row strictly": f"{ROW} > {KEY} - 1",
    "window": f"{ROW} - {KEY} < 4",
    "window both sides": f"({ROW} - {KEY}).abs() <= 3",
    "window argument": f"({ROW} - {KEY}).abs() <= w",
    "window by triu": "torch.ones(L, S, dtype=torch.bool).triu(-3)",
    "lengths": f"({KEY} < lengths[:, None])[:, None, None]",
    "documents": "(ids[:, :L, None] == ids[:, None, :S])[:, None]",
    "prefix": f"{KEY} < 5",
    "prefix or causal": f"({KEY} < 3) | ({KEY} <= {ROW})",
    "every other": f"{KEY} % 2 == 0",
    "blocks": f"{ROW} // 4 == {KEY} // 4",
    "per head": f"{KEY} <= {ROW} + torch.arange(H)[:, None, None]",
    "cat": "torch.cat([torch.ones(L, 1, dtype=torch.bool), torch.ones(L, S, dtype=torch.bool).tril()], 1)[:, :S]",
    "set by index": "torch.zeros(L, S, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)",
    "outer product": "(keep[:, :L, None] & keep[:, None, :S])[:, None] | torch.eye(L, S, dtype=torch.bool)",
    "einsum": 'torch.einsum("bi,bj->bij", keep[:, :L].float(), keep[:, :S].float()).unsqueeze(1) >= 0',
    "padding": "pad",
    "content": "content",
}
INPUTS = {
    "w": "3",
    "lengths": "torch.randint(1, S + 2, (B,))",
    "ids": "torch.randint(2, (B, max(L, S))).cumsum(-1) // 3",
    "keep": "torch.rand(B, max(L, S)) < 0.8",
}
DTYPES = {
    "bool": "{}",
    "int64": "{}.long()",
    "float": "{}.float()",
    "fractions": "torch.rand({0}.shape) * {0}",
    "negative": "torch.randn({0}.shape) * {0}",
    "uint8": "{}.byte()",
    "int32 counts": "torch.randint(-2, 3, {}.shape, dtype=torch.int32)",
    "bfloat16": "torch.rand({0}.shape).bfloat16() * {0}",
    "tiny": "{}.float() * 1e-40",
}
CASTS = {
    "bool": "{}.bool()",
    "to": "{}.to(torch.bool)",
    "!= 0": "{} != 0",
    "== 0": "~({} == 0)",
    "logical_not": "torch.logical_not({} == 0)",
    "logical_not twice": "{}.logical_not().logical_not()",
    "not logical_not": "~torch.logical_not({})",
    "type": "{}.type(torch.bool)",
    "> 0": "{} > 0",
    "== 1": "{} == 1",
    "> 0.5": "{} > 0.5",
    "int": "{}.int().bool()",
    "float": "{}.float().to(torch.bool)",
    "half": "{}.half().bool()",
    "doubled": "({} * 2).bool()",
    "1 -": "(1.0 - {}.float()) < 1",
    "where": "torch.where({} != 0, True, False)",
    "logical_and": "torch.logical_and({0}, {0})",
    "clamped": "{}.clamp(0, 1).to(torch.bool)",
    "ceil": "{}.float().ceil().bool()",
}
AXES = {
    "none": "({})[:, None, None]",
    "colon": "({})[:, None, None, :]",
    "unsqueeze": "({}).unsqueeze(1).unsqueeze(2)",
    "view": "({}).view(B, 1, 1, S)",
    "expanded": "({})[:, None, None].expand(B, 1, L, S)",
    "expanded over heads": "({})[:, None, None, :].expand(-1, H, L, -1)",
    "repeated": "({})[:, None, None].repeat(1, 1, L, 1)",
    "transposed": "({})[:, None, :, None].transpose(-1, -2)",
}
BOTH = {
    "&": "({}) & ({})",
    "logical_and": "torch.logical_and({}, {})",
    "or": "({}) | ({})",
    "xor": "({}) ^ ~({})",
    "de morgan": "~(~({}) | ~({}))",
    "product": "({}) * ({})",
    "where": "torch.where({}, {}, False)",
    "filled": "torch.zeros(1, 1, L, S, dtype=torch.bool) | ({}).logical_and({})",
    "ints": "(({}).int() + ({}).int()) > 1",
    "floats": "(({}).float() * ({}).float()).bool()",
    "minimum": "torch.minimum(({}).float(), ({}).float()) == 1",
}
EDITS = {
    "item": "{}[..., 0] = True",
    "hide": "{}[..., 1:2] = False",
    "fill": "{}.fill_(True)",
    "masked_fill_": "{}.masked_fill_(torch.arange({}.shape[-1]) == 2, False)",
    "and": "{} &= torch.arange({}.shape[-1]) != 1",
    "or": "{} |= torch.arange({}.shape[-1]) == 0",
    "logical_not_": "{}.logical_not_()",
    "copy_": "{}.copy_({}.flip(-1))",
    "view": "{}[:1].logical_not_()",
    "select": "{}.select(-1, 0).fill_(True)",
    "zero_": "{}.zero_()",
    "index_fill_": "{}.index_fill_(-1, torch.tensor([1]), False)",
    "tril_": "{}.tril_()",
}
ADDITIVE = {
    "masked_fill": "torch.zeros({m}.shape, dtype=DTYPE).masked_fill(~{m}, {low})",
    "where": "torch.where({m}, 0.0, {low}).to(DTYPE)",
    "1 -": "(1.0 - {m}.to(DTYPE)) * {finite}",
    "not": "(~{m}).to(DTYPE) * {finite}",
    "- 1": "({m}.to(DTYPE) - 1) * -{finite}",
    "full": "torch.full({m}.shape, {low}, dtype=DTYPE).masked_fill_({m}, 0)",
    "log?": "{m}.to(DTYPE).log()",
    "where of tensors": "torch.where({m}, torch.zeros((), dtype=DTYPE), torch.full((), {low}, dtype=DTYPE))",
    "by index": "torch.zeros({m}.shape, dtype=DTYPE).index_put((~{m},), torch.tensor({low}, dtype=DTYPE))",
}
LOW = {
    "-inf": "-math.inf",
    "-1e9": "-1e9",
    "min": "torch.finfo(DTYPE).min",
    "-1e4": "-10000.0",
    "float": 'float("-inf")',
    "-50?": "-50.0",
}


def term(sketch: Sketch) -> str:
    """One expression of a boolean mask that broadcasts to [B, H, L, S]."""
    text = str(sketch.pick("mask", TERMS))
    for name, value in INPUTS.items():
        if re.search(rf"\b{name}\b", text):
            sketch.input(name, value)
    if text == "pad":
        dtype = sketch.pick("padding", DTYPES).format("(torch.rand(B, S) < 0.75)")
        cast = sketch.pick("cast", CASTS).format(sketch.input("pad", dtype))
        return str(sketch.pick("axes", AXES).format(cast))
    if text == "content":
        shape = sketch.choose(["B, 1, L, S", "L, S", "B, H, L, S", "1, S", "H, L, 1"])
        dtype = sketch.pick("content", DTYPES).format(f"(torch.rand({shape}) < 0.75)")
        return str(sketch.pick("cast", CASTS).format(sketch.input("content", dtype)))
    return text


def edit(sketch: Sketch, name: str) -> None:
    """A change of a boolean mask in place."""
    sketch.line(sketch.pick("mask edit", EDITS).replace("{}", name))


def mask(sketch: Sketch) -> str:
    """A variable with a boolean mask, True for keys to attend, that broadcasts to [B, H, L, S]."""
    expression = term(sketch)
    for _ in range(sketch.choose([0, 0, 1, 2])):
        expression = sketch.pick("both", BOTH).format(expression, term(sketch))
    sketch.line(f"m = {expression}")
    if sketch.rarely("with its diagonal", 3):
        sketch.line("m = m | torch.eye(L, S, dtype=torch.bool)")
    if sketch.rarely("mask edited first"):
        sketch.line("m = m.clone()")
        edit(sketch, "m")
    return "m"


def additive(sketch: Sketch, m: str) -> str:
    """An expression of what is added to the logits for a boolean mask."""
    half = "dtype: float16" in sketch.features
    low = sketch.pick("low", {name: low for name, low in LOW.items() if not (half and name == "-1e9")})
    finite = "-10000.0" if half else low if "inf" not in low else "-1e9"
    return str(sketch.pick("additive", ADDITIVE).format(m=m, low=low, finite=finite))
