"""The benchmark of speed: its inputs have the density asked for, and every contender has a whole row or a reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.density import find, sampled_density
from benchmarks.inputs import LIKENESS, SHARPNESS, TOPIC, Structure
from benchmarks.speed.__main__ import choose, read_setting
from benchmarks.speed.contenders import DENSE, PRESETS
from benchmarks.speed.measure import Case, Row, diffuseness, measure, parts, relative_error
from benchmarks.speed.report import COLUMNS, as_dict, save_plot, table
from s2o_compile._attention import attention
from s2o_compile._console import UsageError
from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.ops.density import density
from s2o_compile.timing import kernel_seconds, median_and_spread

CPU = torch.device("cpu")


def whole_density(structure: Structure, diffuse: float, is_causal: bool, config: S2OConfig) -> float:
    tensors = structure.query(diffuse), structure.key, structure.value
    result = attention(*tensors, is_causal, config=config, return_stats=True)
    length = structure.length
    return float(density(result.visited, length, length, is_causal, 0, config.ranking.tile).mean())


@pytest.mark.parametrize(
    ("setting", "wanted", "is_causal"),
    [
        ("default", 0.15, True),
        ("default", 0.25, False),
        ("pool 4", 0.2, True),
        ("pool=8 guides=kv_head combine=mean rule=means threshold=2e-4", 0.2, True),
    ],
)
def test_inputs_have_the_density_asked_for(setting: str, wanted: float, is_causal: bool) -> None:
    structure, config = Structure.draw(3000, 4, 2, 32), read_setting(setting)
    diffuse = diffuseness(structure, config, is_causal, wanted)
    assert whole_density(structure, diffuse, is_causal, config) == pytest.approx(wanted, rel=0.2)


def test_queries_are_as_sharp_and_as_alike_as_said() -> None:
    structure = Structure.draw(2048, 4, 2, 64)
    for diffuse, end in ((0, 0), (1, 1)):
        query = structure.query(diffuse)
        logits = query[:, ::2] @ structure.key.mT / 8
        assert logits.std() == pytest.approx(SHARPNESS[end], rel=0.05)
        one, other = query[0, 0], query[0, 1].roll(1, 0)
        alike = torch.cosine_similarity(one, other, dim=-1)[torch.arange(2048) % TOPIC > 0].mean()
        assert float(alike) == pytest.approx(LIKENESS[end], abs=0.05)


def test_some_rows_are_rows_of_the_whole() -> None:
    structure = Structure.draw(700, 6, 3, 16)
    whole = structure.query(0.4)
    assert whole.shape == (1, 6, 700, 16)
    assert torch.equal(structure.query(0.4, slice(200, 600)), whole[:, :, 200:600])


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_sample_of_a_short_call_is_all_of_it(is_causal: bool) -> None:
    structure, config = Structure.draw(900, 2, 1, 32), S2OConfig(min_length=0)
    query = structure.query(0.5)
    sampled = sampled_density(lambda rows: query[:, :, rows], structure.key, structure.value, is_causal, config)
    # Rounding that depends on the shape moves a key at the edge of its list, and with it a block of a tile.
    assert sampled == pytest.approx(whole_density(structure, 0.5, is_causal, config), rel=0.02)


@given(st.floats(0.1, 0.9), st.floats(1, 3))
def test_find_inverts_what_grows(wanted: float, power: float) -> None:
    assert find(lambda x: x**power, wanted, 0, 1) ** power == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(("wanted", "end"), [(1e-3, 0), (10.0, 1)])
def test_find_ends_where_the_wanted_is_out_of_reach(wanted: float, end: float) -> None:
    assert find(lambda x: 1 + x, wanted, 0, 1) == pytest.approx(end, abs=1e-3)


def case(length: int = 300, **changes: object) -> Case:
    settings = {"default": S2OConfig(min_length=0), "pool=4": S2OConfig(min_length=0, ranking=Ranking(pool=4))}
    plain = Case("smollm2", length, 0.5, settings, ("flash", "cudnn"), 1000, CPU, torch.float32)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_rows_are_whole_or_say_why() -> None:
    steps: list[str] = []
    flash, cudnn, *sparse = measure(case(), 3, steps.append)
    assert [row.name for row in (flash, cudnn, *sparse)] == ["flash", "cudnn", "s2o, default", "s2o, pool=4"]
    assert cudnn.reason and cudnn.milliseconds is None
    for row in (flash, *sparse):
        assert row.milliseconds and row.spread is not None and row.tflops and not row.reason
        assert row.ratio == pytest.approx((flash.milliseconds or 0) / row.milliseconds)
    assert flash.error is not None and flash.error < 1e-10 and flash.density == 1
    for row in sparse:
        assert row.asked == 0.5 and row.density and 0.3 < row.density < 1.2
        assert row.error is not None and 1e-8 < row.error < 0.1
    assert steps


def test_dense_attention_is_left_out_where_it_takes_too_long() -> None:
    flash, _, *sparse = measure(case(length=200, dense_up_to=100), 1, lambda step: None)
    assert flash.reason == "left out beyond 100 positions" and flash.milliseconds is None
    assert all(row.milliseconds and row.ratio is None for row in sparse)


def test_relative_error_is_that_of_the_output() -> None:
    structure = Structure.draw(200, 4, 2, 16)
    query = structure.query(0.5)
    exact = DENSE["flash"](True)(query, structure.key, structure.value)
    assert relative_error(query, structure, True, exact) < 1e-10
    assert relative_error(query, structure, True, 1.1 * exact) == pytest.approx(0.01, rel=1e-3)


def test_ranking_is_what_does_not_attend() -> None:
    from s2o_compile.ops.kernels.attend import attend_kernel
    from s2o_compile.ops.kernels.importance import importance_kernel

    names = [kernel.__name__ for kernel in (attend_kernel, importance_kernel)]
    assert parts({names[0]: 2.0, names[1]: 1.0, "void at::native::elementwise": 0.5}) == (1.5, 2.0)


@pytest.mark.gpu
def test_parts_of_a_call_on_a_gpu_add_up() -> None:
    structure = Structure.draw(4096, 4, 2, 64, "cuda", torch.bfloat16)
    tensors = structure.query(0.5), structure.key, structure.value
    kernels = kernel_seconds(lambda: attention(*tensors, True, config=S2OConfig(min_length=0)))
    ranking, attending = parts(kernels)
    assert ranking > 0 and attending > 0 and ranking + attending < 1


def test_the_spread_is_the_range() -> None:
    assert median_and_spread([1.0, 4.0, 2.0]) == (2.0, 1.5)


def row(name: str, length: int, milliseconds: float | None, **more: object) -> Row:
    return Row("smollm2", length, name, milliseconds, **more)  # type: ignore[arg-type]


def test_reports(tmp_path: Path) -> None:
    rows = [row("flash", 128, 2.0, ratio=1.0), row("flex", 128, None, reason="not here")]
    rows += [row("s2o, default", length, 1.0, asked=0.1, density=0.1) for length in (128, 256)]
    shown = table(case(), rows[:3])
    assert [str(column.header) for column in shown.columns] == ["attention", "ms", "x dense", "density"]
    assert shown.row_count == 3 and shown.caption == "flex: not here"
    assert {field for field, _ in COLUMNS.values()} < {field.name for field in dataclasses.fields(Row)}
    found = json.loads(json.dumps(as_dict(case(), rows, 5)))
    assert found["rows"] == [dataclasses.asdict(row) for row in rows]
    assert (
        found["settings"]["s2o"]["pool=4"]["ranking"]["pool"] == 4
        and found["settings"]["shapes"]["smollm2"]["channels"] == 64
    )
    save_plot(rows, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def asked(**options: list[str] | list[int] | list[float]) -> list[Case]:
    names = ("shapes", "lengths", "densities", "settings", "dense")
    return choose(*(options.get(name) for name in names), 10_000, CPU, torch.float32)  # type: ignore[arg-type]


def test_cases_are_shapes_by_lengths() -> None:
    cases = asked(shapes=["phi-3", "video-dit"], lengths=[100, 200], densities=[0.1, 0.2], dense=["none"])
    places = [(one.shape, one.length, one.density) for one in cases]
    assert places == [("phi-3", 100, 0.1), ("phi-3", 200, 0.2), ("video-dit", 100, 0.1), ("video-dit", 200, 0.2)]
    assert all(one.dense == () and list(one.settings) == list(PRESETS) for one in cases)
    assert all(config.min_length == 0 for config in cases[0].settings.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ["llama"]}, "--shape must be one of 'llama-3.1-8b', .*, not 'llama'"),
        ({"dense": ["cutlass"]}, "--dense must be one of 'cudnn', 'flash', 'flex', 'none', not 'cutlass'"),
        ({"lengths": [100], "densities": [0.1, 0.2]}, "--density must be given once, or once a length"),
        ({"densities": [1.5]}, r"between 0 and 1, not as \[1.5\]"),
        (
            {"settings": ["packd"]},
            "--s2o must be one of 'default', 'pool 2', 'pool 4', 'packed', or fields as NAME=VALUE, not 'packd'",
        ),
        ({"settings": ["pool=3"]}, r"pool must be a power of two up to segment \(32\), not 3"),
        ({"settings": ["pools=4"]}, "unknown option 'pools'"),
    ],
)
def test_what_cannot_be_used_is_named(options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        asked(**options)
