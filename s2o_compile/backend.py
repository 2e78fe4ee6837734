"""The torch.compile backend: attention becomes sparse where proven safe, the rest goes to Inductor."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .ops import S2OConfig

log = logging.getLogger(__name__)


@dataclass(eq=False)
class S2OBackend:
    """A backend for ``torch.compile(model, backend="s2o")``, or ``backend=s2o_compile.s2o``.

    ``TORCH_LOGS=s2o_compile`` logs a line for each graph, ``TORCH_LOGS=+s2o_compile`` one for each attention site
    too; `s2o_compile.explain` reports them.

    Attributes:
        config: The settings of the operator.
    """

    config: S2OConfig = field(default_factory=S2OConfig)
    __name__ = "s2o"

    def __post_init__(self) -> None:
        self.config = S2OConfig.of(self.config)

    def with_config(self, config: S2OConfig) -> S2OBackend:
        """This backend with other settings.

        Raises:
            TypeError: They are no `S2OConfig`.
        """
        return dataclasses.replace(self, config=config)

    def __call__(
        self,
        module: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Callable[..., Any]:
        """Compile one graph of Dynamo.

        Args:
            module: The graph; it is rewritten in place.
            example_inputs: The graph's inputs, as Dynamo passes them.
            mode: One of Inductor's modes.
            options: Fields of `S2OConfig`, and Inductor's own options.
            **kwargs: Passed on to Inductor.

        Raises:
            TypeError: An option has a value of the wrong type.
            ValueError: An option is unknown or has a value that is not allowed, or `calibration` is not a file for this
                model.
        """
        from torch._inductor.compile_fx import compile_fx

        from .calibration.settings import site_settings
        from .passes.report import Report
        from .passes.rewrite import rewrite

        config, patches = self.split_options(options or {}, mode)
        report = Report(rewrite(module, config, site_settings(config, module, example_inputs)))
        log.info("%d of %d attention sites rewritten", report.rewritten, len(report.decisions))
        for decision in report.decisions:
            log.debug("%s", decision)
        # Inductor's caches know the operator's name, not what it does in this release.
        tag = f"{torch.compiler.config.cache_key_tag}s2o-{importlib.metadata.version('s2o-compile')}"
        with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            compiled: Any = compile_fx(module, example_inputs, config_patches=patches or None, **kwargs)
        return compiled

    def split_options(self, options: dict[str, Any], mode: str | None = None) -> tuple[S2OConfig, dict[str, Any]]:
        """The settings that options ask for, and what is left for Inductor, with the options of `mode`.

        Raises:
            TypeError: An option has a value of the wrong type.
            ValueError: An option is unknown or has a value that is not allowed.
        """
        import torch._inductor

        own = {option.name for option in dataclasses.fields(S2OConfig)}
        changes = {name: value for name, value in options.items() if name in own}
        others = {name.replace("-", "_"): value for name, value in options.items() if name not in own}
        if others:
            known = torch._inductor.list_options()
            S2OConfig.from_options({name: value for name, value in others.items() if name not in known})
        patches = dict(torch._inductor.list_mode_options(mode)) if mode and mode != "default" else {}
        return dataclasses.replace(self.config, **changes), patches | others


s2o = S2OBackend()
