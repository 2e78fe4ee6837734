"""What a calibration found, as a small JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._console import as_text
from ..ops import S2OConfig
from ..ops.old_names import sentence_on_old_name
from ..writing import write_text
from .identity import Identity

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = "s2o calibration, version 2"


class CalibrationError(ValueError):
    """A calibration cannot be read, written or used for this model; the message is one sentence."""


@dataclass(frozen=True)
class Site:
    """What was chosen for an attention site.

    Attributes:
        threshold: The largest threshold found at which every call kept its share of the budget; None if none did.
        density: Visited (query, key) pairs over those that a dense kernel visits, in the call with the largest error.
        error: The relative squared error of that call, over all its queries, heads and sequences.
        dense: Why the site is better left dense; '' if it is not.
    """

    threshold: float | None
    density: float | None
    error: float | None
    dense: str = ""


@dataclass(frozen=True)
class Calibration:
    """Settings of the attention sites of a model; print it, or take `to_dict`.

    Attributes:
        model: Which model they are for.
        error_budget: The relative squared error that each call of a site may have.
        lengths: The number of queries of each input that it was measured on.
        settings: The options that it was measured with, `last_queries` and the fields of `ranking`.
        torch: The version of PyTorch.
        sites: By the names that reports and profiles give them.
    """

    model: Identity
    error_budget: float
    lengths: list[int]
    settings: dict[str, Any]
    torch: str
    sites: dict[str, Site]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file.

        Raises:
            CalibrationError: It cannot be read, or is no calibration of this version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise CalibrationError(f"calibration {str(path)!r} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise CalibrationError(f"calibration {str(path)!r} is not a text file") from error
        try:
            found = json.loads(text)
            _refuse_old_names(path, found["settings"])
            _require(found.pop("format") == FORMAT)
            found["model"] = Identity(**found["model"])
            found["sites"] = {name: Site(**site) for name, site in found["sites"].items()}
            calibration = cls(**found)
            calibration._check()
        except CalibrationError:
            raise
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"calibration {str(path)!r} must be a file that s2o_compile.calibrate wrote ({FORMAT})"
            ) from error
        return calibration

    def _check(self) -> None:
        """Raise AttributeError, TypeError or ValueError for what `calibrate` does not write."""
        S2OConfig(error_budget=self.error_budget)
        for site in self.sites.values():
            S2OConfig.from_options(self.settings | {"threshold": site.threshold if not site.dense else 0.0})
        measured = [x for site in self.sites.values() for x in (site.threshold, site.density, site.error)]
        numbers = [self.error_budget, self.model.parameters, *self.lengths, *(x for x in measured if x is not None)]
        weights = self.model.weights.values()
        texts = [self.torch, self.model.kind, *weights, *(site.dense for site in self.sites.values())]
        _require(all(type(x) in (int, float) and 0 <= x < math.inf for x in numbers))
        _require(all(isinstance(x, str) for x in texts) and isinstance(self.lengths, list))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file.

        Raises:
            CalibrationError: It cannot be written.
        """
        with one_sentence(path):
            write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The fields, in types that JSON has."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @property
    def density(self) -> float:
        """The mean over all sites, where dense ones visit everything."""
        shares = [1.0 if site.dense or site.density is None else site.density for site in self.sites.values()]
        return sum(shares) / max(1, len(shares))

    def __rich__(self) -> Table:
        from rich.table import Table

        sparse = sum(not site.dense for site in self.sites.values())
        table = Table(title=f"s2o: {sparse} of {len(self.sites)} attention sites sparse")
        table.caption = f"error budget {self.error_budget:g}, mean density {self.density:.3f}"
        table.add_column("site", overflow="fold")
        for column in ("threshold", "density", "relative error"):
            table.add_column(column, justify="right")
        table.add_column("attention", overflow="fold")
        for name, site in self.sites.items():
            numbers = (("threshold", ".2e"), ("density", ".3f"), ("error", ".1e"))
            shown = [_shown(getattr(site, field), form) for field, form in numbers]
            table.add_row(name, *shown, f"dense: {site.dense}" if site.dense else "sparse")
        return table

    def __str__(self) -> str:
        return as_text(self)


@contextmanager
def one_sentence(path: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong in writing a file is a CalibrationError."""
    try:
        yield
    except OSError as error:
        raise CalibrationError(f"output {str(path)!r} cannot be written: {error.strerror}") from error


def _refuse_old_names(path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    sentence = sentence_on_old_name(settings, ())
    if sentence is not None:
        raise CalibrationError(f"calibration {str(path)!r} must be made again: in it, {sentence}")


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _shown(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)
