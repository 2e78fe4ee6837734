"""Export of a model with sparse attention in its graph."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.export import ExportedProgram

from .calibration.settings import site_settings
from .ops import S2OConfig
from .passes import Report, rewrite

log = logging.getLogger(__name__)


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    config: S2OConfig | None = None,
    strict: bool = False,
) -> ExportedProgram:
    """Export a model as ``torch.export.export`` does, with ``torch.ops.s2o.attention`` at each site that is proven.

    The program runs where this package is imported. ``TORCH_LOGS=s2o_compile`` logs how many sites were rewritten,
    ``TORCH_LOGS=+s2o_compile`` each of them, with the reason.

    Args:
        model: The module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        dynamic_shapes: As ``torch.export.export`` takes them; torch 2.11 refuses named dimensions where 2.13 does not,
            and both take ``Dim.AUTO``.
        config: The settings of the operator, by default ``S2OConfig()``.
        strict: Whether Dynamo traces the model.

    Raises:
        TypeError: `config` has the wrong type.
        ValueError: No attention site was rewritten; the message says why for the first of them. Or the calibration is
            not a file for this model.
    """
    config = S2OConfig.of(config)
    with torch.no_grad():
        dense = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict).module()
        assert isinstance(dense, torch.fx.GraphModule)
        _prepare(dense)
        report = Report(rewrite(dense, config, site_settings(config, dense, ())))
        log.info("%d of %d attention sites rewritten", report.rewritten, len(report.decisions))
        for decision in report.decisions:
            log.debug("%s", decision)
        _check(report, model)
        return torch.export.export(dense, args, kwargs, dynamic_shapes=dynamic_shapes)


def _prepare(module: torch.fx.GraphModule) -> None:
    """Put fake tensors where the passes look for them, and drop what hides masks and scores from them.

    These are checks of dtypes, and the in-place detaching of numbers, which are stored without gradients anyway.
    """
    for node in list(module.graph.nodes):
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
        elif node.target is torch.ops.aten.detach_.default and _is_literal(node.args[0]):
            node.target = torch.ops.aten.detach.default


def _is_literal(node: Any) -> bool:
    """Whether a node holds a copy of a number that is written in a program."""
    return isinstance(node, torch.fx.Node) and node.target is torch.ops.aten.lift_fresh_copy.default


def _check(report: Report, model: torch.nn.Module) -> None:
    if not report.rewritten:
        first = next((f"{item.name}: {item.reason}" for item in report.decisions), "no attention was found")
        raise ValueError(f"no attention of {type(model).__name__} becomes sparse; {first}")
