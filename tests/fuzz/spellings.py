"""Spellings of attention: from q [B, H, L, D], k [B, H, S, D] and v [B, H, S, E] to y [B, H, L, E]."""

from __future__ import annotations

from . import masks
from .program import Sketch

SCORES = {
    "matmul": "q @ k.transpose(-2, -1)",
    "mT": "torch.matmul(q, k.mT)",
    "transpose": "q.matmul(k.transpose(2, 3))",
    "permute": "q @ k.permute(0, 1, 3, 2)",
    "einsum": 'torch.einsum("bhid,bhjd->bhij", q, k)',
    "einsum of others": 'torch.einsum("...qc,...kc->...qk", q, k)',
    "bmm": "torch.bmm(q.reshape(B * H, L, -1), k.reshape(B * H, S, -1).transpose(1, 2)).view(B, H, L, S)",
    "baddbmm": (
        "torch.baddbmm(torch.zeros(B * H, L, S, dtype=q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, "
        "alpha=0.5).unflatten(0, (B, H))"
    ),
    "keys first": "(k @ q.mT).mT",
    "keys first by einsum": 'torch.einsum("bhjd,bhid->bhij", k, q)',
    "float": "q.float() @ k.float().mT",
    "broadcast?": "(q.unsqueeze(3) * k.unsqueeze(2)).sum(-1)",
    "query with itself": "(q + 0) @ k.mT",
    "heads exchanged": "q.flip(1) @ k.mT",
}
SCALES = {
    "number": "s = s * 0.3",
    "none": "",
    "sqrt": "s = s / math.sqrt(D)",
    "power": "s = s * q.shape[-1] ** -0.5",
    "in place": "s *= 0.25",
    "div_": "s.div_(math.sqrt(D))",
    "tensor": "s = s * torch.tensor(0.3)",
    "input?": "s = s * t",
    "per head?": "s = s * heads",
    "zero?": "s = s * 0.0",
    "negative": "s = s * -0.3",
    "int": "s = s / 2",
    "twice": "s = s * 2 / 4.0",
    "length": "s = s * (math.log(S + 1) / 4)",
}
BEFORE_SCORES = {
    "nothing": "",
    "q scaled": "q = q * 0.5",
    "k divided": "k = k / D**0.5",
    "q in place": "q = q.clone().mul_(0.5)",
    "both": "q, k = q * D**-0.25, k * D**-0.25",
    "contiguous": "q, k = q.contiguous(), k.contiguous()",
}
SOFTCAPS = {
    "tanh": "s = torch.tanh(s / 2.0) * 2.0",
    "in place": "s = s.div(3.0).tanh_().mul_(3.0)",
    "uneven?": "s = torch.tanh(s / 2.0) * 1.5",
    "clamp?": "s = s.clamp(-1, 1)",
}
FILLS = {
    "masked_fill": "s = s.masked_fill(~{m}, {low})",
    "where": "s = torch.where({m}, s, {low})",
    "masked_fill_": "s.masked_fill_(~({m}), {low})",
    "where of tensor": "s = torch.where({m}, s, torch.full((), {low}, dtype=s.dtype))",
    "== 0": "s = s.masked_fill({m} == 0, {low})",
    "logical_not": "s = s.masked_fill({m}.logical_not(), {low})",
    "function": "s = torch.masked_fill(s, torch.logical_not({m}), {low})",
    "by index?": "s[(~{m}).expand(s.shape)] = {low}",
    "product?": "s = s * {m} + (~{m}) * -1e9",
    "copy_?": "s.copy_(s.masked_fill(~{m}, {low}))",
}
ADDS = {"add": "s = s + {}", "add_": "s += {}", "function": "s = torch.add(s, {})", "sub": "s = s - (-1) * ({})"}
SOFTMAXES = {
    "method": "p = s.softmax(-1)",
    "function": "p = F.softmax(s, dim=-1)",
    "torch": "p = torch.softmax(s, 3)",
    "in float": "p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)",
    "by hand": "e = torch.exp(s - s.amax(-1, keepdim=True)); p = e / e.sum(-1, keepdim=True)",
    "by max": "e = (s - s.max(dim=-1, keepdim=True)[0]).exp(); p = e / e.sum(dim=-1, keepdim=True)",
    "in place": "s = s - s.amax(-1, keepdim=True); s.exp_(); p = s / s.sum(-1, keepdim=True)",
    "detached maximum": "e = (s - s.amax(-1, keepdim=True).detach()).exp(); p = e / e.sum(-1, keepdim=True)",
    "log_softmax": "p = F.log_softmax(s, -1).exp()",
    "logsumexp": "p = (s - s.logsumexp(-1, keepdim=True)).exp()",
    "module": "p = nn.Softmax(dim=-1)(s)",
    "nan_to_num": "p = s.softmax(-1).nan_to_num(0.0)",
    "masked after?": "p = s.softmax(-1).masked_fill(s == -math.inf, 0)",
    "dropout 0": "p = F.dropout(s.softmax(-1), p=0.0)",
    "dropout in evaluation": "p = F.dropout(torch.softmax(s, -1), p=0.5, training=False)",
    "sinks": "p = torch.cat([s, sinks[:, None, None].expand(B, H, L, 1).to(s.dtype)], -1).softmax(-1)[..., :-1]",
    "over queries?": "p = s.softmax(-2)",
    "over heads?": "p = s.softmax(1)",
    "plus one?": "e = s.exp(); p = e / (1 + e.sum(-1, keepdim=True))",
    "of sparse maximum?": "p = s.softmax(-1); p = p * (p > 0.01)",
}
PRODUCTS = {
    "matmul": "y = p.to(v.dtype) @ v",
    "function": "y = torch.matmul(p.to(v.dtype), v)",
    "einsum": 'y = torch.einsum("bhij,bhjd->bhid", p.to(v.dtype), v)',
    "bmm": "y = torch.bmm(p.to(v.dtype).reshape(B * H, L, S), v.reshape(B * H, S, -1)).view(B, H, L, -1)",
    "value first": "y = (v.mT @ p.to(v.dtype).mT).mT",
    "heads last": 'y = torch.einsum("bhij,bhjd->bihd", p.to(v.dtype), v).transpose(1, 2)',
    "broadcast?": "y = (p.unsqueeze(-1).to(v.dtype) * v.unsqueeze(2)).sum(-2)",
}
EDITS = {
    "scaled": "{}.mul_(0.5)",
    "item": "{}[..., :1] = 0.25",
    "view": "{}[:, :1].zero_()",
    "chain": "{}.transpose(1, 2)[:, :2].add_(1)",
    "copy_": "{0}.copy_({0}.flip(-1).clone())",
    "alias": "alias = {}.view({}.shape); alias.neg_()",
    "detach": "{}.detach().mul_(2)",
    "add_": "{}.add_(1)",
    "foreach": "torch._foreach_mul_([{}], 2.0)",
    "set by index": "{}[:, 0] = 1",
    "masked_fill_": "{0}.masked_fill_({0} > 1, 0)",
    "index_copy_": "{0}.index_copy_(2, torch.tensor([0]), {0}[:, :, -1:].clone())",
}
RESHAPES = {
    "squeeze_": "{}.squeeze_(1)",
    "unsqueeze_": "{}.unsqueeze_(1)",
    "transpose_": "{}.transpose_(0, -1)",
    "swapaxes_": "{}.swapaxes_(-1, -2)",
    "detach_": "{}.detach_()",
    "t_ of a view": "{}.select(0, 0).squeeze_()",
    "there and back": "{0}.unsqueeze_(0); {0}.squeeze_(0)",
    "requires_grad_": "{}.requires_grad_(False)",
    "squeeze_ of all": "{}.squeeze_()",
}


def change(sketch: Sketch, where: str, floats: list[str], bools: list[str] | tuple[()] = ()) -> None:
    """Sometimes a change in place, of contents or of metadata."""
    if not sketch.rarely(f"changed {where}", sketch.edits):
        return
    name = sketch.choose([*floats, *bools])
    if sketch.rarely("metadata", 3):
        sketch.line(sketch.pick("metadata", RESHAPES).format(name))
    elif name in bools:
        masks.edit(sketch, name)
    else:
        sketch.line(sketch.pick("edit", EDITS).replace("{0}", name).replace("{}", name))


def written(sketch: Sketch, m: str | None) -> None:
    """Attention by products and a softmax."""
    bools = [m] if m else []
    sketch.line(sketch.pick("before", BEFORE_SCORES))
    sketch.line(f"s = {sketch.pick('scores', SCORES)}")
    change(sketch, "between", ["q", "k", "v", "s"], bools)
    scale = sketch.pick("scale", SCALES)
    if "t" in scale.split():
        sketch.input("t", "torch.tensor(0.4)")
    if "heads" in scale:
        sketch.input("heads", "torch.rand(H, 1, 1)")
    sketch.line(scale)
    if sketch.rarely("softcap", 8):
        sketch.line(sketch.pick("softcap", SOFTCAPS))
    if m and sketch.pick("masked by", ["fill", "sum"]) == "fill":
        half = "dtype: float16" in sketch.features
        low = sketch.pick("low", {name: low for name, low in masks.LOW.items() if not (half and name == "-1e9")})
        sketch.line(sketch.pick("fill", FILLS).format(m=m, low=low))
    elif m:
        sketch.line(f"a = {masks.additive(sketch, m)}")
        sketch.line(sketch.pick("sum", ADDS).format("a"))
    change(sketch, "before the softmax", ["q", "k", "v", "s"], bools)
    softmax = sketch.pick("softmax", SOFTMAXES)
    if "sinks" in softmax:
        sketch.input("sinks", "torch.randn(H)")
    sketch.line(*softmax.split("; "))
    change(sketch, "after the softmax", ["q", "k", "v", "s", "p"], bools)
    sketch.line(sketch.pick("product", PRODUCTS))


def sdpa(sketch: Sketch, m: str | None) -> None:
    """A call of scaled_dot_product_attention."""
    arguments = ["q", "k", "v"]
    if m and sketch.rarely("additive mask", 3):
        sketch.line(f"a = {masks.additive(sketch, m)}")
        arguments.append("attn_mask=a")
    elif m:
        arguments.append(sketch.pick("passed", {"keyword": f"attn_mask={m}", "position": m}))
    if sketch.rarely("is_causal", 20 if m else 2):
        arguments.append("is_causal=True")
    arguments += [
        argument
        for argument in (
            sketch.pick("dropout", ["", "dropout_p=0.0"]),
            sketch.pick("scale", ["", "scale=0.3", "scale=D**-0.5", "scale=0.0", "scale=-0.5", "scale=None"]),
        )
        if argument
    ]
    if "grouped" in sketch.features:
        arguments.append("enable_gqa=True")
    arguments.sort(key=lambda argument: "=" in argument)
    name = sketch.pick("sdpa", ["F.scaled_dot_product_attention", "torch._C._nn.scaled_dot_product_attention"])
    sketch.line(f"y = {name}({', '.join(arguments)})")


MODULES = {
    "attention": ("nn.MultiheadAttention(H * D, H, batch_first=True)", "layer(x, x, x, need_weights=False)[0]"),
    "weights": ("nn.MultiheadAttention(H * D, H, batch_first=True)", "layer(x, x, x)[0]"),
    "length first": (
        "nn.MultiheadAttention(H * D, H)",
        "layer(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), need_weights=False)[0].transpose(0, 1)",
    ),
    "padded": (
        "nn.MultiheadAttention(H * D, H, batch_first=True)",
        "layer(x, x, x, key_padding_mask=hidden, need_weights=False)[0]",
    ),
    "causal": (
        "nn.MultiheadAttention(H * D, H, batch_first=True)",
        "layer(x, x, x, attn_mask=torch.ones(L, L, dtype=torch.bool).triu(1), need_weights=False)[0]",
    ),
    "encoder": ("nn.TransformerEncoderLayer(H * D, H, 16, dropout=0.0, batch_first=True)", "layer(x)"),
    "padded encoder": (
        "nn.TransformerEncoderLayer(H * D, H, 16, dropout=0.0, batch_first=True)",
        "layer(x, src_key_padding_mask=hidden)",
    ),
    "causal encoder": (
        "nn.TransformerEncoderLayer(H * D, H, 16, dropout=0.0, batch_first=True)",
        "layer(x, nn.Transformer.generate_square_subsequent_mask(L), is_causal=True)",
    ),
}


def module(sketch: Sketch, m: str | None) -> None:
    """A module of torch.nn that attends."""
    made, call = sketch.pick("module", {name: "|".join(pair) for name, pair in MODULES.items()}).split("|")
    sketch.setup += ["torch.manual_seed(0)", f"layer = {made}.to(DTYPE){sketch.pick('evaluation', ['.eval()', ''])}"]
    if "hidden" in call:
        sketch.input("hidden", "torch.arange(L) >= torch.randint(1, L + 2, (B, 1))")
    sketch.line("x = q.transpose(1, 2).reshape(B, L, H * D)", f"y = {call}.view(B, L, H, D).transpose(1, 2)")


MASK_MODS = {
    "causal": "i >= j",
    "window": "(i >= j) & (i - j < 4)",
    "both sides": "(i - j).abs() <= 3",
    "padding": "pad[b, j]",
    "padding of counts": "pad[b, j] > 0",
    "documents": "ids[b, i] == ids[b, j]",
    "prefix": "(j < 3) | (i >= j)",
    "per head": "j <= i + h",
    "content": "content[i, j]",
}
SCORE_MODS = {
    "scaled": "score * 0.5",
    "cap": "torch.tanh(score / 2) * 2",
    "causal": "torch.where(i >= j, score, -math.inf)",
    "bias?": "score + (i - j)",
    "finite?": "torch.where(i >= j, score, -1e9)",
}


def flex(sketch: Sketch, m: str | None) -> None:
    """A call of flex_attention."""
    sketch.setup.append("from torch.nn.attention.flex_attention import create_block_mask, flex_attention")
    arguments = ["q", "k", "v"]
    if sketch.choose([True, True, False]):
        mod = sketch.pick("mask_mod", MASK_MODS)
        if "pad" in mod:
            dtype = "torch.randint(-1, 2, (B, S))" if ">" in mod else "torch.rand(B, S) < 0.75"
            sketch.input("pad", dtype)
        if "ids" in mod:
            sketch.input("ids", masks.INPUTS["ids"])
        if "content" in mod:
            sketch.input("content", "torch.rand(L, S) < 0.75")
        sketch.line(f"blocks = create_block_mask(lambda b, h, i, j: {mod}, B, H, L, S, device='cpu', BLOCK_SIZE=16)")
        arguments.append("block_mask=blocks")
    if sketch.choose([False, True]):
        arguments.append(f"score_mod=lambda score, b, h, i, j: {sketch.pick('score_mod', SCORE_MODS)}")
    if "grouped" in sketch.features:
        arguments.append("enable_gqa=True")
    sketch.line(f"y = flex_attention({', '.join(arguments)})")


def nothing(sketch: Sketch, m: str | None) -> None:
    """No attention at all, which must compile nevertheless."""
    sketch.line(
        sketch.pick(
            "other",
            [
                "y = torch.sin(q)",
                'm = torch.einsum("bi,bj->bij", q[:, 0, :, 0], k[:, 0, :, 0]); m.unsqueeze_(1); y = q * m.sum()',
                "m = torch.matmul(q, k.mT); m.squeeze_(1); y = q + m.mean()",
                "y = (q @ q.mT).tril() @ q",
                "y = F.layer_norm(q, (D,)).softmax(-1)",
            ],
        )
    )
