"""YaRN (arXiv 2309.00071): rotary positions beyond those that a model was made for."""

from __future__ import annotations

from typing import Any

from s2o_compile._console import UsageError


def stretch(model: Any, factor: float) -> None:
    """Let a model of transformers read `factor` times as many positions as its configuration says.

    Raises:
        UsageError: The factor is not above 1, or the model's rotary positions are not plain.
    """
    if not factor > 1:
        raise UsageError(f"--yarn must be above 1, not {factor:g}.")
    settings = model.config.get_text_config()
    rope = getattr(settings, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default":
        raise UsageError(f"--yarn needs plain rotary positions, which {type(model).__name__} does not have.")
    original = settings.max_position_embeddings
    settings.rope_parameters = rope | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    settings.max_position_embeddings = int(original * factor)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if hasattr(child, "inv_freq"):
                setattr(parent, name, type(child)(settings).to(child.inv_freq.device))
