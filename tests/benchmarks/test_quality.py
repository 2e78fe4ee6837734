"""The quality benchmark: what its texts hide and ask, its methods' attention, its figures and its command line."""

from __future__ import annotations

import collections
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.baselines.flashprefill_v2 import flashprefill_v2
from benchmarks.baselines.group import Group
from benchmarks.baselines.kernel import attend_visit
from benchmarks.captured import Layer
from benchmarks.inputs import Structure
from benchmarks.judge import Judge
from benchmarks.methods import ranking_flops
from benchmarks.quality import __main__ as command
from benchmarks.quality import attention
from benchmarks.quality.attention import (
    METHODS,
    Attended,
    attend_by_masks,
    attend_densely,
    attend_visits,
    operator,
    rule,
    with_dense_layers,
)
from benchmarks.quality.cases import PLACES, Settings, build_case
from benchmarks.quality.flips import Flips, mcnemar
from benchmarks.quality.journal import Journal, check_configuration
from benchmarks.quality.lookups import CONSTANTS
from benchmarks.quality.page import page
from benchmarks.quality.picture import depth_picture, flips_picture, needles
from benchmarks.quality.plan import VALUES, Plan
from benchmarks.quality.report import as_dict, count_lookups, summarise, tables
from benchmarks.quality.run import Outcome, read_case
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.yarn import stretch
from s2o_compile._console import UsageError
from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.testbed.document import MIDDLE

from ..examples import examples
from ..passes.models import VOCABULARY, tiny
from .test_baselines import GROUP_RULES, RULES


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


UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
VALUE = {
    "vt": "[A-Z]{5}", "cwe": "[a-z]{4,10}", "fwe": "[a-z]{6}", "niah_multikey_3": UUID, "story-retrieval": "[A-Za-z ]+",
    "story-multihop": "[a-z ]+", "story-filtering": "[A-Z][a-z]+",
}  # fmt: skip
"""What values look like that have not seven digits."""
AGGREGATED = ("cwe", "fwe")
OTHER_COUNTS = {
    "vt": VALUES + 1, "cwe": 10, "fwe": 3, "constants": CONSTANTS // 2, "niah": 1, "niah_single_1": 1,
    "niah_single_2": 1, "niah_multikey_2": 1, "niah_multikey_3": 1, "story-multihop": 1,
}  # fmt: skip


class TestCases:
    @settings(max_examples=examples(12))
    @given(
        task=st.sampled_from(list(TASKS)),
        length=st.integers(7000, 20_000),
        seed=st.integers(0, 99),
        filler=st.sampled_from(["code", "prose", "noise"]),
        sample=st.integers(0, 4),
    )
    def test_every_value_lies_before_it_is_asked_for(
        self, task: str, length: int, seed: int, filler: str, sample: int
    ) -> None:
        case = build_case(Characters(), task, length, sample, Settings(seed=seed, filler=filler))
        document, text = case.document, decode(case.document.tokens)
        assert case.length == length and document.tokens[0] == 0
        assert document == build_case(Characters(), task, length, sample, Settings(seed=seed, filler=filler)).document
        for place, spans, start in (("middle", document.middle, 0), ("end", document.end, document.middle[-1].stop)):
            values = [text[span.start : span.stop] for span in spans]
            assert len(set(values)) == len(values) == OTHER_COUNTS.get(task, VALUES)
            for value in values:
                assert re.fullmatch(VALUE.get(task, r"\d{7}"), value)
                assert value in text[start if task in AGGREGATED else 0 : spans[0].start]
            if task not in AGGREGATED:
                depths = zip(values, case.depths[place], strict=True)
                assert all(
                    text.index(value) / spans[0].start == pytest.approx(depth, abs=0.4) for value, depth in depths
                )
        assert not document.scored or document.middle[-1].stop < document.scored.start
        assert document.scored.stop <= document.end[0].start
        of_text = TASKS[task].filler == "prose" or (filler != "noise" and task in ANY_TEXT)
        assert of_text or not document.scored

    def test_counts_and_places(self) -> None:
        for task in TASKS:
            document = build_case(Characters(), task, 9000, 0, Settings()).document
            assert len(document.middle) == len(document.end) == OTHER_COUNTS.get(task, VALUES)
            share = document.middle[0].start / len(document.tokens)
            assert 0.4 < share < MIDDLE + 0.15

    def test_the_needle_goes_from_the_start_to_the_question(self) -> None:
        some, found = Settings(depths=3), []
        for sample in range(6):
            case = build_case(Characters(), "niah", 8000, sample, some)
            text, (span,) = decode(case.document.tokens), case.document.end
            assert case.depths == {place: [sample % 3 / 2] for place in PLACES}
            found.append(text.index(text[span.start : span.stop]) / span.start)
        for first, middle, last in (found[:3], found[3:]):
            assert first < 0.1 and 0.4 < middle < 0.6 and last > 0.9

    def test_the_scored_text_is_the_last_that_hides_nothing(self) -> None:
        document = build_case(Characters(), "constants", 9000, 0, Settings(scored=700)).document
        assert len(document.scored) == 700
        end = decode(document.tokens[document.scored.stop :])
        assert end.startswith("\n\n# Recap of the constants defined above\nKEY_")

    def test_a_seed_repeats(self) -> None:
        def build(seed: int, sample: int = 0) -> list[int]:
            return build_case(Characters(), "multiquery", 6000, sample, Settings(seed=seed)).document.tokens

        assert build(1) == build(1) != build(2)
        assert build(1) != build(1, 1)

    def test_too_short(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"--length must be at least [\d,]+ for the task multikey, not 300"):
            build_case(Characters(), "multikey", 300, 0, Settings())
        with pytest.raises(UsageError, match="--length must be at least 2,048 for the task fwe, not 1,024"):
            build_case(Characters(), "fwe", 1024, 0, Settings())
        path = tmp_path / "text"
        path.write_text("short " * 20)
        with pytest.raises(UsageError, match="only 120 tokens of text left and --length 5000 needs"):
            build_case(Characters(), "niah", 5000, 0, Settings("document", path))


ANY_TEXT = [
    task for task in TASKS if TASKS[task].filler is None and not TASKS[task].plan(random.Random(), 0.0, 4096).haystack
]


def plan(task: str, length: int = 4096, seed: int = 0) -> Plan:
    return TASKS[task].plan(random.Random(seed), 0.5, length)


def text_of(pieces: Iterable[str], count: int) -> str:
    return "".join(itertools.islice(pieces, count))


class TestTasks:
    def test_a_chain_is_one_of_assignments(self) -> None:
        some = plan("vt")
        (question,) = some.end
        chain = [fact for fact in some.facts if fact.value in question.values]
        number = re.search(r"assigned the value (\d{5})", question.prompt)
        assert number and chain[0].sentence.endswith(f"= {number[1]}\n")
        for one, following in itertools.pairwise(chain):
            assert following.sentence == f"\nVAR {following.value} = VAR {one.value}\n" and one.depth < following.depth
        assert question.reply.split() == [fact.value for fact in chain]

    @pytest.mark.parametrize(("length", "common", "others"), [(2048, 6, 1), (8192, 30, 3)])
    def test_common_words_are_ten_times_as_frequent(self, length: int, common: int, others: int) -> None:
        some = plan("cwe", length)
        for text, (question,), share in zip(some.haystack, (some.middle, some.end), (MIDDLE, 1 - MIDDLE), strict=True):
            words = text_of(text, round(share * length / 5) - 15).split()[1::2]
            counts = collections.Counter(words)
            top = {word for word, _ in counts.most_common(10)}
            assert top == set(question.values)
            assert list(question.values) == sorted(question.values, key=words.index)
            assert all(common - 3 <= counts[word] <= common for word in top)
            assert max(count for word, count in counts.items() if word not in top) <= others

    @pytest.mark.parametrize("words", [250, 2000])
    def test_coded_words_fall_with_their_rank(self, words: int) -> None:
        some = plan("fwe")
        for text, (question,) in zip(some.haystack, (some.middle, some.end), strict=True):
            counts = collections.Counter(text_of(text, words).split()).most_common(5)
            assert counts[0][0] == "..."
            assert tuple(word for word, _ in counts[1:4]) == question.values
            assert counts[3][1] > counts[4][1]

    @pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
    def test_all_needles_of_a_haystack_have_keys_of_their_own(self, task: str) -> None:
        some = plan(task)
        sentences = text_of(some.haystack[0], 500) + "".join(fact.sentence for fact in some.facts)
        keys = re.findall(r"for (\S+) is", sentences)
        assert len(keys) == len(set(keys)) == 502
        assert some.middle[0].values[0] in some.facts[0].sentence

    def test_stories_answer_their_questions(self) -> None:
        some = plan("story-retrieval")
        story = text_of(some.haystack[0], 300) + "".join(fact.sentence for fact in some.facts)
        assert all(len(re.findall(rf"\b{fact.value}\b", story)) in (1, 2, 3) for fact in some.facts)
        hop = plan("story-multihop")
        for fact, (question,) in zip(hop.facts, (hop.middle, hop.end), strict=True):
            before, after = re.findall(r"bought the ([a-z ]+) from", fact.sentence)
            assert question.values == (before,) and f"buying the {after}?" in question.prompt
        left = plan("story-filtering")
        without = [fact.value for fact in left.facts]
        assert without == [*left.middle[0].values, *left.end[0].values]
        assert all("without buying" in fact.sentence and "bought" not in fact.sentence for fact in left.facts)
        assert "without buying" not in text_of(left.haystack[0], 300)


def layer(length: int = 700, channels: int = 32) -> Layer:
    structure = Structure.draw(length, 4, 2, channels)
    tensors = structure.query(0.3)[0], structure.key[0], structure.value[0]
    return Layer("layer", *tensors, channels**-0.5, facts={"layer": "5"})


class TestAttention:
    @pytest.mark.parametrize("name", ["xattention", "pbs", "flexprefill", "streaming"])
    def test_masked_strips_are_what_the_frontier_gathers(self, name: str) -> None:
        function, dials = RULES[name]
        some = layer(1300)
        judge = Judge(some)
        visits = [
            visit for head in range(some.heads) for visit in function(*some.head(head)[:2], some.scale, dials[:1])
        ]
        output = attend_by_masks(some, visits, room=2 * some.heads * visits[0].tile * some.length)
        for head, visit in enumerate(visits):
            torch.testing.assert_close(output[head], judge.attend(head, visit)[0], atol=1e-5, rtol=1e-4)
        assert (output - judge.output).abs().max() > 1e-3

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize("name", ["xattention", "pbs", "streaming", "flashprefill v2"])
    def test_the_kernel_attends_what_masks_leave(self, name: str, device: str) -> None:
        """Blocks, also of permuted keys, single keys, and means behind keys; the length is no multiple of a tile."""
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("kernels run on the GPU")
        some, (function, dials) = layer(1000, 32 if device == "cpu" else 128), GROUP_RULES[name]
        visit = next(function(Group(*some.group(0), some.scale), dials[:1]))[0]
        assert not visit.mask.all() and (visit.means is None or visit.means.any())
        visit = replace(visit, **{name: x.to(device) for name, x in vars(visit).items() if torch.is_tensor(x)})
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        query, key, value = (x[:1].to(device, dtype) for x in (some.query, some.key, some.value))
        one = replace(some, query=query, key=key, value=value)
        output = attend_visit(*one.head(0), one.scale, visit)
        tolerance = {"atol": 1e-5, "rtol": 1e-4} if device == "cpu" else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(output, attend_by_masks(one, [visit])[0], **tolerance)

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
        # So short a text is within their budgets, or its blocks are too much alike for a share of the best to tell.
        assert error > 0 or name.startswith(("vertical-slash", "Stem, crutches", "FlashPrefill", "s2o, kept dense"))
        assert (sparse.seconds is None) == (not name.lower().startswith("s2o"))

    def test_first_layers_are_dense(self) -> None:
        some = layer(1300)
        attend = with_dense_layers(5, METHODS["StreamingLLM"])
        assert attend(some).density < 1
        assert attend(replace(some, facts={"layer": "4"})).density == 1

    def test_means_stand_for_what_is_left_out(self) -> None:
        some = layer(1300)
        (visits,) = flashprefill_v2(Group(*some.group(1), some.scale), [0.9])
        visit = visits[0]
        assert visit.means is not None and visit.means.any()
        output = attend_visits(replace(some, query=some.query[2:], key=some.key[1:], value=some.value[1:]), visits)
        query, key, value = (x.double() for x in some.head(3))
        rows = torch.arange(1300)
        seen = visit.seen(rows // visit.tile, 1300) & (rows <= rows[:, None])
        exact = (query @ key.T * some.scale).exp() * seen
        means = key[:1280].unflatten(0, (-1, 128)).mean(1), value[:1280].unflatten(0, (-1, 128)).mean(1)
        rest = 128 * (query @ means[0].T * some.scale).exp() * visit.means[rows // visit.tile, :10]
        want = (exact @ value + rest @ means[1]) / (exact.sum(1) + rest.sum(1))[:, None]
        torch.testing.assert_close(output[1].double(), want, atol=1e-5, rtol=1e-4)
        judged = Judge(some).attend(3, visit)
        torch.testing.assert_close(judged[0].double(), want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(judged[1].double(), (exact.sum(1) + rest.sum(1)).log(), atol=1e-5, rtol=1e-4)

    def test_half_precision_stays(self) -> None:
        some = layer(300)
        half = replace(some, **{name: getattr(some, name).bfloat16() for name in ("query", "key", "value")})
        for attend in (attend_densely, METHODS["XAttention"], METHODS["s2o"]):
            output = attend(half).output
            assert output.dtype == torch.bfloat16 and output.shape == (4, 300, 32)

    def test_the_ranking_is_counted_as_the_frontier_does(self) -> None:
        some, config = layer(2048), S2OConfig(min_length=0)
        pairs = 4 * sum(range(128, 2049, 128)) * 128
        assert operator(config)(some).ranking == pytest.approx(ranking_flops(some, config) / (4 * 32 * pairs))


def model() -> torch.nn.Module:
    some = tiny("llama")
    some.config.max_position_embeddings = 4096
    return some


def outcomes(attentions: dict[str, Any]) -> list[Outcome]:
    case = build_case(Characters(VOCABULARY), "niah", 1600, 0, Settings(depths=3))
    return list(read_case(model(), case, attentions, lambda: None))


class TestRun:
    def test_exact_attention_predicts_what_dense_attention_does(self) -> None:
        exact = {"exact": operator(S2OConfig(min_length=0, threshold=0)), "all": rule(RULES["xattention"][0], 1.0)}
        dense, *others = outcomes(exact)
        assert dense.method == "dense" and dense.agreed == dense.scored > 300
        for other in others:
            assert other.found == dense.found and other.depths == dense.depths
            assert other.nats["end"] == pytest.approx(dense.nats["end"], rel=1e-4) and dense.nats["end"][0] > 0
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
        list(read_case(model(), case, {"StreamingLLM": METHODS["StreamingLLM"]}, lambda: steps.append(1)))
        assert len(steps) == 4

    def test_counting_the_work_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A second a call of attention, and ten for each count of its work and for each choice of a rule."""
        now = [0.0]
        monkeypatch.setattr("time.perf_counter", lambda: now[0])

        def passing(seconds: float, function: Any) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                now[0] += seconds
                return function(*arguments, **keywords)

            return call

        for name, seconds in (("operator_attention", 1.0), ("ranking_flops", 10.0), ("attend_visits", 10.0)):
            monkeypatch.setattr(attention, name, passing(seconds, getattr(attention, name)))
        methods = {name: METHODS[name] for name in ("StreamingLLM", "s2o, kept dense")}
        found = outcomes({"s2o": operator(S2OConfig(min_length=0)), **methods})
        dense, sparse, other, kept = ((one.seconds, one.prefill_seconds, one.attention_seconds) for one in found)
        assert dense == kept == (0, 0, 0) and sparse == (22, 2, 2) and other == (20, None, None)

    def test_layers_with_a_window_attend_as_in_the_model(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.Gemma3TextConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=1,
            head_dim=16, sliding_window=64, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        some = transformers.Gemma3ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
        case = build_case(Characters(VOCABULARY), "niah", 1600, 0, Settings())
        attended: list[str] = []

        def nothing(layer: Layer) -> Attended:
            attended.append(layer.facts["layer"])
            return Attended(torch.zeros_like(layer.query), 0.25, 0.0)

        exact = operator(S2OConfig(min_length=0, threshold=0))
        dense, same, other = read_case(some, case, {"exact": exact, "nothing": nothing}, lambda: None)
        assert same.agreed == dense.agreed and same.loss == pytest.approx(dense.loss, rel=1e-5) != other.loss
        assert attended == ["1"] and other.density == 0.25

    def test_models_without_sdpa_are_refused(self) -> None:
        some = model()
        some.set_attn_implementation("eager")
        case = build_case(Characters(VOCABULARY), "niah", 1600, 0, Settings())
        with pytest.raises(UsageError, match="does not call SDPA"):
            list(read_case(some, case, {}, lambda: None))


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
    nats = {place: [loss / 100, 0.0] for place in PLACES}
    return replace(Outcome(method, "niah", 2048, 0, 1.0, 0.2, 0.1, 100, loss, 90, places, nats, depths), **changes)


class TestReport:
    def test_documents_are_taken_together(self) -> None:
        some = [
            outcome("dense", 100, [True, False], prefill_seconds=3, attention_seconds=0.5),
            outcome("s2o", 110, [False, True]),
            outcome("dense", 20, [True, True], sample=1, scored=50, prefill_seconds=9, attention_seconds=0.7),
            outcome("s2o", 25, [True, False], sample=1, scored=50, agreed=45, density=0.4),
            outcome(
                "dense", 0, [True, True], task="multikey", scored=0, agreed=0, prefill_seconds=1, attention_seconds=0.1
            ),
            outcome("s2o", 1, [True, True], sample=7),
        ]
        dense, sparse = summarise(some)
        assert (dense.method, sparse.method) == ("dense", "s2o")
        assert dense.perplexity == pytest.approx(2.718281828 ** (120 / 150))
        assert sparse.perplexity_ratio == pytest.approx(2.718281828 ** (15 / 150))
        assert sparse.agreement == pytest.approx(135 / 150)
        assert sparse.density == pytest.approx(0.3) and sparse.work == pytest.approx(0.4)
        assert (dense.prefill_seconds, dense.attention_seconds) == (3, 0.5)
        assert (sparse.prefill_seconds, sparse.attention_seconds) == (None, None)
        counts = {(one.task, one.place, one.method): one for one in count_lookups(some)}
        lost = counts["niah", "middle", "s2o"]
        assert lost.prompts == 2
        assert (lost.flips.asked, lost.flips.kept, lost.flips.lost, lost.flips.gained) == (4, 1, 2, 1)
        assert (lost.flips.worse, lost.flips.better, lost.flips.found, lost.flips.found_dense) == (1, 0, 2, 3)
        assert lost.flips.nats - lost.flips.nats_dense == pytest.approx(0.15)
        assert counts["niah", "end", "s2o"].flips.kept == 4
        assert counts["multikey", "middle", "dense"].flips.found == 2
        assert counts["all", "middle", "dense"].flips.asked == 6

    def test_mcnemar_counts_coins(self) -> None:
        assert mcnemar(0, 0) == mcnemar(3, 3) == 1
        assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
        assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
        assert Flips(worse=9, better=1).p_value == mcnemar(9, 1)

    def test_without_text_there_is_no_perplexity(self) -> None:
        (summary,) = summarise([outcome("dense", 0, [True, True], scored=0, agreed=0)])
        assert summary.perplexity is None and summary.agreement is None
        assert len(list(tables([outcome("dense", 0, [True, True], scored=0, agreed=0)]))) == 3

    def test_needles_by_depth_and_length(self) -> None:
        some = [
            outcome("dense", 1, [True, False]),
            outcome("dense", 1, [False, False], length=4096),
            outcome("dense", 1, [True, True], sample=1),
        ]
        assert needles(some, "dense", "middle") == {
            (0.0, 2048): [True, True],
            (1.0, 2048): [False, True],
            (0.0, 4096): [False],
            (1.0, 4096): [False],
        }
        assert depth_picture(some) is not None
        assert depth_picture([replace(some[0], task="multikey")]) is None
        assert flips_picture(some, 2048) is None

    def test_a_page_shows_tables_and_flips(self) -> None:
        some = [outcome("dense", 100, [True, True]), outcome("s2o", 100, [False, True])]
        figure = flips_picture(some, 2048)
        assert figure is not None
        lost = [bar.get_width() for bar in figure.axes[0].patches]
        assert lost == [-0.5, 0.0]
        html = page(some, "a < b", "s2o bench quality > x", {"bars": figure})
        shown = ("a &lt; b", "<p>s2o bench quality &gt; x</p>", "data:image/png;base64,", "-1 +0", "2 of 2")
        assert all(each in html for each in shown)

    def test_plain_data(self) -> None:
        found = [outcome("dense", 100, [True, False])]
        data = json.loads(json.dumps(as_dict(found, {"model": "m"}, torch.device("cpu"))))
        summary, *lookups = data["rows"]
        assert data["settings"] == {"model": "m"} and summary["work"] == pytest.approx(0.3)
        assert {one["place"] for one in lookups} == set(PLACES) and lookups[0]["found"] == 1


class TestJournal:
    def test_a_run_cut_off_goes_on(self, tmp_path: Path) -> None:
        path = tmp_path / "answers.jsonl"
        journal = Journal(path, "m", {"seed": 0})
        first, second = outcome("dense", 1, [True, False]), outcome("s2o", 2, [False, True])
        journal.add(first)
        journal.add(first)
        journal.add(second)
        lines = path.read_text().splitlines()
        answer = json.loads(lines[1])
        assert [answer[name] for name in ("model", "method", "task", "length", "place", "sample")] == [
            "m", "dense", "niah", 2048, "middle", 0,
        ]  # fmt: skip
        assert answer["found"] == [True, False] and len(lines) == 7
        path.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
        again = Journal(path, "m", {"seed": 0})
        assert again.outcomes == [first] and second.key not in again
        again.add(second)
        assert Journal(path, "m", {"seed": 0}).outcomes == [first, second]

    @pytest.mark.parametrize("text", ["", "[]\n", "no json\n"])
    def test_other_files_are_refused(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "answers.jsonl"
        path.write_text(text)
        with pytest.raises(UsageError, match=r"answers.jsonl is no file of answers: delete it to start anew\.$"):
            Journal(path, "m", {})

    def test_a_folder_in_its_place_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "answers.jsonl").mkdir()
        with pytest.raises(UsageError, match=r"answers\.jsonl cannot be read: Is a directory\.$"):
            Journal(tmp_path / "answers.jsonl", "m", {})

    def test_another_configuration_is_refused(self, tmp_path: Path) -> None:
        Journal(tmp_path / "a", "m", {"documents": {"seed": 0}})
        with pytest.raises(UsageError, match=r"where configuration\.documents\.seed was 0, not 1: choose another"):
            Journal(tmp_path / "a", "m", {"documents": {"seed": 1}})

    @pytest.mark.parametrize(("head", "was"), [({"rows": []}, None), ({"configuration": "fast"}, "fast")])
    def test_files_without_a_configuration_are_refused(self, head: dict[str, Any], was: Any, tmp_path: Path) -> None:
        (tmp_path / "a").write_text(json.dumps(head) + "\n")
        with pytest.raises(UsageError, match=f"answers of another run, where configuration was {was}, not"):
            check_configuration(tmp_path / "a", {"seed": 0})

    def test_a_line_that_is_no_answer(self, tmp_path: Path) -> None:
        Journal(tmp_path / "a", "m", {})
        with (tmp_path / "a").open("a") as file:
            file.write('{"place": "middle"}\n')
        with pytest.raises(UsageError, match="holds a line that is no answer"):
            Journal(tmp_path / "a", "m", {})


def run(**changes: Any) -> None:
    options: dict[str, Any] = {
        "model": None, "length": [1600], "method": None, "s2o": None, "task": None, "samples": 1, "depths": 2,
        "scored": 100, "filler": None, "document": None, "seed": 0, "yarn": None, "device": "cpu",
        "dtype": "float32", "output": None, "as_json": False,
    }  # fmt: skip
    command.main(**(options | changes))


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_model", lambda *_: (model(), Characters(VOCABULARY)))


def test_kascade_reads_a_development_text_first(tiny_model: None, tmp_path: Path) -> None:
    run(method=["Kascade", "Kascade, crutches"], task=["niah"], output=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()[1:]]
    densities = {line["method"]: line["density"] for line in lines if line["place"] == "text"}
    assert densities["Kascade"] < densities["Kascade, crutches"] < 0.7


def test_command_line(tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(method=["FlexPrefill"], s2o=["pool=4 threshold=0.01"], task=["niah"], samples=2, output=out)
    printed = " ".join(capsys.readouterr().out.split())
    assert "1,600 tokens: work, time, and perplexity" in printed and "s2o, pool=4 threshold=0.01" in printed
    saved = json.loads((out / "quality.json").read_text())
    summaries = [row for row in saved["rows"] if "work" in row]
    assert [one["method"] for one in summaries] == ["dense", "FlexPrefill", "s2o, pool=4 threshold=0.01"]
    assert saved["settings"]["documents"]["depths"] == 2
    assert (out / "quality.html").stat().st_size > 20_000
    run(method=["StreamingLLM"], task=["niah"], yarn=2.0, length=[1700, 1600], depths=1, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert [row["length"] for row in printed["rows"] if "work" in row] == [1600, 1600, 1700, 1700]


def test_a_run_reads_only_what_is_left(
    tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[str] = []
    whole = command.read_case

    def cut_off(some: Any, case: Any, methods: Any, advance: Any) -> Iterator[Outcome]:
        for found in whole(some, case, methods, advance):
            if len(read) == 3:
                raise KeyboardInterrupt
            read.append(found.method)
            yield found

    monkeypatch.setattr(command, "read_case", cut_off)
    options = {"method": ["StreamingLLM"], "task": ["niah"], "samples": 2, "output": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        run(**options)
    assert read == ["dense", "StreamingLLM", "dense"]
    assert "dense" in (tmp_path / "quality.html").read_text()
    read.clear()

    def go_on(some: Any, case: Any, methods: Any, advance: Any) -> Iterator[Outcome]:
        for found in whole(some, case, methods, advance):
            read.append(found.method)
            yield found

    monkeypatch.setattr(command, "read_case", go_on)
    run(**options)
    assert read == ["dense", "StreamingLLM"]  # dense attention once more, to compare with
    run(**options)
    assert read == ["dense", "StreamingLLM"]
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("the model is loaded before it is refused"))
    for change, message in (
        ({"seed": 1}, r"documents\.seed was 0, not 1"),
        ({"yarn": 2.0}, r"yarn was None, not 2\.0"),
        ({"dtype": "bfloat16"}, "dtype was float32, not bfloat16"),
        ({"model": "other"}, "model was SmolLM2-135M-Instruct, not other"),
    ):
        with pytest.raises(UsageError, match=rf"where configuration\.{message}"):
            run(**options, **change)
    monkeypatch.setitem(command.PRESETS, "s2o, fast", S2OConfig.fast(min_length=0, threshold=0.5))
    with pytest.raises(UsageError, match=r"where configuration\.s2o\.s2o, fast\.threshold was .*, not 0\.5"):
        run(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": ["flash"]}, "--method must be one of 's2o', .*, not 'flash'"),
        ({"task": ["haystack"]}, "--task must be one of 'niah', .*, not 'haystack'"),
        ({"filler": "essay"}, "--filler must be one of 'code', .*, not 'essay'"),
        ({"filler": "document"}, "--filler document needs a --document"),
        ({"filler": "prose", "document": Path("a")}, "--filler prose takes no --document"),
        ({"document": Path("nowhere.txt")}, "The document nowhere.txt cannot be read"),
        ({"s2o": ["pools=4"]}, "unknown option 'pools'"),
    ],
)
def test_what_is_wrong_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(**options)


def test_too_many_positions(tiny_model: None) -> None:
    with pytest.raises(UsageError, match="at most 4,096 positions"):
        run(length=[1600, 9000])
