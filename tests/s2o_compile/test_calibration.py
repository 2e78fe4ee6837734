"""Calibration: thresholds that keep a budget, the file they are kept in, and the models it is for."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.exc import BackendCompilerFailed

import s2o_compile
from s2o_compile import Calibration, CalibrationError, Ranking, S2OConfig, calibrate, cli, explain, profile
from s2o_compile.calibration.calibrate import MARGIN
from s2o_compile.calibration.identity import digest
from s2o_compile.calibration.search import LARGEST, find_threshold
from s2o_compile.calibration.sites import Measurement, SiteInputs, visit_sites
from s2o_compile.ops.density import ranking_share, share_of_guides
from s2o_compile.testbed import prepare
from s2o_compile.testbed.document import Document

from ..ops.settings import config_of
from ..passes.models import padding, tiny, tokens

RULE = S2OConfig(ranking=Ranking(segment=16, pool=16, near_keys=0))
"""Ranks cheaply, so that short calls have something to save."""
BUDGET = 0.03
LAYERS = ("model.layers.0.self_attn", "model.layers.1.self_attn")


def sharp(name: str = "llama", diffuse: int | None = None) -> Any:
    """A tiny model whose queries agree on a few important keys, but those of one layer on none."""
    model = tiny(name)
    model.model.embed_tokens.weight.data[:, :8] += 0.05
    for layer, block in enumerate(model.model.layers):
        for part in (block.self_attn.q_proj, block.self_attn.k_proj):
            part.weight.data *= 0 if layer == diffuse else 10
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, Calibration]:
    """A file, the tokens that it was calibrated on, and what was found."""
    torch.manual_seed(0)
    path, ids = tmp_path_factory.mktemp("calibration") / "sharp.json", tokens(250)
    return path, ids, calibrate(sharp(), ids, error_budget=BUDGET, output=path, config=RULE, progress=False)


def use(path: Path | str, **changes: Any) -> S2OConfig:
    return S2OConfig(calibration=path, min_length=0, **changes)


def compiled(model: torch.nn.Module, config: S2OConfig) -> Callable[..., Any]:
    return torch.no_grad()(torch.compile(model, backend=s2o_compile.s2o.with_config(config)))


def test_a_compiled_model_keeps_the_budget(
    written: tuple[Path, torch.Tensor, Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewritten graph runs as it is; Inductor would leave the operator as it is."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, inputs, **_: module.forward)
    path, ids, found = written
    run = torch.compile(sharp(), backend="s2o", options={"calibration": str(path), "min_length": 0})
    with torch.no_grad(), profile(error_rows=1000) as p:
        run(ids)
    assert tuple(site.name for site in p.sites) == tuple(found.sites) == LAYERS
    first, chosen = p.sites[0], found.sites[LAYERS[0]]
    assert first.error == pytest.approx(chosen.error, rel=1e-3) and first.error <= BUDGET
    assert first.density == pytest.approx(chosen.density) and 0.1 < first.density < 0.95
    # The second layer gets what the first one's error made of its inputs.
    assert 0.3 * BUDGET < p.sites[1].error < 1.5 * BUDGET


@pytest.mark.parametrize("side", ["left", pytest.param(None, marks=pytest.mark.slow)])
def test_every_call_of_every_input_is_within_the_budget(side: str | None) -> None:
    model = sharp("qwen2")
    inputs = [{"input_ids": tokens(n), "attention_mask": padding(n, side)} for n in (250, 180)]
    found = calibrate(model, inputs, error_budget=BUDGET, output=None, config=RULE, progress=False)
    calls: list[tuple[str, Measurement]] = []

    def handle(call: SiteInputs) -> None:
        calls.append((call.site, call.measure(found.sites[call.site].threshold or 0)))

    for arguments in inputs:
        visit_sites(model, arguments, RULE, handle, lambda decisions: None)
    assert found.lengths == [250, 180] and len(calls) == 4
    for name, site in found.sites.items():
        errors = [measured.error for where, measured in calls if where == name]
        assert site.error == pytest.approx(max(errors), rel=1e-3)
        assert 0.6 * MARGIN * BUDGET < max(errors) <= MARGIN * BUDGET


def test_diffuse_layers_stay_dense(tmp_path: Path) -> None:
    model, path, ids = sharp(diffuse=0), tmp_path / "file.json", tokens(250)
    found = calibrate(model, (ids,), error_budget=1e-3, output=path, config=RULE, progress=False)
    assert found.sites[LAYERS[0]].dense and not found.sites[LAYERS[1]].dense
    first, second = explain(model, ids, config=use(path)).decisions
    assert second.rewritten and not first.rewritten
    assert first.reason.startswith("the calibration leaves it dense: visiting ")
    assert f"{(1 + found.sites[LAYERS[1]].density) / 2:.3f}" in str(found) and "1 of 2" in str(found)


def test_the_file(written: tuple[Path, torch.Tensor, Calibration]) -> None:
    path, _, found = written
    assert Calibration.load(path) == found
    content = json.loads(path.read_text())
    assert content["error_budget"] == BUDGET and content["lengths"] == [250]
    assert content["model"]["kind"] == "LlamaForCausalLM" and content["torch"] == torch.__version__
    assert content["settings"]["ranking"]["pool"] == 16 and "threshold" not in content["settings"]
    assert path.stat().st_size < 2000


def test_another_model_is_refused(written: tuple[Path, torch.Tensor, Calibration]) -> None:
    path, ids, _ = written
    other = sharp()
    other.model.layers[1].self_attn.q_proj.weight.data += 1e-2
    message = "is for another model, a LlamaForCausalLM of 18,656 parameters .*layers.1.self_attn.q_proj.weight is not"
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(other, use(path))(ids)
    with pytest.raises(CalibrationError, match=message):
        s2o_compile.export(other, (ids,), kwargs={"use_cache": False}, config=use(path))
    other.set_attn_implementation("s2o")
    with pytest.raises(CalibrationError, match=r"is for another model, a LlamaForCausalLM .*, not a LlamaForCausalLM"):
        s2o_compile.configure(other, use(path))
    with pytest.raises(BackendCompilerFailed, match=r"has no site 'layers.0.self_attn'"):
        compiled(sharp().model, use(path))(ids)


def test_the_same_model_elsewhere(written: tuple[Path, torch.Tensor, Calibration]) -> None:
    path, ids, _ = written
    model = sharp()
    assert explain(copy.deepcopy(model).bfloat16(), ids, config=use(path)).rewritten == 2
    program = s2o_compile.export(
        model, (ids,), kwargs={"use_cache": False}, config=use(path, ranking=Ranking(near_keys=0))
    )
    thresholds = [node.kwargs["threshold"] for node in program.graph.nodes if "s2o.attention" in str(node.target)]
    assert thresholds == [Calibration.load(path).sites[name].threshold for name in LAYERS]


def test_other_settings_are_refused(written: tuple[Path, torch.Tensor, Calibration]) -> None:
    path, ids, _ = written
    with pytest.raises(BackendCompilerFailed, match=r"segment must be 16, as in the calibration '.*', not 64"):
        compiled(sharp(), use(path, ranking=Ranking(segment=64)))(ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe", "is not a text file"),
        (b"", "must be a file that s2o_compile.calibrate wrote"),
        (b"[1]", "must be a file that"),
        (b"{}", "must be a file that"),
        (b'{"format": "s2o calibration, version 9"}', "must be a file that"),
        ({"sites": {LAYERS[0]: {"threshold": "low"}}}, "must be a file that"),
        ({"sites": {LAYERS[0]: {"threshold": 2, "density": 1, "error": 0}}}, "must be a file that"),
        ({"sites": {LAYERS[0]: {"threshold": None, "density": None, "error": None}}}, "must be a file that"),
        ({"sites": [1]}, "must be a file that"),
        ({"settings": {"segmnt": 32}}, "must be a file that"),
        ({"model": {}}, "must be a file that"),
        ({"more": 1}, "must be a file that"),
    ],
)
def test_garbled_files(
    content: Any, message: str, written: tuple[Path, torch.Tensor, Calibration], tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(written[0].read_text()) | content).encode()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_attention_of_transformers(written: tuple[Path, torch.Tensor, Calibration], tmp_path: Path) -> None:
    path, ids, found = written
    model = sharp()
    model.set_attn_implementation("s2o")
    s2o_compile.configure(model, use(path))
    with torch.no_grad(), profile(error_rows=1000) as p:
        model(ids)
    assert p.sites[0].density == pytest.approx(found.sites[LAYERS[0]].density)
    assert p.sites[0].error == pytest.approx(found.sites[LAYERS[0]].error, rel=1e-3)

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="s2o")
    with (
        torch.no_grad(),
        pytest.raises(CalibrationError, match="configure once the model is loaded"),
    ):
        loaded(ids)
    s2o_compile.configure(loaded, use(path))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
        s2o_compile.configure(loaded, S2OConfig(min_length=0, threshold=0))
        loaded.set_attn_implementation("s2o")
        torch.testing.assert_close(loaded(ids).logits, sharp()(ids).logits)


def test_layers_marked_dense_in_transformers(tmp_path: Path) -> None:
    model, path, ids = sharp(diffuse=0), tmp_path / "file.json", tokens(250)
    calibrate(model, ids, error_budget=1e-3, output=path, config=RULE, progress=False)
    model.set_attn_implementation("s2o")
    s2o_compile.configure(model, use(path))
    with torch.no_grad(), profile() as p:
        model(ids)
    assert [site.name for site in p.sites] == ["LlamaAttention 1"]


@pytest.mark.parametrize(
    ("model", "inputs", "options", "error", "message"),
    [
        (len, tokens(20), {}, TypeError, "model must be a torch.nn.Module, not builtin_function_or_method"),
        (tiny, "text", {}, TypeError, "inputs must be tensors, or tuples or mappings of arguments, not str"),
        (tiny, [], {}, CalibrationError, "inputs must have at least one input"),
        (tiny, tokens(20), {"error_budget": 0}, ValueError, "error_budget must be None or between 0 and 1, not 0"),
        (tiny, tokens(20), {"error_budget": None}, TypeError, "error_budget must be a number, not None"),
        (tiny, tokens(20), {"error_budget": "low"}, TypeError, "error_budget must be a number or None, not 'low'"),
        (tiny, tokens(20), {"output": "/no/such/folder/file"}, CalibrationError, "output '/no.*' cannot be written"),
        (tiny, tokens(20), {"config": S2OConfig(calibration="x")}, ValueError, "calibration must be None where"),
    ],
)
def test_bad_arguments(model: Any, inputs: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(model("llama", 1) if model is tiny else model, inputs, **{"error_budget": 0.01, **options})


def test_a_model_without_attention(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no attention that can become sparse; no attention was found"):
        calibrate(torch.nn.Linear(2, 2), torch.ones(1, 2), error_budget=0.01, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@given(st.floats(1e-3, 3), st.floats(0.7, 2), st.floats(1e-5, 0.5), st.sampled_from([None, 1e-4, 0.01]))
def test_the_search_finds_a_power_law(factor: float, exponent: float, budget: float, ceiling: float | None) -> None:
    def measure(threshold: float) -> Measurement:
        return Measurement(threshold, 0.5, factor * threshold**exponent)

    found = find_threshold(measure, budget, ceiling)
    assert found is not None and found.error <= budget and found.threshold <= (ceiling or LARGEST)
    assert found.error >= 0.5 * budget or found.threshold == (ceiling or LARGEST)


def test_the_search_gives_up() -> None:
    assert find_threshold(lambda threshold: Measurement(threshold, 1, 0.1), 0.01) is None
    assert find_threshold(lambda threshold: Measurement(threshold, 1, math.nan), 0.01) is None


def test_the_search_is_not_caught_by_a_step() -> None:
    def measure(threshold: float) -> Measurement:
        return Measurement(threshold, 0.5, 1.0 if threshold > 0.02 else 0.0)

    found = find_threshold(measure, 1e-3)
    assert found is not None and 0.01 < found.threshold <= 0.02


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({}, (64 + 64 / 16) / 192),
        ({"pool": 4, "sample": 1}, (64 + 64) / 192 / 4),
        ({"channels": 32}, (32 + 64 / 16) / 192),
        ({"channels": 99}, (64 + 64 / 16) / 192),
        ({"guides": "kv_head", "pool": 8}, (64 + 64 / 16) / 192 / 8 / 3),
    ],
)
def test_the_price_of_ranking(fields: dict[str, Any], share: float) -> None:
    assert ranking_share(config_of(**fields), channels=64, value_channels=128, group_size=3) == pytest.approx(share)


@pytest.mark.parametrize(("size", "groups_in_all"), [(0.5, 0), (10, 2)])
def test_the_price_of_groups_that_are_ranked_in_all_channels(size: float, groups_in_all: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 50, 64) * size, torch.randn(1, 2, 50, 64)
    call = SiteInputs("", query, key, key, {"is_causal": True})
    few, whole = (ranking_share(S2OConfig(ranking=Ranking(channels=x)), 64, 64, 2) for x in (16, None))
    config = S2OConfig(ranking=Ranking(channels=16, merge_length=50))
    price, left = few + (whole - few) * groups_in_all / 2, share_of_guides(query, key, 64**-0.5, config)
    assert call.ranking_share(config.with_ranking(radius=0.0)) == price
    assert 1 / 32 <= left <= 1 and call.ranking_share(config) == price * left
    windowed = dataclasses.replace(call, options=call.options | {"window": 100})
    assert windowed.ranking_share(config) == price  # Queries that see different keys are not merged.


def test_digests() -> None:
    weight = torch.randn(50, 60)
    assert digest(weight) == digest(weight.bfloat16()) == digest(weight.clone().requires_grad_())
    others = [weight + 0.1, weight.reshape(60, 50), weight[:49], weight[:0]]
    assert len({digest(one) for one in [weight, *others]}) == 5


def test_a_budget_without_calibration() -> None:
    config = S2OConfig(error_budget=1e-3, ranking=Ranking(segment=64))
    meant = S2OConfig(threshold=1e-3, ranking=Ranking(segment=64, measure="output"))
    assert config.arguments() == meant.arguments()
    assert "error_budget" not in config.arguments() and "calibration" not in config.arguments()
    tensors = [torch.randn(1, 2, 300, 16) for _ in range(3)]
    shared = {"is_causal": True, "return_stats": True}
    got = s2o_compile.attention(*tensors, config=dataclasses.replace(config, min_length=0), **shared)
    want = s2o_compile.attention(*tensors, config=dataclasses.replace(meant, min_length=0), **shared)
    assert torch.equal(got.output, want.output) and got.visited.sum() < 300 * 320 * 2


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"error_budget": 1.0}, ValueError, "error_budget must be None or between 0 and 1, not 1.0"),
        ({"error_budget": True}, TypeError, "error_budget must be a number or None, not True"),
        ({"error_budget": 0.1, "threshold": 0.1}, ValueError, "threshold must be left out where error_budget decides"),
        ({"error_budget": 0.1, "pool": 2}, ValueError, "pool must be left out beside an error_budget"),
        ({"error_budget": 0.1, "rule": "dropped"}, ValueError, "rule must be left out beside an error_budget"),
        ({"error_budget": 0.1, "calibration": "x"}, ValueError, "error_budget must be None beside a calibration"),
        ({"calibration": "x", "threshold": 0.1}, ValueError, "threshold must be left out where calibration decides"),
        ({"calibration": 3}, TypeError, "calibration must be a path or None, not 3"),
    ],
)
def test_what_decides_the_threshold(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config_of(**fields)


def test_a_calibration_needs_sites() -> None:
    with pytest.raises(ValueError, match="calibration must be None where no attention site of a model is known"):
        s2o_compile.attention(*[torch.randn(1, 2, 20, 16)] * 3, config=S2OConfig(calibration="x"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    """The exit code of the command line, and what it prints."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("json_only", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_command(
    json_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [Document(tokens(200, 1)[0].tolist(), middle=[], end=[], scored=range(100, 200)) for _ in range(2)]
    monkeypatch.setattr(prepare, "load_model", lambda *_: (sharp(), object()))
    monkeypatch.setattr(prepare, "check_document", lambda *_: None)
    monkeypatch.setattr(prepare, "build_document", lambda *arguments: texts[arguments[-1]])
    path = tmp_path / "new" / "file.json"
    options = ["--error-budget", "0.03", "--length", "200", "--texts", "2"]
    for field in ("pool=16", "segment=16", "near_keys=0"):
        options += ["--option", field]
    code, out, err = run(capsys, "calibrate", "any", *options, "--output", str(path), *["--json"] * json_only)
    assert code == 0 and "Calibrating" in err
    assert Calibration.load(path).lengths == [200, 200]
    assert json.loads(out) == json.loads(path.read_text()) if json_only else "2 of 2" in out and "0.03" in out

    code, out, err = run(capsys, "calibrate", "any", "--option", f"calibration={path}")
    assert code == 2 and not out and "calibration must be None where no attention site of a model is known" in err

    changed = sharp()
    changed.model.layers[0].self_attn.q_proj.weight.data *= 2
    monkeypatch.setattr(prepare, "load_model", lambda *_: (changed, object()))
    settings = ["--min-length", "0", "--option", f"calibration={path}"]
    code, out, err = run(capsys, "explain", "any", "--length", "200", *settings)
    assert code == 2 and not out and err.splitlines()[-1].startswith("s2o: calibration '")
    assert err.splitlines()[-1].endswith("layers.0.self_attn.q_proj.weight is not the same here.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--error-budget", "2"], "--error-budget must be between 0 and 1, not 2"),
        (["--texts", "0"], "--texts"),
        (["--option", "calibration=x"], "calibration 'x' cannot be read: No such file or directory."),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "calibrate", *arguments)
    assert code == 2 and not out and message in err and len(err.splitlines()) == 1
