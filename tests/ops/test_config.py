"""Settings: what they may be, presets, the names of earlier releases, and texts that stand for them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given

from s2o_compile.ops import Ranking, S2OConfig, config

from .settings import config_of
from .strategies import configs

OLD_NAMES = [
    (
        "pool",
        4,
        "pool is now a field of Ranking: S2OConfig(ranking=Ranking(pool=4)), or options={'ranking': {'pool': 4}}",
    ),
    ("segment", 64, "segment is now a field of Ranking: S2OConfig(ranking=Ranking(segment=64)), or options="),
    ("channels", None, "channels is now a field of Ranking: S2OConfig(ranking=Ranking(channels=None)), or options="),
    ("lists", "group", "lists is now a field of Ranking: S2OConfig(ranking=Ranking(lists='kv_head')), or options="),
    ("guides", "group", "guides is now a field of Ranking: S2OConfig(ranking=Ranking(guides='kv_head')), or options="),
    ("measure", "mass", "measure is now a field of Ranking: S2OConfig(ranking=Ranking(measure='mass')), or options="),
    ("sample", 1, "sample is now a field of Ranking: S2OConfig(ranking=Ranking(sample=1)), or options="),
    ("near_keys", 0, "near_keys is now a field of Ranking: S2OConfig(ranking=Ranking(near_keys=0)), or options="),
    ("tile", 16, "tile was removed: it follows segment"),
    ("max_weight", 0.0, "max_weight was removed: say combine='max' or combine='mean'"),
    ("mean_weight", 1.0, "mean_weight was removed: say combine='max' or combine='mean'"),
    ("stop", "gain", "stop was removed: S2OConfig.paper() stops by gain"),
    ("tail", "none", "tail is now the rule of Ranking ('sampled', 'means', or 'dropped' for 'none')"),
    ("chunk", 64, "chunk was removed: only the paper's rule had a use for it"),
    ("first_keys", 0, "first_keys was removed: the first key is always visited"),
    ("workspace", 2**33, "workspace belongs to the process now: set the environment variable S2O_WORKSPACE"),
]


@pytest.mark.parametrize("name, value, sentence", OLD_NAMES)
def test_old_names_say_the_new_ones(name: str, value: Any, sentence: str) -> None:
    for build in (lambda: S2OConfig(**{name: value}), lambda: S2OConfig.from_options({name: value})):
        with pytest.raises((TypeError, ValueError)) as raised:
            build()
        assert str(raised.value).startswith(sentence) and "\n" not in str(raised.value)


def test_the_public_fields() -> None:
    names = [field.name for field in dataclasses.fields(S2OConfig)]
    assert names == ["threshold", "min_length", "last_queries", "error_budget", "calibration", "ranking"]


def test_presets() -> None:
    assert S2OConfig.accurate() == S2OConfig()
    packed = Ranking(rule="dropped", pool=8, guides="kv_head", channels=None, combine="mean")
    assert S2OConfig.fast() == S2OConfig(threshold=2e-5, ranking=packed)
    paper = S2OConfig.paper().ranking
    assert (paper.rule, paper.segment, paper.tile, paper.pool) == ("gain", 512, 128, 512)
    assert (paper.lists, paper.channels, paper.near_keys, paper.first_keys) == ("head", None, 0, 0)
    for preset in (S2OConfig.accurate, S2OConfig.fast, S2OConfig.paper):
        assert preset(threshold=0.5, min_length=0, last_queries=7) == dataclasses.replace(
            preset(), threshold=0.5, min_length=0, last_queries=7
        )
        assert preset(ranking=Ranking(pool=4)).ranking == Ranking(pool=4)
        assert preset(calibration="file").threshold == S2OConfig().threshold


@given(configs())
def test_texts_stand_for_settings(drawn: S2OConfig) -> None:
    assert S2OConfig.from_json(drawn.as_json) == drawn
    assert S2OConfig.from_arguments(**drawn.arguments()) == drawn
    assert S2OConfig.from_options(json.loads(json.dumps(drawn.to_dict()))) == drawn
    assert copy.deepcopy(drawn) == pickle.loads(pickle.dumps(drawn)) == drawn


def test_the_defaults_are_the_empty_text() -> None:
    assert Ranking().as_json == "" and Ranking.from_json("") == Ranking()
    assert json.loads(Ranking(pool=4, lists="head").as_json) == {"pool": 4, "lists": "head"}


def test_each_text_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: a calibrated model may have one for each of its sites."""
    texts = [Ranking(near_keys=100_000 + n).as_json for n in range(1000)]
    loads = Mock(side_effect=json.loads)
    monkeypatch.setattr(config, "json", Mock(loads=loads))
    query = torch.empty(1, 2, 20, 16, device="meta")
    for _ in range(2):
        for text in texts:
            torch.ops.s2o.attention(query, query, query, settings=text)
    assert [call.args[0] for call in loads.call_args_list] == texts


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"segment": 33}, "segment must be a power of two from 16 to 1024, not 33"),
        ({"pool": 64}, r"pool must be a power of two up to segment \(32\), not 64"),
        ({"channels": 0}, "channels must be None or at least 1, not 0"),
        ({"lists": "row"}, "lists must be 'kv_head' or 'head', not 'row'"),
        ({"lists": "head", "guides": "kv_head"}, "lists must be 'kv_head' when guides is 'kv_head', not 'head'"),
        ({"measure": "value"}, "measure must be 'mass' or 'output', not 'value'"),
        ({"combine": "sum"}, "combine must be 'max' or 'mean', not 'sum'"),
        ({"rule": "gain"}, "channels must be None when rule is 'gain', not 64"),
        ({"rule": "gain", "channels": None}, "lists must be 'head' when rule is 'gain', not 'kv_head'"),
        (
            {"rule": "gain", "channels": None, "lists": "head", "measure": "output"},
            "measure must be 'mass' when rule is 'gain', not 'output'",
        ),
        ({"sample": 0}, "sample must be at least 1, not 0"),
        ({"near_keys": -1}, "near_keys must be at least 0, not -1"),
        ({"last_queries": -1}, "last_queries must be at least 0, not -1"),
    ],
)
def test_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        config_of(**fields)


@pytest.mark.parametrize("change", [{"threshold": "0"}, {"segment": 32.0}, {"rule": 1}, {"pool": True}])
def test_bad_types_of_fields(change: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(change))} must be"):
        config_of(**change)
    with pytest.raises(TypeError, match=r"^ranking must be a Ranking, not \{'pool': 4\}$"):
        S2OConfig(ranking={"pool": 4})  # type: ignore[arg-type]


def test_unknown_options_list_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'treshold'.*threshold, min_length"):
        S2OConfig.from_options({"treshold": 1e-3})
    with pytest.raises(ValueError, match=r"unknown field 'pools'; the fields of Ranking are rule, pool"):
        S2OConfig.from_options({"ranking": {"pools": 4}})


def test_options_change_single_fields() -> None:
    given = S2OConfig(threshold=0.1, ranking=Ranking(pool=4, sample=1))
    assert given.with_options({"ranking": {"pool": 2}}) == S2OConfig(0.1, ranking=Ranking(pool=2, sample=1))
    assert given.with_options({"ranking": Ranking(pool=2)}) == S2OConfig(0.1, ranking=Ranking(pool=2))
