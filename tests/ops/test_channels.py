"""The directions in which keys are scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2o_compile.ops import Ranking, S2OConfig, cpu
from s2o_compile.ops.kernels import pipeline
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.result import AttentionResult
from s2o_compile.ops.rule.channels import principal_directions, project
from s2o_compile.ops.visibility import Visibility

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def spectrum(rows: int, size: int, decay: float, generator: torch.Generator) -> torch.Tensor:
    """Random rows whose variance decays along random directions."""
    axes = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return torch.randn(rows, size, generator=generator, dtype=torch.float64) * decay ** torch.arange(size) @ axes


def best_error(query: torch.Tensor, key: torch.Tensor, channels: int) -> torch.Tensor:
    """The least mean squared error that products in `channels` channels can have (Eckart and Young)."""
    roots = []
    for x in (query, key):
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        roots.append(vectors * values.clamp_min(0).sqrt() @ vectors.T)
    return torch.linalg.svdvals(roots[0] @ roots[1])[channels:].square().sum()


def strongest_error(query: torch.Tensor, key: torch.Tensor, channels: int) -> torch.Tensor:
    """The mean squared error of products in the channels with the most energy."""
    energies = query.square().mean(0) * key.square().mean(0)
    others = energies.argsort()[: len(energies) - channels]
    return (query[:, others] @ key[:, others].T).square().mean()


@given(st.integers(0, 2**31), st.sampled_from([4, 9, 16]), st.sampled_from([0.7, 0.9]))
def test_products_err_little_more_than_they_must(seed: int, channels: int, decay: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = (spectrum(rows, 32, decay, generator) for rows in (400, 300))
    key = key + torch.randn(32, generator=generator, dtype=torch.float64)
    of_query, of_key, neglected = principal_directions(query, key, channels)
    missing = (query @ of_query) @ (key @ of_key).T - query @ key.T
    error = missing.square().mean()
    least, most = best_error(query, key, channels), strongest_error(query, key, channels)
    assert (1 - 1e-6) * least <= error <= (1 + 1e-6) * most
    if channels < 16:
        assert error <= 0.3 * most + 2 * least
    torch.testing.assert_close(neglected, missing.var(1, correction=0).mean(), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_of_few_directions_are_exact(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    basis = torch.randn(2, 3, 4, 24)
    guides = (torch.randn(2, 3, 2, rows, 4) @ basis[:, :, None]).to(dtype)
    key = (torch.randn(2, 3, rows, 4) @ basis).to(dtype)
    projected, scored, neglected = project(guides, key, 8, 0.5)
    assert projected.shape == (2, 3, 2, rows, 8) and scored.shape == (2, 3, rows, 8)
    want = guides.double() @ key.double()[:, :, None].mT
    got = projected.double() @ scored.double()[:, :, None].mT
    assert (got - want).abs().max() <= (1e-2 if dtype == torch.float16 else 1e-3) * want.abs().max()
    assert neglected.shape == (2, 3) and neglected.max() <= 0.25e-4 * want.square().mean()


@pytest.mark.parametrize("seed", range(20))
def test_products_of_one_guide_and_one_key_are_exact(seed: int) -> None:
    """Of more channels than there is to find: the rest are roundings, which must not be divided by others."""
    generator = torch.Generator().manual_seed(seed)
    guide, key = (torch.randn(1, 1, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    projected, scored, _ = project(guide, key[0], 3, 0.1)
    assert torch.allclose(projected @ scored.T, guide @ key[0].T, rtol=1e-6, atol=1e-6)


def test_keys_that_do_not_count_have_no_say() -> None:
    torch.manual_seed(2)
    guides, key, valid = torch.randn(2, 50, 16), torch.randn(60, 16), torch.arange(60) % 3 > 0
    other = torch.where(valid[:, None], key, torch.nan)
    for got, want in zip(project(guides, other, 4, 0.5, valid), project(guides, key, 4, 0.5, valid), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("channels", [4, 10])
def test_padding_does_not_dilute_what_is_neglected(channels: int) -> None:
    torch.manual_seed(4)
    guides, key, valid = torch.randn(2, 50, 16), torch.randn(60, 16) + 0.3, torch.arange(60) >= 45
    of_valid = project(guides, key[valid], channels, 0.5).neglected
    torch.testing.assert_close(project(guides, key, channels, 0.5, valid).neglected, of_valid)
    for sizes in ((2, 3), (1, 1)):
        many = (x.expand(*sizes, *x.shape) for x in (guides, key))
        several = project(*many, channels, 0.5, valid.expand(sizes[0], 1, 60)).neglected
        torch.testing.assert_close(several, of_valid.expand(sizes))


def test_all_channels_are_left_as_they_are() -> None:
    guides, key = torch.randn(2, 5, 16), torch.randn(6, 16)
    for channels in (None, 16, 40):
        assert project(guides, key, channels, 0.5) == (guides, key, None)


def by_reference(*tensors: torch.Tensor, config: S2OConfig) -> AttentionResult:
    return reference_attention(*tensors, Visibility(True), scale=0.5, config=config)


def on_a_cpu(*tensors: torch.Tensor, config: S2OConfig) -> AttentionResult:
    return cpu.sparse_attention(*tensors, Visibility(True), 0.5, 0.0, config)


def by_kernels(*tensors: torch.Tensor, config: S2OConfig) -> AttentionResult:
    return pipeline.sparse_attention(*(x.to(DEVICE) for x in tensors), Visibility(True), 0.5, 0.0, config)


@pytest.mark.parametrize(
    ("attend", "measure", "threshold"),
    [
        *((attend, *case) for attend in (by_reference, on_a_cpu) for case in (("mass", 0.01), ("output", 0.05))),
        (by_kernels, "mass", 0.01),
        pytest.param(by_kernels, "output", 0.05, marks=pytest.mark.slow),
    ],
)
def test_all_channels_are_scored_for_the_groups_that_need_them(attend: Any, measure: str, threshold: float) -> None:
    """Of four KV groups in a batch of two, one has queries so large that four channels miss too much of its logits."""
    torch.manual_seed(3)
    query = torch.randn(2, 4, 260, 16) * torch.tensor([0.7, 0.7, 1.5, 1.5])[:, None, None]
    query[1] *= 0.5
    key, value = torch.randn(2, 2, 2, 260, 16)
    few, all_of_them = (
        attend(
            query,
            key,
            value,
            config=S2OConfig(threshold, ranking=Ranking(channels=channels, measure=measure, rule="dropped")),
        )
        for channels in (4, None)
    )
    assert torch.equal(few.output[0, 2:], all_of_them.output[0, 2:])
    for batch, heads in ((0, slice(2)), (1, slice(2)), (1, slice(2, 4))):
        assert not torch.equal(few.output[batch, heads], all_of_them.output[batch, heads])
