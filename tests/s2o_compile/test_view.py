"""The report on a model: its figures are the operator's, and it is one file that refers to nothing outside."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig, cli
from s2o_compile.ops.density import density
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.visibility import Visibility
from s2o_compile.sdpa_intercept import SdpaInputs, SdpaIntercept
from s2o_compile.testbed import prepare
from s2o_compile.testbed.document import Document
from s2o_compile.view import ViewError
from s2o_compile.view.head import view_head
from s2o_compile.view.visits import visits

from ..ops.settings import config_of
from ..passes.models import padding, tiny, tokens

pytest.importorskip("matplotlib")

LENGTH = 250
ANY_LENGTH: dict[str, Any] = {"min_length": 0, "near_keys": 0}
RULES = {
    "default": config_of(threshold=0.02, **ANY_LENGTH),
    "per head": config_of(threshold=0.01, lists="head", measure="output", last_queries=40, **ANY_LENGTH),
    "pooled": config_of(threshold=0.01, lists="head", pool=4, rule="dropped", **ANY_LENGTH),
    "none": config_of(threshold=0.02, rule="dropped", **ANY_LENGTH),
    "dense": config_of(threshold=0, **ANY_LENGTH),
    "paper": S2OConfig.paper(threshold=0.2, min_length=0).with_ranking(segment=64, pool=64),
}


def attended(is_causal: bool = True) -> SdpaInputs:
    """A call whose keys differ in importance: 4 heads over 2 KV heads."""
    torch.manual_seed(1)
    query, key, value = 2 * torch.randn(1, 4, LENGTH, 16), torch.randn(1, 2, LENGTH, 16), torch.randn(1, 2, LENGTH, 16)
    return SdpaInputs(0, query, key, value, {"is_causal": is_causal, "enable_gqa": True})


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_softmax_over_what_is_visited_is_the_operators_output(rule: str, is_causal: bool) -> None:
    call, config, head = attended(is_causal), RULES[rule], 3
    want = s2o_compile.attention(call.query, call.key, call.value, is_causal, config=config, return_stats=True)
    logits = call.query[0, head] @ call.key[0, 1].T * call.scale
    pairs = torch.zeros(LENGTH)
    for visit in visits(call.query, call.key, call.value, head, is_causal, call.scale, config):
        rows = slice(visit.rows.start, visit.rows.stop)
        seen = torch.arange(LENGTH) <= torch.tensor(visit.rows)[:, None] if is_causal else torch.tensor(True)
        weight = torch.zeros(LENGTH)
        if config.has_samples:
            weight[visit.order[visit.dense :]] = (math.log(config.threshold) - visit.importance).clamp_min(0)
        part = (logits[rows] + weight).masked_fill(~(visit.visited & seen), -math.inf)
        torch.testing.assert_close(part.softmax(-1) @ call.value[0, 1], want.output[0, head, rows], atol=1e-5, rtol=0)
        assert len(visit.order) == len(visit.order.unique())
        assert (visit.importance.diff() <= 0).all()
        pairs[rows] = visit.visited.sum(1).float()
    counted = want.visited[0, head].sum()
    assert counted - 2 * 64 * LENGTH < pairs.sum() <= counted


def test_keys_are_ordered_as_the_reference_ranks_them() -> None:
    call, config = attended(), RULES["none"]
    segment = 6
    # Each key's value is its own unit vector, so that outputs are the weights of visited keys.
    query, key = call.query[:, 2:].double(), call.key[:, 1:].double()
    value = torch.eye(LENGTH, dtype=torch.float64)[None, None]
    want = reference_attention(query, key, value, Visibility(True), scale=call.scale, config=config)
    visit = list(visits(call.query, call.key, call.value, 3, True, call.scale, config))[segment]
    listed = visit.order[visit.dense : visit.sure].tolist()
    visited = want.output[0, 1, visit.rows[-1]].nonzero().flatten().tolist()
    wanted = set(visited) - set(visit.order[: visit.dense].tolist())
    # Keys may change places where the scores that rank them are in bfloat16.
    assert len(set(listed) ^ wanted) <= 2
    assert len(listed) > 10


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_maps_and_curves_hold_all_mass(is_causal: bool) -> None:
    found = view_head(attended(is_causal), 1, RULES["default"])
    for blocks in (found.by_position, found.by_importance):
        torch.testing.assert_close(blocks.mass.sum(1), torch.ones(4))
        share = blocks.visited[~blocks.visited.isnan()]
        assert ((share >= 0) & (share <= 1)).all() and (share < 1).any()
    hidden = torch.ones(4, 4).triu(1).bool() & torch.tensor(is_causal)
    assert torch.equal(found.by_position.visited.isnan(), hidden)
    first = found.by_importance.mass.cumsum(1)[-1, :2]
    assert (first > found.by_position.mass.cumsum(1)[-1, :2]).all()
    assert [curve.segment for curve in found.curves] == [1, 3, 5, 7]
    for curve in found.curves:
        assert curve.mass == sorted(curve.mass) and math.isclose(curve.mass[-1], 1, rel_tol=1e-5)
        assert curve.keys[0] <= curve.stop <= curve.keys[-1]


def test_a_map_is_the_mean_softmax_of_its_blocks() -> None:
    call = attended()
    logits = (call.query[0, 2] @ call.key[0, 1].T * call.scale).double()
    mass = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf).softmax(-1)
    got = view_head(call, 2, RULES["default"]).by_position.mass
    torch.testing.assert_close(float(got[2, 1]), float(mass[128:192, 64:128].sum() / 64), rtol=1e-4, atol=0)
    torch.testing.assert_close(float(got[3, 0]), float(mass[192:, :64].sum() / (LENGTH - 192)), rtol=1e-4, atol=0)


class _References(HTMLParser):
    """What a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def test_the_report_says_what_the_operator_does(tmp_path: Path) -> None:
    model, ids, config = tiny("llama"), tokens(200, batch=1), RULES["default"]
    want: list[tuple[Any, Any]] = []

    def record(call: SdpaInputs) -> torch.Tensor:
        tensors = call.query, call.key, call.value
        want.append((s2o_compile.attention(*tensors, True, config=config, return_stats=True), call.dense()))
        return want[-1][1]

    with torch.no_grad(), SdpaIntercept(record):
        model(ids)
    done: list[int] = []
    path, folder = tmp_path / "report.html", tmp_path / "pictures"
    s2o_compile.visualize(
        model, ids, layer=1, head=2, config=config, output=path, png=folder, name="<&>", progress=done.append
    )
    assert done == [1, 2]
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    data = json.loads(root.find(".//script").text)
    assert data["model"] == "<&>" and data["config"]["threshold"] == 0.02
    assert (data["head"]["layer"], data["head"]["head"]) == (1, 2)
    for layer, (sparse, dense) in zip(data["layers"], want, strict=True):
        for head in range(4):
            wrong = (sparse.output[0, head] - dense[0, head]).norm() / dense[0, head].norm()
            assert layer["error"][head] == pytest.approx(float(wrong) ** 2, rel=1e-3)
        assert layer["density"] == density(sparse.visited, 200, 200, True, 0, config.ranking.tile)[0].tolist()
    parser = _References()
    parser.feed(text)
    assert len(parser.found) == 5 and all(found.startswith("data:image/png;base64,") for found in parser.found)
    assert not re.search(r"https?:|url\(|@import", text)
    names = {"density", "error", "by-position", "by-importance", "mass"}
    assert {file.stem for file in folder.iterdir()} == names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in folder.iterdir())


def test_at_threshold_zero_nothing_is_lost() -> None:
    view = s2o_compile.visualize(tiny("bert"), tokens(100, batch=1), config=S2OConfig(threshold=0), output=None)
    assert view.mean("density") == 1 and view.mean("error") < 1e-10
    assert (view.head.by_position.visited == 1).all()


def test_a_single_token_of_bfloat16(tmp_path: Path) -> None:
    view = s2o_compile.visualize(tiny("llama").bfloat16(), tokens(1, batch=1), output=tmp_path / "report.html")
    assert view.mean("density") == 1 and view.mean("error") == 0
    assert [(curve.stop, curve.mass) for curve in view.head.curves] == [(1, [1.0])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 2}, "layer must be below 2, the calls of SDPA that the model makes, not 2"),
        ({"layer": -1}, "layer must be at least 0, not -1"),
        ({"head": 4}, "head must be below 4, the heads of layer 0, not 4"),
        ({"attention_mask": padding(40, "left")[:1]}, "layer 0 cannot be viewed: .* or has a mask"),
        ({"output": Path(__file__) / "report.html"}, "output must be a file that can be written, not "),
        ({"png": Path(__file__)}, "png must be a folder that can be written to, not "),
    ],
)
def test_what_cannot_be_viewed(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ViewError, match=message):
        s2o_compile.visualize(tiny("llama"), tokens(40, batch=1), **{"output": tmp_path / "report.html"} | arguments)


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands read 200 tokens with a tiny Llama."""
    text = Document(tokens=tokens(200)[0].tolist(), middle=[], end=[], scored=range(100, 200))
    monkeypatch.setattr(prepare, "load_model", lambda *_: (tiny("llama"), object()))
    monkeypatch.setattr(prepare, "check_document", lambda *_: None)
    monkeypatch.setattr(prepare, "build_document", lambda *_: text)


@pytest.mark.parametrize("json_only", [False, True])
def test_the_command(json_only: bool, small_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    arguments = ["view", "some/model", "--layer", "1", "--head", "3", "--length", "200", "--output", str(path)]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, *["--json"] * json_only])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and path.is_file()
    if json_only:
        data = json.loads(printed)
        assert (data["model"], data["head"]["layer"], len(data["layers"])) == ("model", 1, 2)
    else:
        assert "layer 1, head 3" in printed and "report.html" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "7"], "layer must be below 2"),
        (["--head", "9"], "head must be below 4"),
        (["--head", "-1"], "head"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, small_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["view", "--length", "200", "--output", str(tmp_path / "report.html"), *arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not captured.out
    assert message in captured.err.splitlines()[-1]
