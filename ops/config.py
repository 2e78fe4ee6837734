"""The settings of the operator, their defaults and what each may be."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from dataclasses import dataclass
from typing import Any

SETTINGS = 2**16
"""How many settings each cache of them holds: a model that is calibrated may have one for each site."""


@dataclass(frozen=True)
class S2OConfig:
    """Settings of sparse attention.

    Every field but `error_budget` and `calibration`, which stand for thresholds, is also an argument of
    ``torch.ops.s2o.attention``.

    The defaults rank keys for tiles of 32 positions by the largest probability that any single query of any
    head of the KV group gives them. `S2OConfig.paper` is the published method.

    Attributes:
        threshold: The share of a query's softmax mass from which a key is sure to be visited; what becomes of
            the others, `tail` says. 0 visits every key and equals dense attention to rounding.
        min_length: Calls with fewer keys run dense. None chooses by device (`ops.choice`), 0 forces the sparse path.
        segment: Consecutive query positions that share one ranking; a power of two from 16 to 1024.
        tile: Query positions that one program handles, and that stop together; a power of two, at least 16, at
            most `segment`.
        pool: Consecutive queries averaged into one guide; a power of two, at most `segment`. 1 scores every query.
        guides: "head" for guides of each query head, "group" for guides averaged over the heads of a KV group.
        channels: Keys are scored in so many directions of the head dimension, those that carry most of the products of
            this call's queries and keys (`ops.projection`); None for all channels, as more than there are stand for.
            Where these directions miss some of the products more keys are visited; KV groups of which they miss much
            are scored in all channels.
        lists: "group" for one list of keys per KV group, "head" for one per query head.
        measure: What importance measures: "mass", the share of a query's softmax mass that a key holds; or "output",
            that share times how far the key's value lies from the group's outputs, in units of these
            (`ops.contribution`), so that equal thresholds mean errors of like size in layers of unlike values.
        max_weight: Weight of the largest probability that a guide gives a key, in the key's importance.
        mean_weight: Weight of the mean probability over all guides of a list; importance is the larger term.
        sample: A guide's log-sum-exp is estimated from its dense span and every `sample`-th key of the history;
            1 is exact.
        stop: "importance" decides key by key, comparing its importance with `threshold`. "gain" (the paper's
            rule) sorts the whole history by importance and ends a tile's walk after the first `chunk` of keys in
            which no row gains `threshold` of its softmax mass.
        tail: What becomes of keys below the threshold. "sampled" visits each with probability importance /
            `threshold` and weighs it by the inverse, which leaves softmax sums unbiased (`ops.sampling`).
            "means" lets those of each block of 64 enter as one key, the block's mean key and value, weighted by
            how many they are. "none" leaves them out, as the "gain" rule always does.
        chunk: Keys between two checks of the "gain" rule; a multiple of 64.
        first_keys: Keys at the start that are always visited.
        near_keys: Keys before each segment that are attended densely (rounded up to a multiple of 64).
        last_queries: The last queries of a call, attended densely (rounded up to whole segments).
        workspace: Bytes that lists of keys, and the importances they are made from, may take together on a GPU, and
            scores of keys on a CPU, where what exceeds its caches is not used. A call that needs more works through its
            segments in runs, at least one segment each. At 131,072 positions of 32 heads over 8, 2**33 is up to 5%
            faster than the default on a GPU. Where memory does not suffice, a call takes an eighth, again and again.
        error_budget: The relative squared error that a call of attention may have,
            `sum |o - o_dense|^2 / sum |o_dense|^2` over all its queries, heads and sequences, against dense attention.
            Above 0 and below 1; it decides `threshold`, which is then the budget itself, and `measure`, which is then
            "output". That is a rule of thumb, not a bound: the error stayed below the threshold in all layers of real
            models that were measured, far below it in most, and rose to 2.6 times it on made-up inputs of 131,072
            positions (docs/results/calibration.md).
            ``s2o_compile.calibrate`` measures instead.
        calibration: The path of a file by ``s2o_compile.calibrate``: each attention site gets the threshold that kept
            the file's error budget, and the settings with which it did.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has a value that is not allowed.
    """

    threshold: float = 8e-3
    min_length: int | None = None
    segment: int = 32
    tile: int = 32
    pool: int = 1
    guides: str = "head"
    channels: int | None = 64
    lists: str = "group"
    measure: str = "mass"
    max_weight: float = 1.0
    mean_weight: float = 0.0
    sample: int = 16
    stop: str = "importance"
    tail: str = "sampled"
    chunk: int = 512
    first_keys: int = 1
    near_keys: int = 64
    last_queries: int = 0
    workspace: int = 2**30
    error_budget: float | None = None
    calibration: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name))
        _check(self, "threshold", 0 <= self.threshold < 1, "a number from 0 to below 1")
        _check(self, "min_length", self.min_length is None or self.min_length >= 0, "None or at least 0")
        _check(self, "segment", _is_power_of_two(self.segment, 16, 1024), "a power of two from 16 to 1024")
        _check(
            self,
            "tile",
            _is_power_of_two(self.tile, 16, self.segment),
            f"a power of two from 16 to segment ({self.segment})",
        )
        _check(
            self,
            "pool",
            _is_power_of_two(self.pool, 1, self.segment),
            f"a power of two up to segment ({self.segment})",
        )
        _check(self, "channels", self.channels is None or self.channels >= 1, "None or at least 1")
        _check(self, "channels", self.channels is None or self.stop != "gain", "None when stop is 'gain'")
        for name, choices in _CHOICES.items():
            _check(self, name, getattr(self, name) in choices, " or ".join(map(repr, choices)))
        _check(self, "lists", self.lists == "group" or self.guides == "head", "'group' when guides is 'group'")
        _check(self, "lists", self.lists == "head" or self.stop != "gain", "'head' when stop is 'gain'")
        _check(self, "measure", self.measure == "mass" or self.stop != "gain", "'mass' when stop is 'gain'")
        _check(self, "tail", self.tail == "none" or self.stop != "gain", "'none' when stop is 'gain'")
        for name in ("max_weight", "mean_weight"):
            value = getattr(self, name)
            _check(self, name, 0 <= value < math.inf, "a finite number, at least 0")
        _check(self, "max_weight", self.max_weight > 0 or self.mean_weight > 0, "above 0 when mean_weight is 0")
        _check(self, "sample", self.sample >= 1, "at least 1")
        _check(self, "chunk", self.chunk >= 64 and self.chunk % 64 == 0, "a positive multiple of 64")
        for name in ("first_keys", "near_keys", "last_queries"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        _check(self, "workspace", self.workspace >= 1, "at least 1")
        self._check_budget()

    def _check_budget(self) -> None:
        """Only one field may decide the threshold, and a budget only under the ranking that it was measured with."""
        if self.error_budget is None and self.calibration is None:
            return
        _check(self, "error_budget", self.error_budget is None or 0 < self.error_budget < 1, "None or between 0 and 1")
        _check(self, "error_budget", self.error_budget is None or self.calibration is None, "None beside a calibration")
        decides = "calibration" if self.error_budget is None else "error_budget"
        is_default = {field.name: getattr(self, field.name) == field.default for field in dataclasses.fields(self)}
        _check(self, "threshold", is_default["threshold"], f"left out where {decides} decides it")
        if self.error_budget is not None:
            for name in _RANKING:
                _check(self, name, is_default[name], "left out beside an error_budget without calibration")

    @classmethod
    def paper(cls, threshold: float = 1e-3, **changes: Any) -> S2OConfig:
        """The setting of S2O as published (arXiv 2602.22575, without its ordering of queries inside a segment).

        One list per head and segment of 512 positions, ranked by the segment's mean query; dense attention
        inside the segment; blocks of sorted keys until the gain in softmax mass falls below `threshold`.

        Args:
            threshold: The least relative gain in softmax mass that keeps a tile going.
            **changes: Other fields to set.
        """
        published: dict[str, Any] = {
            "segment": 512, "tile": 128, "pool": 512, "channels": None, "lists": "head", "sample": 1, "stop": "gain",
            "chunk": 128, "tail": "none", "first_keys": 0, "near_keys": 0, "last_queries": 0,
        }  # fmt: skip
        return cls(threshold=threshold, **(published | changes))

    @classmethod
    def of(cls, config: S2OConfig | None) -> S2OConfig:
        """The settings given as an argument, by default ``S2OConfig()``.

        Raises:
            TypeError: `config` is something else, such as a dictionary of options.
        """
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"config must be an S2OConfig or None, not {config!r}")
        return config or cls()

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> S2OConfig:
        """Build a configuration from option names and values, as given to ``torch.compile``.

        Raises:
            ValueError: A name is not a field; the message lists those that are.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"unknown option {name!r}; the options of s2o are {', '.join(names)}")
        return cls(**options)

    def without_ranking(self) -> S2OConfig:
        """The same, but that all queries attend all keys, one by one."""
        return replaced(self, last_queries=_EVERY_QUERY, stop="importance", tail="none")

    @property
    def has_means(self) -> bool:
        """Whether block means stand for keys that are not listed."""
        return self.tail == "means" and self.threshold > 0

    @property
    def has_samples(self) -> bool:
        """Whether keys below the threshold are sampled."""
        return self.tail == "sampled" and self.threshold > 0

    def bounds_weights(self, size: int) -> bool:
        """Whether sampled keys of `size` channels are kept from weighing too much: where they may be misjudged far."""
        scored = size if self.channels is None else self.channels
        return self.has_samples and (self.pool > 1 or self.guides == "group" or 2 * scored < size)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``torch.ops.s2o.attention``: the fields, with those that `error_budget` decides.

        Raises:
            ValueError: There is a `calibration`, whose thresholds belong to the attention sites of a model.
        """
        _check(self, "calibration", self.calibration is None, "None where no attention site of a model is known")
        found = {field.name: getattr(self, field.name) for field in operator_fields()}
        return found if self.error_budget is None else found | {"threshold": self.error_budget, "measure": "output"}

    @functools.cached_property
    def as_json(self) -> str:
        """The `arguments` as one text, in which form the implementations take them."""
        return json.dumps(self.arguments())

    @classmethod
    @functools.lru_cache(maxsize=SETTINGS)
    def from_json(cls, text: str) -> S2OConfig:
        """The configuration that a text of `as_json` stands for, built once."""
        return cls(**json.loads(text))


@functools.lru_cache(maxsize=SETTINGS)
def replaced(config: S2OConfig, **changes: Any) -> S2OConfig:
    """``dataclasses.replace``, once for each setting."""
    return dataclasses.replace(config, **changes)


def operator_fields() -> list[dataclasses.Field[Any]]:
    """The fields of `S2OConfig` that are arguments of ``torch.ops.s2o.attention``."""
    return [field for field in dataclasses.fields(S2OConfig) if field.name not in ("error_budget", "calibration")]


_EVERY_QUERY = 2**62
"""As `last_queries`: no query is ranked for."""

_CHOICES = {
    "guides": ("head", "group"),
    "lists": ("group", "head"),
    "measure": ("mass", "output"),
    "stop": ("importance", "gain"),
    "tail": ("sampled", "means", "none"),
}
_RANKING = ("pool", "guides", "channels", "measure", "max_weight", "stop", "tail")
_OPTIONAL = {"min_length", "channels", "error_budget", "calibration"}
_NUMBERS = {"threshold", "max_weight", "mean_weight", "error_budget"}


def _check_type(name: str, value: object) -> None:
    if name in _CHOICES:
        right, wanted = isinstance(value, str), "a string"
    elif name == "calibration":
        right, wanted = isinstance(value, (str, os.PathLike)), "a path"
    elif name in _NUMBERS:
        right, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        right, wanted = isinstance(value, int) and not isinstance(value, bool), "an integer"
    if name in _OPTIONAL:
        right, wanted = right or value is None, f"{wanted} or None"
    if not right:
        raise TypeError(f"{name} must be {wanted}, not {value!r}")


def _check(config: S2OConfig, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, not {getattr(config, name)!r}")


def _is_power_of_two(value: int, least: int, most: int) -> bool:
    return least <= value <= most and value & (value - 1) == 0
