"""The settings of the operator, their defaults and what each may be."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .old_names import sentence_on_old_name

GAIN_CHUNK = 128
"""Keys between two checks of the "gain" rule; a multiple of 64."""

_LARGEST_TILE = 128
_LARGEST_RADIUS = 1_000_000
_EVERY_QUERY = 2**62
"""As `last_queries`: no query is ranked for."""


class _Settings:
    """Refuses names of settings that an earlier release had, before ``__init__`` calls them unexpected.

    The forms in which operators take settings are made with them: Dynamo cannot trace ``functools.cached_property``,
    which takes a lock before Python 3.12.
    """

    _as_text: str
    _arguments: dict[str, Any]

    def __new__(cls, *_: Any, **fields: Any) -> Any:
        sentence = sentence_on_old_name(fields, _names(cls))
        if sentence is not None:
            raise TypeError(sentence)
        return super().__new__(cls)


_AnySettings = TypeVar("_AnySettings", bound="S2OConfig | Ranking")


@dataclass(frozen=True)
class Ranking(_Settings):
    """How keys are ranked, and what becomes of those that do not matter. Advanced: it may change between releases.

    The defaults rank keys for segments of 32 positions by the largest probability that any query of any head of the KV
    head gives them, alike queries being asked as one, and sample the keys below the threshold.

    Attributes:
        rule: What becomes of keys whose importance is below the threshold. "sampled" visits each with probability
            importance / threshold and weighs it by the inverse, which leaves softmax sums unbiased
            (`ops.rule.sampling`). "dropped" leaves them out. "means" lets those of each block of 64 enter as one key,
            the block's mean key and value, weighted by how many they are. "gain" (the paper's rule) compares no
            importance with the threshold: it sorts the whole history by importance, and stops after the first 128
            keys in which no query of a tile gains the threshold's share of its softmax mass; it needs lists="head",
            channels=None and measure="mass".
        pool: Consecutive queries averaged into one guide; a power of two, at most `segment`. 1 averages none.
        radius: How far, in logits, a query may lie from the others that score keys together with it: among 32 positions
            of a head, queries are merged whose logits differ by a standard deviation over keys of about this much, and
            what they differ by is added to the merged query's logits, so that keys that only one of them wants are
            visited too. 0 scores every query. Guides that are averaged anyway (`pool` above 1, `guides`
            "kv_head", `combine` "mean") are not merged, nor are queries where a window, documents or a mask let
            neighbours see different keys.
        merge_length: The keys of a call from which on queries are merged: with fewer that takes as long as it saves.
            Where lengths are not known, as in packages of ``s2o_compile.export``, queries are merged at any.
        guides: "head" for guides of each query head, "kv_head" for guides averaged over the query heads of a KV head.
        channels: How many directions of the head dimension keys are scored in: those that carry most of the products
            of this call's queries and keys (`ops.rule.channels`); None, or as many as there are, for all channels.
            Where these directions miss some of the products more keys are visited; KV heads for which they miss much
            are scored in all channels. On GPUs of compute capability 9.0 guides that are merged queries are scored in
            two channels fewer, which hold their log-sum-exps.
        lists: "kv_head" for one list of keys per KV head, "head" for one per query head; "kv_head" where guides are
            averaged over heads.
        measure: What importance measures: "mass", the share of a query's softmax mass that a key holds; or "output",
            that share times how far the key's value lies from the outputs of the KV head's queries, in units of these
            (`ops.rule.output_weighting`), so that one threshold gives similar error across layers.
        combine: Importance over the guides of a list: "max", the largest probability that a guide gives a key, or
            "mean", the mean probability.
        sample: A guide's log-sum-exp is estimated from its dense span and every `sample`-th key of the history;
            1 is exact.
        segment: Consecutive query positions that share one ranking; a power of two from 16 to 1024.
        near_keys: Keys before each segment that are attended densely (rounded up to a multiple of 64).

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has a value that is not allowed.
    """

    rule: str = "sampled"
    pool: int = 1
    radius: float = 1.75
    merge_length: int = 16384
    guides: str = "head"
    channels: int | None = 64
    lists: str = "kv_head"
    measure: str = "mass"
    combine: str = "max"
    sample: int = 16
    segment: int = 32
    near_keys: int = 64

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, "segment", _is_power_of_two(self.segment, 16, 1024), "a power of two from 16 to 1024")
        _check(self, "merge_length", self.merge_length >= 0, "at least 0")
        _check(self, "radius", 0 <= self.radius <= _LARGEST_RADIUS, f"a number from 0 to {_LARGEST_RADIUS:,}")
        up_to_segment = f"a power of two up to segment ({self.segment})"
        _check(self, "pool", _is_power_of_two(self.pool, 1, self.segment), up_to_segment)
        _check(self, "channels", self.channels is None or self.channels >= 1, "None or at least 1")
        for name, choices in _CHOICES.items():
            _check(self, name, getattr(self, name) in choices, " or ".join(map(repr, choices)))
        _check(self, "lists", self.lists == "kv_head" or self.guides == "head", "'kv_head' when guides is 'kv_head'")
        _check(self, "sample", self.sample >= 1, "at least 1")
        _check(self, "near_keys", self.near_keys >= 0, "at least 0")
        if self.rule == "gain":
            _check(self, "channels", self.channels is None, "None when rule is 'gain'")
            _check(self, "lists", self.lists == "head", "'head' when rule is 'gain'")
            _check(self, "measure", self.measure == "mass", "'mass' when rule is 'gain'")
        changed = {name: getattr(self, name) for name in _names(Ranking) if not _is_default(self, name)}
        object.__setattr__(self, "_as_text", json.dumps(changed) if changed else "")

    @property
    def tile(self) -> int:
        """Query positions that one program handles, and that stop together under the "gain" rule."""
        return min(self.segment, _LARGEST_TILE)

    @property
    def merges(self) -> bool:
        """Whether alike queries are merged, in calls of `merge_length` keys or more."""
        return self.radius > 0 and self.pool == 1 and self.guides == "head" and self.combine == "max"

    @property
    def first_keys(self) -> int:
        """How many keys at the start are always visited: one, usually an attention sink; the paper keeps none."""
        return 0 if self.rule == "gain" else 1

    @property
    def as_json(self) -> str:
        """The fields that are not at their defaults, as the operator's `settings`; "" where all are."""
        return self._as_text

    @classmethod
    @functools.cache
    def from_json(cls, text: str) -> Ranking:
        """The ranking that a text of `as_json` stands for, read once.

        Raises:
            TypeError: A field has the wrong type.
            ValueError: The text is no JSON object, or a field is unknown or has a value that is not allowed.
        """
        try:
            fields = json.loads(text or "{}")
        except (TypeError, ValueError):
            fields = None
        if not isinstance(fields, dict):
            raise ValueError(f"settings must be '' or a JSON object of fields of Ranking, not {text!r}")
        return _changed(cls(), fields, "field", "Ranking")


@dataclass(frozen=True)
class S2OConfig(_Settings):
    """Settings of sparse attention.

    Attributes:
        threshold: The share of a query's softmax mass from which a key is sure to be visited; what becomes of
            the others, `Ranking.rule` says. 0 visits every key and equals dense attention to rounding.
        min_length: Calls with fewer keys run dense; 0 forces the sparse path. None chooses by the work of a call and by
            the keys that its queries see, by limits that are shipped for each kind of device, or that ``s2o tune``
            measured on it.
        last_queries: The last queries of a call, attended densely (rounded up to whole segments).
        error_budget: The relative squared error that a call of attention may have,
            `sum |o - o_dense|^2 / sum |o_dense|^2` over all its queries, heads and sequences, against dense attention.
            Above 0 and below 1; it decides `threshold`, which is then the budget itself, and `Ranking.measure`, which
            is then "output". That is a rule of thumb, not a bound: the error stayed below the threshold in all layers
            of real models that were measured, far below it in most, and rose to 2.6 times it on made-up inputs of
            131,072 positions (docs/results/calibration.md). ``s2o_compile.calibrate`` measures instead.
        calibration: The path of a file by ``s2o_compile.calibrate``: each attention site gets the threshold that kept
            the file's error budget, and the settings with which it did.
        ranking: How keys are ranked; it may change between releases.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has a value that is not allowed.
    """

    threshold: float = 8e-3
    min_length: int | None = None
    last_queries: int = 0
    error_budget: float | None = None
    calibration: str | os.PathLike[str] | None = None
    ranking: Ranking = dataclasses.field(default_factory=Ranking)

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, "threshold", 0 <= self.threshold < 1, "a number from 0 to below 1")
        _check(self, "min_length", self.min_length is None or self.min_length >= 0, "None or at least 0")
        _check(self, "last_queries", self.last_queries >= 0, "at least 0")
        self._check_budget()
        if self.calibration is None:
            config = self.resolved()
            arguments = {
                "threshold": config.threshold,
                "min_length": config.min_length,
                "last_queries": config.last_queries,
                "settings": config.ranking.as_json,
            }
            object.__setattr__(self, "_arguments", arguments)
            object.__setattr__(self, "_as_text", json.dumps(arguments))

    def _check_budget(self) -> None:
        """Only one field may decide the threshold, and a budget only under the ranking that it was measured with."""
        if self.error_budget is None and self.calibration is None:
            return
        _check(self, "error_budget", self.error_budget is None or 0 < self.error_budget < 1, "None or between 0 and 1")
        _check(self, "error_budget", self.error_budget is None or self.calibration is None, "None beside a calibration")
        decides = "calibration" if self.error_budget is None else "error_budget"
        _check(self, "threshold", _is_default(self, "threshold"), f"left out where {decides} decides it")
        if self.error_budget is not None:
            for name in _MEASURED:
                is_default = _is_default(self.ranking, name)
                _check(self.ranking, name, is_default, "left out beside an error_budget without calibration")

    @classmethod
    def accurate(cls, **changes: Any) -> S2OConfig:
        """The default: keeps lookups, and the perplexity within 1% of dense attention's.

        Args:
            **changes: Other fields to set.
        """
        return cls(**changes)

    @classmethod
    def fast(cls, **changes: Any) -> S2OConfig:
        """The fastest setting, which loses lookups: of 32 values hidden in 32,768 tokens of prose and code, asked for
        at 60% of the text and at its end, it finds 14 and 4 where dense attention finds 29 and 24.

        Keys are ranked by their mean probability under four guides a segment, each the mean of 8 queries of all heads
        of a KV head (packed guides), in all channels; those below the threshold, by default 2e-5, are left out.

        Args:
            **changes: Other fields to set.
        """
        ranking = Ranking(rule="dropped", pool=8, guides="kv_head", channels=None, combine="mean")
        return cls._preset(2e-5, ranking, changes)

    @classmethod
    def paper(cls, **changes: Any) -> S2OConfig:
        """S2O as published (arXiv 2602.22575), without its ordering of queries inside a segment.

        One list per head and segment of 512 positions, ranked by the segment's mean query; dense attention
        inside the segment; blocks of sorted keys until the gain in softmax mass falls below the threshold, by default
        1e-3.

        Args:
            **changes: Other fields to set.
        """
        ranking = Ranking(rule="gain", pool=512, channels=None, lists="head", sample=1, segment=512, near_keys=0)
        return cls._preset(1e-3, ranking, changes)

    @classmethod
    def _preset(cls, threshold: float, ranking: Ranking, changes: dict[str, Any]) -> S2OConfig:
        decided = {} if "calibration" in changes else {"threshold": threshold}
        return cls(**{**decided, "ranking": ranking, **changes})

    @classmethod
    def of(cls, config: S2OConfig | None) -> S2OConfig:
        """The settings given as an argument, by default ``S2OConfig()``.

        Raises:
            TypeError: `config` is something else, such as a dictionary of options.
        """
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"config must be an S2OConfig or None, not {config!r}")
        return config or _DEFAULT

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> S2OConfig:
        """Build a configuration from option names and values, as given to ``torch.compile``.

        Raises:
            TypeError: A field has the wrong type.
            ValueError: A name is not a field, and the message lists those that are; or a value is not allowed.
        """
        return cls().with_options(options)

    def with_options(self, options: Mapping[str, Any]) -> S2OConfig:
        """This configuration with other values; `ranking` may be a mapping of the fields that change in it.

        Raises:
            TypeError: A field has the wrong type.
            ValueError: A name is not a field, and the message lists those that are; or a value is not allowed.
        """
        ranking = options.get("ranking")
        if isinstance(ranking, Mapping):
            options = {**options, "ranking": _changed(self.ranking, ranking, "field", "Ranking")}
        return _changed(self, options, "option", "s2o")

    def with_ranking(self, **changes: Any) -> S2OConfig:
        """This configuration with other fields of its ranking."""
        return replaced(self, ranking=replaced(self.ranking, **changes))

    def without_ranking(self) -> S2OConfig:
        """This configuration, but that all queries attend all keys, one by one."""
        return replaced(self.with_ranking(rule="dropped"), last_queries=_EVERY_QUERY)

    @property
    def has_means(self) -> bool:
        """Whether block means stand for keys that are not listed."""
        return self.ranking.rule == "means" and self.threshold > 0

    @property
    def has_samples(self) -> bool:
        """Whether keys below the threshold are sampled."""
        return self.ranking.rule == "sampled" and self.threshold > 0

    def bounds_weights(self, size: int) -> bool:
        """Whether sampled keys of `size` channels are kept from weighing too much: where they may be misjudged far."""
        ranking = self.ranking
        scored = size if ranking.channels is None else ranking.channels
        return self.has_samples and (ranking.pool > 1 or ranking.guides == "kv_head" or 2 * scored < size)

    def resolved(self) -> S2OConfig:
        """This configuration with the threshold and the measure that an `error_budget` stands for.

        Raises:
            ValueError: There is a `calibration`, whose thresholds belong to the attention sites of a model.
        """
        self._check_calibration()
        if self.error_budget is None:
            return self
        changed = dataclasses.replace(self, error_budget=None, threshold=self.error_budget)
        return changed.with_ranking(measure="output")

    def _check_calibration(self) -> None:
        if self.calibration is not None:
            _check(self, "calibration", False, "None where no attention site of a model is known")

    def to_dict(self) -> dict[str, Any]:
        """The fields of the `resolved` configuration, in types that JSON has and `from_options` takes.

        Raises:
            ValueError: There is a `calibration`, whose thresholds belong to the attention sites of a model.
        """
        found = dataclasses.asdict(self.resolved())
        return {name: value for name, value in found.items() if name not in ("error_budget", "calibration")}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``torch.ops.s2o.attention`` that these settings are.

        Raises:
            ValueError: There is a `calibration`, whose thresholds belong to the attention sites of a model.
        """
        self._check_calibration()
        return dict(self._arguments)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of `arguments`, in the order of the schema.

        Raises:
            ValueError: There is a `calibration`, whose thresholds belong to the attention sites of a model.
        """
        return tuple(self.arguments().values())

    @classmethod
    @functools.cache
    def from_arguments(
        cls, threshold: float = 8e-3, min_length: int | None = None, last_queries: int = 0, settings: str = ""
    ) -> S2OConfig:
        """The configuration that `arguments` of the operator stand for, checked once.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument has a value that is not allowed.
        """
        return cls(threshold, min_length, last_queries, ranking=Ranking.from_json(settings))

    @property
    def as_json(self) -> str:
        """The `arguments` as one text, in which form the implementations take them.

        Raises:
            ValueError: There is a `calibration`, whose thresholds belong to the attention sites of a model.
        """
        self._check_calibration()
        return self._as_text

    @classmethod
    @functools.cache
    def from_json(cls, text: str) -> S2OConfig:
        """The configuration that a text of `as_json` stands for, read once."""
        return cls.from_arguments(**json.loads(text))


@functools.cache
def replaced(settings: _AnySettings, **changes: Any) -> _AnySettings:
    """``dataclasses.replace``, once for each setting: its checks take longer than the launch of a kernel."""
    return dataclasses.replace(settings, **changes)


_CHOICES = {
    "rule": ("sampled", "dropped", "means", "gain"),
    "guides": ("head", "kv_head"),
    "lists": ("kv_head", "head"),
    "measure": ("mass", "output"),
    "combine": ("max", "mean"),
}
_MEASURED = ("pool", "radius", "guides", "channels", "measure", "combine", "rule")
"""The fields of `Ranking` at whose defaults an error budget was measured."""
_OPTIONAL = {"min_length", "channels", "error_budget", "calibration"}
_NUMBERS = {"threshold", "error_budget", "radius"}


def _names(settings: Any) -> tuple[str, ...]:
    return tuple(settings.__dataclass_fields__)


def _is_default(settings: S2OConfig | Ranking, name: str) -> bool:
    return bool(getattr(settings, name) == settings.__dataclass_fields__[name].default)


def _changed(settings: _AnySettings, changes: Mapping[str, Any], kind: str, owner: str) -> _AnySettings:
    """Settings with other values.

    Raises:
        ValueError: A name is not a field; the message says what to use in place of an old one, or lists all fields.
    """
    names = _names(settings)
    sentence = sentence_on_old_name(changes, names)
    if sentence is not None:
        raise ValueError(sentence)
    for name in changes:
        if name not in names:
            raise ValueError(f"unknown {kind} {name!r}; the {kind}s of {owner} are {', '.join(names)}")
    return dataclasses.replace(settings, **changes)


def _check_types(settings: S2OConfig | Ranking) -> None:
    for name in _names(settings):
        _check_type(name, getattr(settings, name))


def _check_type(name: str, value: object) -> None:
    if name in _CHOICES:
        right, wanted = isinstance(value, str), "a string"
    elif name == "calibration":
        right, wanted = isinstance(value, (str, os.PathLike)), "a path"
    elif name == "ranking":
        right, wanted = isinstance(value, Ranking), "a Ranking"
    elif name in _NUMBERS:
        right, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        right, wanted = isinstance(value, int) and not isinstance(value, bool), "an integer"
    if name in _OPTIONAL:
        right, wanted = right or value is None, f"{wanted} or None"
    if not right:
        raise TypeError(f"{name} must be {wanted}, not {value!r}")


def _check(settings: S2OConfig | Ranking, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, not {getattr(settings, name)!r}")


def _is_power_of_two(value: int, least: int, most: int) -> bool:
    return least <= value <= most and value & (value - 1) == 0


_DEFAULT = S2OConfig()
