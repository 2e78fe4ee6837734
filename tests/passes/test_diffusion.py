"""Attention of diffusion models, as their modules write it: bidirectional, over text and image together or across."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .capture import EXACT
from .compare import assert_rewritten

BATCH, HEADS, CHANNELS = 3, 2, 12
WIDTH = HEADS * CHANNELS
LENGTHS = [(18, 5), (29, 8), (13, 18)]
"""Tokens of image and text; together primes, so that no other size is a multiple of them."""


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2, 3)


def angles(length: int) -> Tensor:
    place = torch.arange(length, dtype=torch.float32)
    return torch.outer(place, 100.0 ** -torch.arange(0, 1, 2 / CHANNELS))


def rotate_pairs(x: Tensor) -> Tensor:
    """Rotary embedding [B, H, L, D] of neighbouring channels, with sine and cosine."""
    cosine, sine = (f(angles(x.shape[2])).repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin))
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cosine + turned.float() * sine).to(x.dtype)


def rotate_complex(x: Tensor) -> Tensor:
    """The same by complex numbers."""
    turns = torch.polar(torch.ones(()), angles(x.shape[2]))
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns
    return torch.view_as_real(turned).flatten(3).type_as(x)


class Joint(nn.Module):
    """Text and image attend to each other: projections and norms of their own, one attention (SD3, Flux)."""

    def __init__(self, rotate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rotate = rotate
        self.of_image, self.of_text = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(CHANNELS, eps=1e-6) for _ in range(4))
        self.image_out, self.text_out = (nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (split_heads(x) for x in self.of_image(image).chunk(3, dim=-1))
        text_q, text_k, text_v = (split_heads(x) for x in self.of_text(text).chunk(3, dim=-1))
        norm_q, norm_k, norm_text_q, norm_text_k = self.norms
        q = torch.cat([norm_text_q(text_q), norm_q(q)], dim=2)
        k = torch.cat([norm_text_k(text_k), norm_k(k)], dim=2)
        v = torch.cat([text_v, v], dim=2)
        output = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, dropout_p=0.0, is_causal=False)
        text, image = merge_heads(output).to(q.dtype).split([text.shape[1], image.shape[1]], dim=1)
        return self.image_out(image), self.text_out(text)


class Single(nn.Module):
    """One stream with modulation from the time step: attention and feed forward in parallel (Flux, HunyuanVideo)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.project, self.mlp, self.out = (nn.Linear(a * WIDTH, b * WIDTH) for a, b in ((1, 3), (1, 4), (5, 1)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([text, image], dim=1)
        shift, scale, gate = self.modulation(F.silu(x.mean(1)))[:, None].chunk(3, dim=-1)
        normed = self.norm(x) * (1 + scale) + shift
        q, k, v = self.project(normed).chunk(3, dim=-1)
        q, k, v = split_heads(self.norm_q(q)), split_heads(self.norm_k(k)), split_heads(v)
        attended = merge_heads(F.scaled_dot_product_attention(rotate_pairs(q), rotate_pairs(k), v))
        mixed = torch.cat([attended, F.gelu(self.mlp(normed), approximate="tanh")], dim=2)
        return (x + gate * self.out(mixed))[:, text.shape[1] :]


class OfPictures(nn.Module):
    """Attention over the pixels of feature maps, by baddbmm (VAE of Stable Diffusion)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        maps = torch.cat([image, text], 1).transpose(1, 2).unsqueeze(-1)
        batch, channels, height, width = maps.shape
        x = self.norm(maps.view(batch, channels, height * width)).transpose(1, 2)
        q, k, v = (split_heads(f(x)).flatten(0, 1) for f in (self.q, self.k, self.v))
        scores = torch.baddbmm(
            torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device),
            q, k.transpose(-1, -2), beta=0, alpha=CHANNELS**-0.5,
        )  # fmt: skip
        x = torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (batch, HEADS))
        x = self.out(merge_heads(x)).transpose(-1, -2).reshape(batch, channels, height, width)
        return x + maps


class Across(nn.Module):
    """Image attends to text, of which some is padding (PixArt, Wan)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, image: Tensor, text: Tensor, present: Tensor) -> Tensor:
        q, k, v = split_heads(self.q(image)), split_heads(self.k(text)), split_heads(self.v(text))
        return image + merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=present.bool()[:, None, None, :]))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "joint, rotation by sine and cosine": lambda: Joint(rotate_pairs),
    "joint, rotation by complex numbers": lambda: Joint(rotate_complex),
    "single stream": Single,
    "feature maps": OfPictures,
}


def inputs(image: int, text: int) -> list[Tensor]:
    return [torch.randn(BATCH, length, WIDTH) for length in (image, text)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_self_attention(name: str, dynamic: bool) -> None:
    calls = [inputs(*lengths) for lengths in LENGTHS[: None if dynamic else 1]]
    assert_rewritten(MODULES[name]().eval(), *calls, dynamic=dynamic, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_cross_attention(dynamic: bool) -> None:
    calls: list[list[Any]] = []
    for image, text in [(13, 23), (17, 31), (29, 11)][: None if dynamic else 1]:
        present = torch.ones(BATCH, text, dtype=torch.long)
        present[0, -4:] = 0
        calls.append([*inputs(image, text), present])
    assert_rewritten(Across().eval(), *calls, mask="key padding", dynamic=dynamic, atol=1e-5, rtol=1e-4)


def test_through_inductor() -> None:
    module = Joint(rotate_pairs).eval()
    compiled = torch.compile(module, backend="s2o", options=EXACT.to_dict(), fullgraph=True)
    args = inputs(*LENGTHS[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), module(*args), atol=1e-5, rtol=1e-4)
