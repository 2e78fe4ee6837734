"""Why attention of the zoo's models stays dense today: the one place to change when more becomes possible."""

from __future__ import annotations

PHRASES = {
    "additive bias": "additive bias with content",
    "finite masks": "by a finite number",
    "scale per head": "scaled by a tensor with content",
}
"""Kinds of refusals, and what their reasons say; the first that fits counts."""

EXPECTED: dict[str, set[str]] = {
    "beit": {"additive bias"},
    "bloom": {"additive bias"},
    "deberta_v2": {"additive bias"},
    "falcon_alibi": {"additive bias"},
    "gpt_neo": {"finite masks"},
    "mpnet": {"additive bias"},
    "mpt": {"additive bias"},
    "opt": {"additive bias"},
    "pixart": {"additive bias"},
    "sam_vision": {"additive bias"},
    "swin": {"additive bias"},
    "swinv2": {"scale per head"},
    "t5": {"additive bias"},
    "xglm": {"additive bias"},
}
"""The architectures of which some attention stays dense, and why; of opt and xglm, an added mask that is an input, and
of pixart one that is made of integers that could be any.

gpt_neo hides keys by two masks of finite numbers.
"""


def kind_of_refusal(reason: str) -> str:
    """The kind of a reason, or the reason itself if it is of none."""
    return next((kind for kind, phrase in PHRASES.items() if phrase in reason), reason)
