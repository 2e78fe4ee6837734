"""What the plugin for vLLM decides without vLLM: which requests of a batch run sparse, and with which settings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2o_compile import S2OConfig
from s2o_compile.integrations.vllm.runs import Layer, pages_in_window
from s2o_compile.integrations.vllm.settings import settings_of
from s2o_compile.ops.dispatch import choose_sparse
from s2o_compile.ops.requests import visibility_of

LONG = S2OConfig(min_length=100)


def layer(config: S2OConfig = LONG, window: int = -1) -> Layer:
    return Layer(4, 2, 32, (window, 0), torch.device("cpu"), torch.float32, config)


def test_neighbours_of_a_kind_are_one_run() -> None:
    queries, keys = [1, 1, 50, 60, 40, 1, 200], [500, 20, 150, 60, 100, 900, 200]
    runs = layer().runs(starts_of(queries), keys)
    assert [(run.requests, run.tokens, run.is_sparse) for run in runs] == [
        (slice(0, 2), slice(0, 2), False),
        (slice(2, 3), slice(2, 52), True),
        (slice(3, 4), slice(52, 112), False),
        (slice(4, 5), slice(112, 152), True),
        (slice(5, 6), slice(152, 153), False),
        (slice(6, 7), slice(153, 353), True),
    ]


def starts_of(queries: list[int]) -> list[int]:
    return [0, *torch.tensor(queries).cumsum(0).tolist()]


@given(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 200))))
def test_each_query_is_in_one_run(requests: list[tuple[int, int]]) -> None:
    queries, keys = [count for count, _ in requests], [count + past for count, past in requests]
    runs = layer().runs(starts_of(queries), keys)
    tokens = [token for run in runs for token in range(run.tokens.start, run.tokens.stop)]
    assert tokens == list(range(sum(queries)))
    assert all(one.is_sparse != other.is_sparse for one, other in itertools.pairwise(runs))
    for run in runs:
        kinds = {queries[n] > 32 and keys[n] >= 100 for n in range(*run.requests.indices(len(keys))) if queries[n]}
        assert kinds == {run.is_sparse}
        assert queries[run.requests.start] and queries[run.requests.stop - 1], "padding is at no end of a run"


def test_what_decodes_is_dense_at_any_length() -> None:
    assert not layer(S2OConfig(min_length=0)).is_sparse(1, 10**6)
    assert not layer(S2OConfig(min_length=0)).is_sparse(32, 10**6)
    assert layer(S2OConfig(min_length=0)).is_sparse(33, 33)


@pytest.mark.parametrize("window", [-1, 511])
@pytest.mark.parametrize("length", [512, 8192, 65536])
def test_the_choice_is_that_of_the_operator(length: int, window: int) -> None:
    config, key = S2OConfig(), (1, 2, length, 32)
    terms = visibility_of(length // 2, length, (window, 0))
    want = choose_sparse((1, 4, length // 2, 32), key, key, terms, torch.device("cpu"), torch.float32, config)
    assert layer(config, window).is_sparse(length // 2, length) == want


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 100)), min_size=1), st.integers(-1, 60))
def test_pages_before_a_window_are_not_read(requests: list[tuple[int, int]], left: int) -> None:
    size, queries = 16, torch.tensor([count for count, _ in requests])
    keys = queries + torch.tensor([past for _, past in requests])
    table = torch.arange(len(requests) * 10).view(-1, 10)
    seen, shown = pages_in_window(queries, keys, table, left, size)
    for number in range(len(requests)):
        end = int(keys[number])
        first = 0 if left < 0 else max(0, end - int(queries[number]) - left)
        want = [(int(table[number, place // size]), place % size) for place in range(first // size * size, end)]
        got = [(int(shown[number, place // size]), place % size) for place in range(int(seen[number]))]
        assert got == want


def test_settings_come_from_variables_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of({}) == settings_of(None) == S2OConfig()
    monkeypatch.setenv("S2O_THRESHOLD", "0.004")
    monkeypatch.setenv("S2O_MIN_LENGTH", "4096")
    assert settings_of({}) == S2OConfig(threshold=0.004, min_length=4096)
    assert settings_of({"s2o": {"threshold": 0.001}}) == S2OConfig(threshold=0.001, min_length=4096)
    assert settings_of({"s2o": {"ranking": {"channels": None}}}).ranking.channels is None


@pytest.mark.parametrize(
    ("variables", "config", "message"),
    [
        ({"S2O_THRESHOLD": "low"}, {}, "the environment variable S2O_THRESHOLD must be a number, not 'low'"),
        ({"S2O_MIN_LENGTH": "1.5"}, {}, "S2O_MIN_LENGTH must be a whole number, not '1.5'"),
        ({"S2O_THRESHOLD": "-1"}, {}, "threshold must be"),
        ({}, {"treshold": 0.1}, "unknown option 'treshold'"),
        ({}, {"calibration": "a.json"}, "calibration must be None in vLLM, not 'a.json'"),
    ],
)
def test_wrong_settings_are_named(
    variables: dict[str, str], config: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        settings_of({"s2o": config})
