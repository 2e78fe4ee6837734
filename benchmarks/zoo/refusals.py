"""Why attention of the zoo's models stays dense today: the one place to change when more becomes possible."""

from __future__ import annotations

PHRASES = {
    "mask that is an input": "the input l_",
    "additive bias": "additive bias with content",
    "sliding window": "only j <= i + constant and key padding are known",
    "mask of unknown content": "which cannot be read and varies over queries or heads",
    "heads that broadcast": "pass enable_gqa=True",
    "scale per head": "scaled by a tensor with content",
    "content bias": "which is changed in place",
}
"""Kinds of refusals, and what their reasons say; the first that fits counts."""

NOT_FOUND = "not found"
"""Stands beside the kinds of refusals for attention that is not found at all."""

EXPECTED: dict[str, set[str]] = {
    "beit": {"additive bias"},
    "bloom": {"additive bias"},
    "deberta_v2": {"content bias"},
    "falcon": {"heads that broadcast"},
    "falcon_alibi": {"additive bias", "heads that broadcast"},
    "gemma2": {NOT_FOUND},
    "gemma3": {"sliding window"},
    "gpt_neo": {"mask that is an input"},
    "gpt_oss": {NOT_FOUND},
    "mistral": {"sliding window"},
    "modernbert": {"mask of unknown content"},
    "mpnet": {"additive bias"},
    "mpt": {"additive bias"},
    "opt": {"mask that is an input"},
    "sam_vision": {"additive bias"},
    "siglip": {NOT_FOUND},
    "siglip_vision": {NOT_FOUND},
    "swin": {"additive bias"},
    "swinv2": {"scale per head"},
    "t5": {"additive bias"},
    "xglm": {NOT_FOUND},
}
"""The architectures of which some attention stays dense, and why."""

EXPECTED_IN = {"static prefill": {"mask of unknown content"}}
"""The scenarios in which attention of any architecture stays dense: the cache holds its length in a tensor."""


def expected_refusals(architecture: str, scenario: str) -> set[str]:
    """The kinds of refusals that are known of a call."""
    return EXPECTED.get(architecture, set()) | EXPECTED_IN.get(scenario, set())


def kind_of_refusal(reason: str) -> str:
    """The kind of a reason, or the reason itself if it is of none."""
    return next((kind for kind, phrase in PHRASES.items() if phrase in reason), reason)
