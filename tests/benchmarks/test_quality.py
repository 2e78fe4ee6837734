"""The quality benchmark: what its texts hide and ask, its methods' attention, its figures and its command line."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.captured import Layer
from benchmarks.inputs import Structure
from benchmarks.judge import Judge
from benchmarks.methods import ranking_flops
from benchmarks.quality import __main__ as command
from benchmarks.quality.attention import METHODS, attend_densely, attend_visits, operator, rule
from benchmarks.quality.cases import PLACES, Settings, build_case, count_cases
from benchmarks.quality.picture import needles, save_picture
from benchmarks.quality.report import as_dict, count_lookups, summarise, tables
from benchmarks.quality.run import Outcome, read_case
from benchmarks.quality.tasks import CONSTANTS, TASKS, VALUES
from benchmarks.quality.yarn import stretch
from s2o_compile._console import UsageError
from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.testbed.document import MIDDLE

from ..examples import examples
from ..passes.models import VOCABULARY, tiny
from .test_baselines import RULES


class Characters:
    """A tokenizer with one token for each character, and a first token."""

    is_fast = True
    bos_token_id = 0

    def __init__(self, vocabulary: int = 1 << 21) -> None:
        self.vocabulary = vocabulary

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        first = [0] if add_special_tokens else []
        spans = [(i, i + 1) for i in range(len(text))]
        return {"input_ids": first + [ord(c) % self.vocabulary for c in text], "offset_mapping": spans}


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


class TestCases:
    @settings(max_examples=examples(10))
    @given(
        task=st.sampled_from(list(TASKS)),
        length=st.integers(6000, 20_000),
        seed=st.integers(0, 99),
        filler=st.sampled_from(["text", "noise"]),
        number=st.integers(0, 4),
    )
    def test_every_value_is_hidden_once_before_it_is_asked_for(
        self, task: str, length: int, seed: int, filler: str, number: int
    ) -> None:
        case = build_case(Characters(), task, length, number, Settings(seed=seed, filler=filler))
        document, text = case.document, decode(case.document.tokens)
        assert case.length == length and document.tokens[0] == 0
        spans = [*document.middle, *document.end]
        values = [text[span.start : span.stop] for span in spans]
        assert len(set(values)) == len(values) == sum(map(len, case.depths.values()))
        is_name = task == "variables"
        depths = [depth for place in PLACES for depth in case.depths[place]]
        for value, span, depth in zip(values, spans, depths, strict=True):
            assert re.fullmatch("[A-Z]{5}" if is_name else r"\d{7}", value)
            before = text[: document.middle[0].start] if span in document.middle else text[: span.start]
            places = [match.start() for match in re.finditer(value, before)]
            # A chain names all but its last variable twice.
            assert 1 <= len(places) <= 1 + is_name
            until = document.middle[0].start if span in document.middle else document.end[0].start
            assert places[0] / until == pytest.approx(depth, abs=0.4)
        assert not document.scored or document.middle[-1].stop < document.scored.start
        assert document.scored.stop <= document.end[0].start
        if task == "key-value" or filler == "noise":
            assert not document.scored
        assert not any(value in text[document.scored.start : document.scored.stop] for value in values)

    def test_counts_and_places(self) -> None:
        counts = {"niah": 1, "variables": VALUES + 1, "constants": CONSTANTS // 2}
        for task in TASKS:
            document = build_case(Characters(), task, 9000, 0, Settings()).document
            assert len(document.middle) == len(document.end) == counts.get(task, VALUES)
            share = document.middle[0].start / len(document.tokens)
            assert 0.4 < share < MIDDLE + 0.15

    def test_the_needle_goes_from_the_start_to_the_question(self) -> None:
        some = Settings(depths=3, repeats=2)
        assert count_cases("niah", some) == 6 and count_cases("multikey", some) == 2
        found = []
        for number in range(6):
            case = build_case(Characters(), "niah", 8000, number, some)
            text, (span,) = decode(case.document.tokens), case.document.end
            assert case.depths == {place: [number % 3 / 2] for place in PLACES}
            found.append(text.index(text[span.start : span.stop]) / span.start)
        for first, middle, last in (found[:3], found[3:]):
            assert first < 0.1 and 0.4 < middle < 0.6 and last > 0.9

    def test_the_scored_text_is_the_last_that_hides_nothing(self) -> None:
        document = build_case(Characters(), "constants", 9000, 0, Settings(scored=700)).document
        assert len(document.scored) == 700
        end = decode(document.tokens[document.scored.stop :])
        assert end.startswith("\n\n# Recap of the constants defined above\nKEY_")

    def test_a_seed_repeats(self) -> None:
        def build(seed: int, number: int = 0) -> list[int]:
            return build_case(Characters(), "multiquery", 6000, number, Settings(seed=seed)).document.tokens

        assert build(1) == build(1) != build(2)
        assert build(1) != build(1, 1)

    def test_a_chain_is_one_of_assignments(self) -> None:
        plan = TASKS["variables"].plan(random.Random(0), 0.0)
        (question,) = plan.end
        chain = [fact for fact in plan.facts if fact.value in question.values]
        number = re.search(r"assigned the value (\d{5})", question.prompt)
        assert number and chain[0].sentence.endswith(f"= {number[1]}\n")
        for one, following in itertools.pairwise(chain):
            assert following.sentence == f"\nVAR {following.value} = VAR {one.value}\n" and one.depth < following.depth
        assert question.reply.split() == [fact.value for fact in chain]

    def test_too_short(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"--length must be at least \d+ for this task, not 300"):
            build_case(Characters(), "multikey", 300, 0, Settings())
        path = tmp_path / "text"
        path.write_text("short " * 20)
        with pytest.raises(UsageError, match="only 120 tokens of text left and --length 5000 needs"):
            build_case(Characters(), "niah", 5000, 0, Settings(text=path))


def layer(length: int = 700) -> Layer:
    structure = Structure.draw(length, 4, 2, 32)
    return Layer("layer", structure.query(0.3)[0], structure.key[0], structure.value[0], 32**-0.5)


class TestAttention:
    @pytest.mark.parametrize("name", ["xattention", "pbs", "flexprefill", "streaming"])
    def test_masked_strips_are_what_the_frontier_gathers(self, name: str) -> None:
        function, dials = RULES[name]
        some = layer(1300)
        judge = Judge(some)
        visits = [
            visit for head in range(some.heads) for visit in function(*some.head(head)[:2], some.scale, dials[:1])
        ]
        output = attend_visits(some, visits, room=2 * some.heads * visits[0].tile * some.length)
        for head, visit in enumerate(visits):
            torch.testing.assert_close(output[head], judge.attend(head, visit)[0], atol=1e-5, rtol=1e-4)
        assert (output - judge.output).abs().max() > 1e-3

    def test_whoever_keeps_everything_is_dense_attention(self) -> None:
        some = layer()
        dense = attend_densely(some)
        assert (dense.density, dense.ranking) == (1, 0)
        exact = operator(S2OConfig(min_length=0, threshold=0))(some)
        torch.testing.assert_close(exact.output, dense.output, atol=1e-5, rtol=1e-4)
        assert exact.density == pytest.approx(1, abs=0.1) and exact.ranking == 0
        for name in ("xattention", "pbs"):
            every = rule(RULES[name][0], 1.0)(some)
            torch.testing.assert_close(every.output, dense.output, atol=1e-5, rtol=1e-3)
            # PBS-Attn visits whole segments of two blocks.
            assert 0.9 < every.density < 1.2 and every.ranking > 0

    @pytest.mark.parametrize("name", METHODS)
    def test_defaults_save_work_and_stay_close(self, name: str) -> None:
        some = layer(1300)
        dense, sparse = attend_densely(some).output, METHODS[name](some)
        assert sparse.output.shape == dense.shape and sparse.output.dtype == dense.dtype
        error = (sparse.output - dense).square().sum() / dense.square().sum()
        assert error < 0.5 and 0.05 < sparse.density < 1.2 and sparse.ranking >= 0
        # Its budget is larger than so short a text.
        assert error > 0 or name == "vertical-slash"

    def test_half_precision_stays(self) -> None:
        some = layer(300)
        half = replace(some, **{name: getattr(some, name).bfloat16() for name in ("query", "key", "value")})
        for attention in (attend_densely, METHODS["XAttention"], METHODS["s2o"]):
            output = attention(half).output
            assert output.dtype == torch.bfloat16 and output.shape == (4, 300, 32)

    def test_the_ranking_is_counted_as_the_frontier_does(self) -> None:
        some, config = layer(2048), S2OConfig(min_length=0)
        pairs = 4 * sum(range(128, 2049, 128)) * 128
        assert operator(config)(some).ranking == pytest.approx(ranking_flops(some, config) / (4 * 32 * pairs))


def model() -> torch.nn.Module:
    some = tiny("llama")
    some.config.max_position_embeddings = 4096
    return some


def outcomes(attentions: dict[str, Any], task: str = "niah", length: int = 1600, number: int = 0) -> list[Outcome]:
    case = build_case(Characters(VOCABULARY), task, length, number, Settings(depths=3))
    return read_case(model(), case, attentions, lambda: None)


class TestRun:
    def test_exact_attention_predicts_what_dense_attention_does(self) -> None:
        exact = {"exact": operator(S2OConfig(min_length=0, threshold=0)), "all": rule(RULES["xattention"][0], 1.0)}
        dense, *others = outcomes(exact)
        assert dense.method == "dense" and dense.agreed == dense.scored > 300
        for other in others:
            assert other.found == dense.found and other.depths == dense.depths
            assert other.loss == pytest.approx(dense.loss, rel=1e-5) and other.agreed == dense.agreed

    def test_sparse_attention_is_what_is_measured(self) -> None:
        dense, sparse = outcomes(
            {"s2o": operator(S2OConfig(min_length=0, threshold=0.5, ranking=Ranking(rule="dropped")))}
        )
        assert dense.loss != sparse.loss
        assert 0 < sparse.density < 0.5 < dense.density == 1 and sparse.ranking > 0.01

    def test_progress_advances_with_every_layer(self) -> None:
        steps: list[int] = []
        case = build_case(Characters(VOCABULARY), "niah", 1600, 0, Settings())
        read_case(model(), case, {"StreamingLLM": METHODS["StreamingLLM"]}, lambda: steps.append(1))
        assert len(steps) == 4

    def test_models_without_sdpa_are_refused(self) -> None:
        some = model()
        some.set_attn_implementation("eager")
        case = build_case(Characters(VOCABULARY), "niah", 1600, 0, Settings())
        with pytest.raises(UsageError, match="does not call SDPA"):
            read_case(some, case, {}, lambda: None)


def test_yarn_stretches_positions_and_keeps_the_fast_ones() -> None:
    some = tiny("qwen2")
    before = some.model.rotary_emb.inv_freq.clone()
    stretch(some, 4)
    after = some.model.rotary_emb.inv_freq
    assert some.config.max_position_embeddings == 1024
    assert some.model.rotary_emb.attention_scaling == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)
    assert after[0] == before[0] and after[-1] == pytest.approx(float(before[-1]) / 4)
    with pytest.raises(UsageError, match="--yarn needs plain rotary positions"):
        stretch(some, 2)
    with pytest.raises(UsageError, match="--yarn needs plain rotary positions, which GPT2LMHeadModel"):
        stretch(tiny("gpt2"), 2)
    with pytest.raises(UsageError, match=r"--yarn must be above 1, not 0\.5"):
        stretch(tiny("qwen2"), 0.5)


def outcome(method: str, loss: float, found: list[bool], **changes: Any) -> Outcome:
    depths = {place: [0.0, 1.0] for place in PLACES}
    places = {"middle": found, "end": [True, True]}
    return replace(Outcome("niah", 2048, 0, method, 1.0, 0.2, 0.1, 100, loss, 90, places, depths), **changes)


class TestReport:
    def test_documents_are_taken_together(self) -> None:
        some = [
            outcome("dense", 100, [True, False]),
            outcome("s2o", 110, [False, True]),
            outcome("dense", 20, [True, True], number=1, scored=50),
            outcome("s2o", 25, [True, False], number=1, scored=50, agreed=45, density=0.4),
            outcome("dense", 0, [True, True], task="multikey", scored=0, agreed=0),
        ]
        dense, sparse = summarise(some)
        assert (dense.method, sparse.method) == ("dense", "s2o")
        assert dense.perplexity == pytest.approx(2.718281828 ** (120 / 150))
        assert sparse.perplexity_ratio == pytest.approx(2.718281828 ** (15 / 150))
        assert sparse.agreement == pytest.approx(135 / 150)
        assert sparse.density == pytest.approx(0.3) and sparse.work == pytest.approx(0.4)
        counts = {(one.task, one.place, one.method): one for one in count_lookups(some)}
        lost = counts["niah", "middle", "s2o"]
        assert (lost.asked, lost.kept, lost.gained, lost.found) == (4, 1, 1, 2)
        assert counts["niah", "end", "s2o"].kept == 4
        assert counts["multikey", "middle", "dense"].found == 2

    def test_without_text_there_is_no_perplexity(self) -> None:
        (summary,) = summarise([outcome("dense", 0, [True, True], scored=0, agreed=0)])
        assert summary.perplexity is None and summary.agreement is None
        assert len(list(tables([outcome("dense", 0, [True, True], scored=0, agreed=0)]))) == 2

    def test_needles_by_depth_and_length(self, tmp_path: Path) -> None:
        some = [
            outcome("dense", 1, [True, False]),
            outcome("dense", 1, [False, False], length=4096),
            outcome("dense", 1, [True, True], number=1),
        ]
        grid = needles(some, "dense", "middle")
        assert grid == {
            (0.0, 2048): [True, True],
            (1.0, 2048): [False, True],
            (0.0, 4096): [False],
            (1.0, 4096): [False],
        }
        save_picture(some, tmp_path / "needles.png")
        assert (tmp_path / "needles.png").read_bytes().startswith(b"\x89PNG")
        save_picture([replace(some[0], task="multikey")], tmp_path / "none.png")
        assert not (tmp_path / "none.png").exists()

    def test_plain_data(self) -> None:
        found = [outcome("dense", 100, [True, False])]
        data = json.loads(json.dumps(as_dict(found, {"model": "m"}, torch.device("cpu"))))
        summary, *lookups = data["rows"]
        assert data["settings"] == {"model": "m"} and summary["work"] == pytest.approx(0.3)
        assert {one["place"] for one in lookups} == set(PLACES) and len(data["outcomes"]) == 1


def run(**changes: Any) -> None:
    options: dict[str, Any] = {
        "model": None, "length": [1600], "method": None, "s2o": None, "task": None, "repeats": 1, "depths": 2,
        "scored": 100, "filler": "text", "document": None, "seed": 0, "yarn": None, "device": "cpu",
        "dtype": "float32", "output": None, "as_json": False,
    }  # fmt: skip
    command.main(**(options | changes))


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "load_model", lambda *_: (model(), Characters(VOCABULARY)))
    run(method=["FlexPrefill"], s2o=["pool=4 threshold=0.01"], task=["niah"], output=tmp_path / "out")
    printed = " ".join(capsys.readouterr().out.split())
    assert "1,600 tokens: work, and perplexity" in printed and "s2o, pool=4 threshold=0.01" in printed
    saved = json.loads((tmp_path / "out" / "quality.json").read_text())
    summaries = [row for row in saved["rows"] if "work" in row]
    assert [one["method"] for one in summaries] == ["dense", "FlexPrefill", "s2o, pool=4 threshold=0.01"]
    assert len(saved["outcomes"]) == 6 and saved["settings"]["documents"]["depths"] == 2
    assert (tmp_path / "out" / "quality.png").stat().st_size > 10_000
    run(method=["StreamingLLM"], task=["niah"], yarn=2.0, length=[1700, 1600], depths=1, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert [row["length"] for row in printed["rows"] if "work" in row] == [1600, 1600, 1700, 1700]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": ["flash"]}, "--method must be one of 's2o', .*, not 'flash'"),
        ({"task": ["haystack"]}, "--task must be one of 'niah', .*, not 'haystack'"),
        ({"filler": "essay"}, "--filler must be one of 'text', .*, not 'essay'"),
        ({"s2o": ["pools=4"]}, "unknown option 'pools'"),
    ],
)
def test_what_is_wrong_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(**options)


def test_too_many_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_model", lambda *_: (model(), Characters(VOCABULARY)))
    with pytest.raises(UsageError, match="at most 4,096 positions"):
        run(length=[1600, 9000])
