"""Attention of many transformers architectures is found and stays right; CI takes a sample, `-m zoo` the rest."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from benchmarks.zoo.architectures import ARCHITECTURES, calls
from benchmarks.zoo.compare import EXACT, compare, examine
from benchmarks.zoo.diffusion import DIFFUSION, MISSING
from benchmarks.zoo.refusals import EXPECTED, kind_of_refusal
from s2o_compile import s2o

SAMPLE = ("bert", "bloom", "clip", "deepseek_v3", "falcon", "gemma2", "llama", "mistral", "swin", "t5", "wav2vec2")
DIFFUSION_SAMPLE = ("flux", "ltx_video")
SCENARIOS = ("plain", "left padding", "decode")
WHOLE = "llama"
"""Of it all scenarios are quick, of the others one for each implementation."""
TOLERANCE = 1e-5
"""Of outputs, relative to the largest; wrong masks or scales make a difference of 0.01 and more."""


def sampled(name: str, implementation: str, scenario: str) -> list[pytest.MarkDecorator]:
    """The marks of a call."""
    if name not in SAMPLE or scenario not in SCENARIOS:
        return [pytest.mark.zoo]
    is_quick = name == WHOLE or scenario == ("left padding" if implementation == "sdpa" else "plain")
    return [] if is_quick else [pytest.mark.slow, pytest.mark.zoo]


@pytest.mark.parametrize(
    ("name", "implementation", "scenario"),
    [
        pytest.param(name, implementation, scenario, marks=sampled(name, implementation, scenario))
        for name, implementation, scenario in calls(ARCHITECTURES)
    ],
)
def test_attention_is_found_and_right(name: str, implementation: str, scenario: str) -> None:
    outcome = examine(ARCHITECTURES[name], implementation, scenario)
    assert outcome.difference < TOLERANCE
    assert {kind_of_refusal(site.reason) for site in outcome.refused} <= EXPECTED.get(name, set())
    assert len(outcome.decisions) == outcome.expected


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize(
    ("name", "implementation", "scenario"),
    [
        pytest.param(*call, marks=[] if call[0] in DIFFUSION_SAMPLE else [pytest.mark.zoo])
        for call in calls(DIFFUSION if not MISSING else {})
    ],
)
def test_attention_of_diffusion_models_is_found_and_right(name: str, implementation: str, scenario: str) -> None:
    outcome = examine(DIFFUSION[name], implementation, scenario)
    assert outcome.difference < TOLERANCE
    assert {kind_of_refusal(site.reason) for site in outcome.refused} <= EXPECTED.get(name, set())
    assert len(outcome.decisions) == outcome.expected


@pytest.mark.parametrize(
    ("name", "scenario"), [("llama", "left padding"), pytest.param("bert", "plain", marks=pytest.mark.slow)]
)
def test_inductor_agrees(name: str, scenario: str) -> None:
    assert compare(ARCHITECTURES[name], "eager", scenario, s2o.with_config(EXACT)) < TOLERANCE
