"""Draws programs around attention."""

from __future__ import annotations

from collections.abc import Callable

from . import masks, spellings
from .program import TRANSFORMS, Choose, Program, Sketch

KINDS: dict[str, Callable[[Sketch, str | None], None]] = {
    "sdpa": spellings.sdpa,
    "written": spellings.written,
    "module": spellings.module,
    "flex": spellings.flex,
    "nothing": spellings.nothing,
}
LAYOUTS = {
    "heads first": ("torch.randn(B, {h}, {n}, {d}, dtype=DTYPE)", "{x}"),
    "length first": ("torch.randn(B, {n}, {h}, {d}, dtype=DTYPE)", "{x}.transpose(1, 2)"),
    "heads in channels": (
        "torch.randn(B, {n}, {h} * {d}, dtype=DTYPE)",
        "{x}.view(B, -1, {h}, {d}).transpose(1, 2)",
    ),
    "permuted": ("torch.randn(B, {n}, {h}, {d}, dtype=DTYPE)", "{x}.permute(0, 2, 1, 3).contiguous()"),
    "strided": ("torch.randn(B, {h}, {n}, 2 * {d}, dtype=DTYPE)", "{x}[..., ::2]"),
    "unflattened": ("torch.randn(B, {n}, {h} * {d}, dtype=DTYPE)", "{x}.unflatten(-1, ({h}, {d})).movedim(2, 1)"),
    "channels strided": ("torch.randn(B, {h}, {d}, {n}, dtype=DTYPE)", "{x}.mT"),
    "padded": ("torch.randn(B, {h}, {n} + 1, {d}, dtype=DTYPE)", "{x}[:, :, 1:]"),
    "batch of one": ("torch.randn(1, {h}, {n}, {d}, dtype=DTYPE)", "{x}.expand(B, -1, -1, -1)"),
}
PACKED = {
    "chunk": "q, k, v = (x.view(B, -1, H, D).transpose(1, 2) for x in qkv.chunk(3, -1))",
    "split": "q, k, v = (x.view(B, -1, H, D).transpose(1, 2) for x in qkv.split(H * D, -1))",
    "unbind": "q, k, v = qkv.view(B, -1, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)",
    "indexed": "x = qkv.view(B, -1, 3, H, D).transpose(1, 3); q, k, v = x[:, :, 0], x[:, :, 1], x[:, :, 2]",
    "projected": "q, k, v = (x.view(B, -1, H, D).transpose(1, 2) for x in (qkv @ weight).chunk(3, -1))",
}
CACHES = {
    "concatenated": "k, v = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)",
    "static": "k = k_cache.index_copy_(2, torch.arange(S) + 3, k); v = v_cache.index_copy_(2, torch.arange(S) + 3, v)",
    "sliced": "k_cache[:, :, 3:] = k; v_cache[:, :, 3:] = v; k, v = k_cache, v_cache",
    "indexed": "k_cache[:, :, torch.arange(S) + 3] = k; k = k_cache; v = v_cache.slice_scatter(v, 2, 3)",
}
GROUPS = {
    "enable_gqa": "",
    "repeat_interleave": "k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)",
    "expand": "k, v = (x[:, :, None].expand(B, G, H // G, -1, -1).reshape(B, H, x.shape[2], -1) for x in (k, v))",
    "repeat": "k, v = k.repeat(1, H // G, 1, 1), v.repeat(1, H // G, 1, 1)",
    "stack": "k, v = (torch.stack([x] * (H // G), 2).flatten(1, 2) for x in (k, v))",
}
AFTER = {
    "nothing": "",
    "merged": "y = y.transpose(1, 2).reshape(B, L, -1)",
    "viewed": "y = y.transpose(1, 2).contiguous().view(B, L, -1)",
    "scaled": "y = y * 2",
    "in place": "y.mul_(2)",
    "first zero": "y[:, :, :1] = 0",
    "detached": "z = y * 2; y.detach_(); y = z",
    "residual": "y = y + q[..., :1]",
    "flattened and changed": "z = y.transpose(1, 2).flatten(2); z.add_(1); y = y + z.sum()",
    "reshaped and changed": "z = y.reshape(-1); z.mul_(0.5)",
    "again": "y = F.scaled_dot_product_attention(y, y, y)",
    "transposed": "y = y.transpose(1, 2)",
}
RESULTS = {
    "y": "y",
    "query": "(y, q)",
    "view": "(y, y[:, 0])",
    "strides": "(y, y.stride())",
    "contiguous": "(y, y.is_contiguous())",
    "mask": "(y, {m})",
    "scores": "(y, {s})",
    "probabilities": "(y, {p})",
    "key written": "(y, k.mul_(2))",
    "shape": "(y, q.shape[2] + k.shape[2])",
}
HOOKS = {
    "forward": "probe.register_forward_hook(lambda module, args, output: output * 2)",
    "in place": "probe.register_forward_pre_hook(lambda module, args: (args[0].mul_(0.5),))",
    "pre": "probe.register_forward_pre_hook(lambda module, args: (args[0].clone(),))",
}
LENGTHS = [(13, 13), (13, 23), (37, 37), (1, 17), (23, 5), (1, 1), (70, 70), (0, 13), (13, 0)]


def operands(sketch: Sketch, is_grouped: bool) -> None:
    """Query, key and value as [B, heads, length, channels]."""
    if not is_grouped and not sketch.has("transform") and sketch.rarely("packed", 5):
        sketch.input("qkv", "torch.randn(B, L, 3 * H * D, dtype=DTYPE)")
        text = sketch.pick("packed", PACKED)
        if "weight" in text:
            sketch.input("weight", "torch.randn(3 * H * D, 3 * H * D, dtype=DTYPE) / (H * D) ** 0.5")
        sketch.line(*text.split("; "))
        return
    value, reading = sketch.pick("layout", {name: "|".join(layout) for name, layout in LAYOUTS.items()}).split("|")
    for name, heads, length, channels in (("q", "H", "L", "D"), ("k", "G", "S", "D"), ("v", "G", "S", "E")):
        sketch.input(name, value.format(h=heads, n=length, d=channels))
        if reading != "{x}":
            sketch.line(f"{name} = {reading.format(x=name, h=heads, d=channels)}")


def cached(sketch: Sketch) -> None:
    """Keys and values behind those of a cache."""
    text = sketch.pick("cache", CACHES)
    length = 3 if "torch.cat" in text else "S + 3"
    for name, channels in (("k_cache", "D"), ("v_cache", "E")):
        sketch.input(name, f"torch.randn(B, G, {length}, {channels}, dtype=DTYPE)")
    sketch.line("S = k.shape[2]", *text.split("; "))


def draw_program(choose: Choose) -> Program:
    """A program around attention; `choose` draws one of several values, of which the first is the simplest."""
    sketch = Sketch(choose)
    kind = sketch.pick("kind", ["sdpa", "written"] * 20 + ["module"] * 2 + ["flex", "nothing"])
    dtype = sketch.pick("dtype", ["float32", "float32", "float32", "float32", "float32", "float16", "bfloat16"])
    mode = sketch.pick("mode", ["no_grad"] * 6 + ["inference_mode", "enable_grad", "training"])
    transform = sketch.pick(
        "transform", [*[""] * 60, *(name for name in TRANSFORMS if name != "jvp" or kind != "sdpa")]
    )
    is_grouped = sketch.rarely("grouped", 5)
    batch, heads = sketch.choose([(2, 4), (1, 4), (4, 4), (2, 1), (1, 1)])
    groups = sketch.choose([1, heads // 2 or 1]) if is_grouped else heads
    channels = sketch.pick("channels", [8, 8, 16, 12, 1])
    sizes = f"B, H, G, D, E = {batch}, {heads}, {groups}, {channels}, {sketch.choose([channels, channels, 5])}"
    operands(sketch, is_grouped)
    if mode == "training":
        sketch.line("q, k, v = q * 1, k * 1, v * 1")
        sketch.edits = 20
    if "packed" not in sketch.features and mode != "training" and sketch.rarely("cached", 7):
        cached(sketch)
    elif sketch.rarely("key is value", 12):
        sketch.line("v = k")
    if is_grouped:
        text = sketch.pick("groups", {name: text for name, text in GROUPS.items() if text or kind != "written"})
        sketch.line(text)
        if text:
            sketch.features.discard("grouped")
    if sketch.rarely("hook", 12):
        sketch.setup += ["probe = nn.Identity()", sketch.pick("hook", HOOKS)]
        name = sketch.choose(["q", "v"])
        sketch.line(f"{name} = probe({name})")
    spellings.change(sketch, "first", ["q", "k", "v"])
    sketch.line("L, S = q.shape[2], k.shape[2]")
    m = masks.mask(sketch) if kind in ("sdpa", "written") and sketch.choose([True, True, False]) else None
    spellings.change(sketch, "before", ["q", "k", "v"], [m] if m else [])
    if sketch.rarely("autocast", 12):
        sketch.line('with torch.autocast("cpu", dtype=torch.bfloat16):')
        sketch.indent = "    "
    KINDS[kind](sketch, m)
    sketch.indent = ""
    spellings.change(sketch, "after", ["q", "k", "v", "y"], [m] if m else [])
    sketch.line(*sketch.pick("after", AFTER).split("; "))
    spellings.change(sketch, "at the end", ["q", "y"], [m] if m else [])
    if not transform:
        names = {"m": m or "q", "s": "s" if kind == "written" else "q", "p": "p" if kind == "written" else "q"}
        result = sketch.pick("result", ["y"] * 12 + list(RESULTS))
        sketch.line(f"return {RESULTS[result].format(**names)}")
    else:
        sketch.line("return y")
    lengths = [pair for pair in LENGTHS if pair[0] == pair[1]] if "packed" in sketch.features else LENGTHS
    calls = [sketch.pick("lengths", lengths[:1] * 6 + lengths[1:2] * 6 + lengths[2:])]
    dynamic = sketch.pick("dynamic", [False] * 10 + [None, True])
    if dynamic is not False:
        calls += [sketch.choose(lengths[:3]) for _ in range(2)]
    return Program(
        sizes=f"{sizes}\nDTYPE = torch.{dtype}",
        inputs=tuple(sketch.inputs.items()),
        setup=tuple(sketch.setup),
        body=tuple(line for line in sketch.body if line.strip()),
        transform=transform,
        calls=tuple(calls),
        mode=mode,
        dynamic=dynamic,
        level=sketch.pick("level", ["graph"] * 9 + ["aot"]),
        settings=sketch.pick("settings", ["exact"] * 6 + ["sparse"] * 2 + ["default"] * 2),
        features=frozenset(sketch.features),
    )
