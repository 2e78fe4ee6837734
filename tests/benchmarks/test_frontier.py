"""The frontier's judge, its counts of work, and its command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.baselines.group import by_head
from benchmarks.baselines.visit import Visit
from benchmarks.baselines.xattention import xattention
from benchmarks.captured import Layer, save_layer
from benchmarks.frontier import choose, main
from benchmarks.frontier_report import Point, work_at
from benchmarks.inputs import Structure
from benchmarks.judge import Judge, Score
from benchmarks.methods import METHODS, operator_scores, ranking_flops, rule_scores
from s2o_compile._console import UsageError
from s2o_compile.ops import Ranking, S2OConfig


def layer(length: int = 700, heads: int = 4, groups: int = 2) -> Layer:
    structure = Structure.draw(length, heads, groups, 32)
    return Layer("layer03", structure.query(0.3)[0], structure.key[0], structure.value[0], 32**-0.5)


def masked_attention(some: Layer, head: int, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64 and spelled out: output and log-sum-exp of one head."""
    query, key, value = (x.double() for x in some.head(head))
    logits = (query @ key.T * some.scale).masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def everything(length: int, tile: int = 64) -> Visit:
    return Visit(torch.ones(-(-length // tile), length, dtype=torch.bool), tile, 1, 0)


def test_dense_attention_and_visiting_everything() -> None:
    some = layer()
    judge, causal = Judge(some), torch.ones(700, 700, dtype=torch.bool).tril()
    for head in range(some.heads):
        output, lse = masked_attention(some, head, causal)
        torch.testing.assert_close(judge.output[head].double(), output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(judge.lse[head].double(), lse, atol=1e-5, rtol=1e-5)
    losses = [judge.loss(head, *judge.attend(head, everything(700))) for head in range(some.heads)]
    score = judge.score(losses, 1, 0)
    assert score.error < 1e-10 and score.row_max < 1e-8 and score.lse_error < 1e-5


def test_errors_are_those_of_masked_attention() -> None:
    some = layer()
    judge, rows = Judge(some), torch.arange(700)
    causal = rows <= rows[:, None]
    wrong, norm, by_row, lse_errors = 0.0, 0.0, [], []
    for head in range(some.heads):
        query, key, _ = some.head(head)
        (visit,) = xattention(query, key, some.scale, [0.6])
        mask = visit.mask.repeat_interleave(128, 0).repeat_interleave(128, 1)[:700, :700] & causal
        (output, lse), (exact, full) = (masked_attention(some, head, seen) for seen in (mask, causal))
        squared = (output - exact).square().sum(-1), exact.square().sum(-1)
        wrong, norm = wrong + float(squared[0].sum()), norm + float(squared[1].sum())
        by_row.append(squared[0] / squared[1])
        lse_errors.append((lse - full).abs())
    (score,) = rule_scores(by_head(xattention), judge, [0.6])
    assert score.error == pytest.approx(wrong / norm, rel=1e-4) and score.error > 1e-3
    assert score.row_max == pytest.approx(float(torch.cat(by_row).max()), rel=1e-3)
    assert score.row_999 == pytest.approx(float(torch.cat(by_row).topk(3).values[-1]), rel=1e-3)
    assert score.lse_error == pytest.approx(float(torch.cat(lse_errors).mean()), rel=1e-3)
    assert score.work == score.density + score.ranking
    assert score.ranking == pytest.approx(1 / 16, rel=0.2)


def test_sampled_rows_are_rows_of_the_whole() -> None:
    whole, some = Judge(layer()), Judge(layer(), every=3)
    assert some.judged.nonzero()[:, 0].tolist() == [*range(128, 256), *range(512, 640)]
    torch.testing.assert_close(some.output, whole.output[:, some.judged])
    outputs = [judge.attend(1, everything(700, 32))[0] for judge in (whole, some)]
    torch.testing.assert_close(outputs[1], outputs[0][some.judged])


@pytest.mark.parametrize(
    "config", [S2OConfig(), S2OConfig(ranking=Ranking(pool=8, guides="kv_head", sample=1)), S2OConfig.paper()]
)
def test_ranking_flops_count_guides_times_history(config: S2OConfig) -> None:
    some, count = layer(1100), 0.0
    for first in range(0, 1100, config.ranking.segment):
        history = max(0, first - config.ranking.near_keys) // 64 * 64
        guides = len(range(first, min(first + config.ranking.segment, 1100), config.ranking.pool))
        count += guides * history
    assert ranking_flops(some, dataclasses.replace(config, threshold=0)) == 0
    heads = 2 if config.ranking.guides == "kv_head" else 4
    assert ranking_flops(some, config) == pytest.approx(2 * 32 * heads * count * (1 + 1 / config.ranking.sample))


def test_the_operator_trades_error_for_work() -> None:
    judge = Judge(layer(2048))
    close, far = operator_scores(S2OConfig(), judge, [1e-6, 0.05])
    assert close.error < 1e-5 < far.error < 0.1
    assert far.density < close.density <= 1.1
    assert far.ranking == close.ranking == pytest.approx(0.5, rel=0.15)


def points(*places: tuple[float, float]) -> list[Point]:
    return [Point("l", "m", "d", 0, False, Score(work, 0, error, error, error, 0)) for work, error in places]


def test_work_at_equal_error_is_interpolated_between_logarithms() -> None:
    curve = points((0.4, 1e-4), (0.1, 1e-2), (0.2, 1e-3))
    assert work_at(curve, 1e-3) == ("", pytest.approx(0.2))
    assert work_at(curve, 10**-2.5) == ("", pytest.approx(0.1 * 2**0.5))
    assert work_at(curve, 0.1) == ("<", 0.1)
    assert work_at(curve, 1e-5) == (">", 0.4)
    assert work_at(points((0.5, 1e-2), (1.0, 0.0)), 1e-3) == ("<", 1.0)


def test_unknown_methods_and_options_are_named() -> None:
    with pytest.raises(UsageError, match=r"--method must be one of 's2o', .*, not 'flash'"):
        choose(["flash"], [], None)
    with pytest.raises(UsageError, match="unknown option 'pools'"):
        choose(None, ["pools=4"], None)
    with pytest.raises(UsageError, match="threshold must be a number from 0 to below 1, not 2"):
        choose(None, ["pool=4"], [2])
    chosen = choose(["PBS-Attn"], ["pool=4 rule=dropped"], [1e-3])
    assert list(chosen) == ["PBS-Attn", "s2o, pool=4 rule=dropped"]
    assert chosen["s2o, pool=4 rule=dropped"].settings == (1e-3,)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layer03.safetensors"
    save_layer(layer(), path)
    names = ["s2o", "FlexPrefill", "StreamingLLM", "oracle, single keys"]
    main([path], names, [], None, [0.01], 2, 640, "cpu", tmp_path / "out", False)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("SAMPLED: one strip of 128 rows in 2") == 2
    saved = json.loads((tmp_path / "out" / "frontier.json").read_text())
    points = [row for row in saved["rows"] if "setting" in row]
    assert saved["settings"]["rows"].startswith("SAMPLED")
    assert {point["method"] for point in points} == set(names)
    assert len(points) == sum(len(METHODS[name].settings) for name in names)
    fields = {field.name for field in dataclasses.fields(Score)}
    assert all(set(point) >= fields | {"work"} for point in points)
    assert [one["method"] for one in saved["rows"] if "target" in one] == [name for name in METHODS if name in names]
    main([path], ["StreamingLLM"], [], None, [0.01], 2, 640, "cpu", None, True)
    assert json.loads(capsys.readouterr().out)["settings"]["rows"] == saved["settings"]["rows"]
    assert all(
        (tmp_path / "out" / f"frontier-{against}.png").stat().st_size > 10_000 for against in ("work", "density")
    )
    with pytest.raises(UsageError, match="--target must be given once, or once a capture"):
        main([path], names, [], None, [0.01, 0.02], 1, None, "cpu", None, False)
    with pytest.raises(UsageError, match="two are the same"):
        main([path, path], names, [], None, [0.01], 1, None, "cpu", None, False)
