"""The torch.compile backend: attention becomes sparse where proven safe, the rest goes to Inductor."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .ops import S2OConfig
from .ops.layout import LAYOUTS, Sharding
from .ops.process_group import sharding_of
from .version import fingerprint

if TYPE_CHECKING:
    from .passes.report import Decision, Report

log = logging.getLogger(__name__)


@dataclass(eq=False)
class S2OBackend:
    """A backend for ``torch.compile(model, backend="s2o")``, or ``backend=s2o_compile.s2o``.

    ``TORCH_LOGS=s2o_compile`` logs a line for each graph, ``TORCH_LOGS=+s2o_compile`` one for each attention site
    too; `s2o_compile.explain` reports them. An error in the graph passes leaves the graph to Inductor as it was, with
    a warning; with ``S2O_RAISE_ERRORS=1`` in the environment it is raised.

    Attributes:
        config: The settings of the operator; they cannot be changed, but for another backend by `with_config`.
    """

    config: S2OConfig = field(default_factory=S2OConfig)
    _decisions: list[Decision] = field(default_factory=list, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)
    __name__ = "s2o"

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", S2OConfig.of(self.config))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "config" and "config" in vars(self):
            raise AttributeError(
                "config cannot be changed, as graphs may be compiled with it; pass backend=s2o.with_config(config)"
            )
        super().__setattr__(name, value)

    def with_config(self, config: S2OConfig) -> S2OBackend:
        """This backend with other settings.

        Raises:
            TypeError: They are no `S2OConfig`.
        """
        return dataclasses.replace(self, config=config)

    @property
    def report(self) -> Report:
        """What was decided of the attention of all graphs compiled since the last ``torch.compiler.reset()``.

        Those of graph breaks and of recompilations are among them, as are those of other models with this backend.
        """
        from .passes.report import Report

        return Report(list(self._decisions))

    def reset(self) -> None:
        """Forget the report; ``torch.compiler.reset()`` calls this."""
        self._decisions.clear()
        self._warned = False

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
            options: Fields of `S2OConfig`, Inductor's own options, and `mesh` and `layout` as for
                ``s2o_compile.attention``: then the sequence is sharded over ranks, and masks, which are written in the
                positions of one rank, mean those of the sequence.
            **kwargs: Passed on to Inductor.

        Raises:
            TypeError: An option has a value of the wrong type.
            ValueError: An option is unknown or has a value that is not allowed, or `calibration` is not a file for this
                model; or there is a `mesh`, and a site cannot attend to the keys of all ranks.
        """
        from torch._inductor.compile_fx import compile_fx

        from .calibration.file import CalibrationError
        from .calibration.settings import site_settings
        from .passes.graph.torch_internals import redirections
        from .passes.over_ranks import ShardedSiteError
        from .passes.rewrite import rewrite
        from .passes.safety import Safeguard

        options, sharding = split_sharding(options or {})
        config, patches = self.split_options(options, mode)

        def rewritten() -> list[Decision]:
            of_site = site_settings(config, module, example_inputs)
            return rewrite(module, config, of_site, fuse_dense=True, sharding=sharding)

        def compiled() -> Any:
            return compile_fx(module, example_inputs, config_patches=patches or None, **kwargs)

        def compiled_as_it_was() -> Any:
            result = compiled()
            for decision in decisions:
                decision.rewritten, decision.reason = False, "what it became did not compile; a warning says why"
            return result

        safeguard = Safeguard(module)
        decisions: list[Decision] = safeguard.run(rewritten, list, CalibrationError, ShardedSiteError)
        self._note(decisions)
        with safeguard.run(_apart, contextlib.ExitStack):
            return safeguard.run(compiled, compiled_as_it_was, *redirections())

    def _note(self, decisions: list[Decision]) -> None:
        """Keep the decisions on the sites of a graph, log them, and warn once if they come to nothing."""
        self._decisions += decisions
        log.info("%d of %d attention sites rewritten", sum(each.rewritten for each in decisions), len(decisions))
        for decision in decisions:
            log.debug("%s", decision)
        prefills = [decision for decision in decisions if decision.shapes["query"][2:3] != (1,)]
        if prefills and not self._warned and not any(decision.rewritten for decision in self._decisions):
            self._warned = True
            reason, count = Counter(decision.reason for decision in prefills).most_common(1)[0]
            warnings.warn(
                f"s2o leaves {len(prefills)} of {len(prefills)} attention sites of a graph dense, {count} because: "
                f"{reason}. s2o_compile.explain tells of each; this warning is given once",
                stacklevel=2,
            )

    def split_options(self, options: dict[str, Any], mode: str | None = None) -> tuple[S2OConfig, dict[str, Any]]:
        """The settings that options ask for, and what is left for Inductor, with the options of `mode`.

        Raises:
            TypeError: An option has a value of the wrong type.
            ValueError: An option is unknown or has a value that is not allowed.
        """
        import torch._inductor

        own = [option.name for option in dataclasses.fields(S2OConfig)]
        changes = {name: value for name, value in options.items() if name in own}
        others = {name.replace("-", "_"): value for name, value in options.items() if name not in own}
        if others:
            known = torch._inductor.list_options()
            S2OConfig.from_options({name: value for name, value in others.items() if name not in known})
        patches = dict(torch._inductor.list_mode_options(mode)) if mode and mode != "default" else {}
        return self.config.with_options(changes), patches | others


def split_sharding(options: dict[str, Any]) -> tuple[dict[str, Any], Sharding | None]:
    """The other options, and the sharding of the sequence that `mesh` and `layout` ask for; None without a mesh.

    Raises:
        TypeError: `mesh` is neither a mesh nor a process group.
        ValueError: `mesh` has several dimensions, or `layout` is unknown or comes without a mesh.
    """
    others = {name: value for name, value in options.items() if name not in ("mesh", "layout")}
    mesh, layout = options.get("mesh"), options.get("layout", LAYOUTS[0])
    if mesh is None:
        if "layout" in options:
            raise ValueError(f"layout must be left out without a mesh, not {layout!r}")
        return others, None
    return others, sharding_of(mesh, layout)


def _apart() -> contextlib.ExitStack:
    """Let Inductor compile other than without s2o until this is closed, and take nothing else from its caches.

    The caches know the operator's name, not what it does in this release, nor which backends SDPA is to take.
    """
    from .passes.graph.torch_internals import attention_preferences, without_attention_patterns

    tag = f"{torch.compiler.config.cache_key_tag}s2o-{fingerprint()} {attention_preferences()}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.config.patch(cache_key_tag=tag))  # type: ignore[attr-defined]
        stack.enter_context(without_attention_patterns())
        return stack.pop_all()


s2o = S2OBackend()
