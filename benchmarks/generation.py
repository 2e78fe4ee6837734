"""Whether a model generates the same text with this attention as with dense attention.

    python -m benchmarks.generation --length 4096 --only dynamic --only "static padded" --prompts 10

Prompts are documents that end in a question for one of the values hidden in them. Greedily generated tokens are
compared, for each way to generate, with those of dense attention generated the same way: with SDPA, and where the model
is compiled by Inductor.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import s2o_compile
from s2o_compile.ops import S2OConfig
from s2o_compile.testbed.document import build_document, check_document, read_texts
from s2o_compile.testbed.model import (
    check_length,
    choose_device,
    choose_dtype,
    load_model,
    model_name,
    why_prefill_is_dense,
)
from s2o_compile.testbed.options import Device, Json, check_names, make_folder, read_config

from .command import progress_bars, run
from .results import as_text, record, save

FIRST = 16
"""How many of the first tokens are compared on their own."""
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 1024},
}
BEAMS = 3


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to generate.

    Attributes:
        cache: One of `CACHES`.
        batch: "" for one prompt, "padded" for it and a shorter one in a batch, "beams" for beam search.
        compiled: Whether the model is compiled.
    """

    cache: str
    batch: str
    compiled: bool

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return " ".join(filter(None, (self.cache, self.batch, "compiled" if self.compiled else "")))

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``generate``, which compiles nothing of its own accord."""
        beams = BEAMS if self.batch == "beams" else 1
        return {**CACHES[self.cache], "num_beams": beams, "do_sample": False, "disable_compile": True}


WAYS = {
    way.name: way for way in itertools.starmap(Way, itertools.product(CACHES, ("", "padded", "beams"), (False, True)))
}


@dataclasses.dataclass
class Row:
    """How many of the generated sequences equal those of dense attention: altogether, and in their first tokens."""

    way: str
    threshold: float
    sequences: int
    equal: int
    first: int


@contextmanager
def attending(model: Any, compiled: bool, config: S2OConfig | None) -> Iterator[None]:
    """Let a model of transformers attend sparsely by `config`, or densely where that is None."""
    backend = "inductor" if config is None else s2o_compile.s2o.with_config(config)
    model.set_attn_implementation("sdpa" if compiled or config is None else "s2o")
    if compiled:
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, backend=backend)
    elif config is not None:
        s2o_compile.configure(model, config)
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)


def generate(model: Any, prompt: list[int], way: Way, new: int) -> torch.Tensor:
    """The tokens [sequences, new] that a prompt goes on with.

    Padding stands on the left of the shorter prompt of a batch, which is the last three quarters of the other.
    """
    prompts = [prompt, prompt[len(prompt) // 4 :]] if way.batch == "padded" else [prompt]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts], device=model.device)
    limits = {"min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **limits, **way.options)[:, longest:].cpu()


def compare(got: list[torch.Tensor], want: list[torch.Tensor], name: str, threshold: float) -> Row:
    """Count the sequences [sequences, new] of all prompts that are equal."""
    ours, dense = torch.cat(got), torch.cat(want)
    same = ours == dense
    return Row(name, threshold, len(same), int(same.all(1).sum()), int(same[:, :FIRST].all(1).sum()))


def measure(
    model: Any, prompts: list[list[int]], way: Way, configs: list[S2OConfig], new: int, advance: Callable[[], None]
) -> list[Row]:
    """Generate one way with dense attention and with each of `configs`; `advance` is called after each prompt."""

    def generated(config: S2OConfig | None) -> list[torch.Tensor]:
        tokens = []
        with attending(model, way.compiled, config):
            for prompt in prompts:
                tokens.append(generate(model, prompt, way, new))
                advance()
        return tokens

    want = generated(None)
    return [compare(generated(config), want, way.name, config.threshold) for config in configs]


def read_prompts(tokenizer: Any, document: Path | None, length: int, numbers: range) -> list[list[int]]:
    """Prompts of about `length` tokens, each from another piece of text, with a question at the end."""
    prompts = []
    for number in numbers:
        text = build_document(tokenizer, itertools.islice(read_texts(document), number, None), length, seed=number)
        prompts.append(text.tokens[: text.end[-1].start])
    return prompts


def choose_ways(names: list[str]) -> list[Way]:
    """The ways of these names; all where there are none.

    Raises:
        UsageError: A name is unknown.
    """
    check_names("--only", names, WAYS)
    return [WAYS[name] for name in names or WAYS]


def table(rows: list[Row], new: int, note: str) -> Table:
    """One line for each way and threshold."""
    shown = Table("generated", "threshold", "sequences", f"all {new} tokens equal", f"first {FIRST} equal")
    for row in rows:
        shown.add_row(row.way, f"{row.threshold:g}", *map(str, (row.sequences, row.equal, row.first)))
    shown.caption = note
    return shown


def as_dict(rows: list[Row], settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The rows as a result."""
    measures = dict.fromkeys(("sequences", "equal", "first"), ("sequences", None))
    return record("generation", list(map(dataclasses.asdict, rows)), ("way", "threshold"), measures, device, settings)


def main(
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 4096,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 10,
    first: Annotated[int, typer.Option(min=0, help="Number of the first prompt.")] = 0,
    new: Annotated[int, typer.Option(min=FIRST, help="Tokens to generate.")] = 64,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A way to generate: {', '.join(CACHES)}, which padded or beams may follow, and then compiled, as in "
            "'static padded compiled'; repeatable, all by default."
        ),
    ] = None,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Repeatable; by default 0 and that of S2OConfig.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Another field of S2OConfig or Ranking, NAME=VALUE.")] = None,
    model: Annotated[str | None, typer.Option(help="A transformers model; SmolLM2-135M by default.")] = None,
    document: Annotated[Path | None, typer.Option(help="A text file; Python's standard library by default.")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    output: Annotated[Path | None, typer.Option(help="Folder for generation.json.")] = None,
    as_json: Json = False,
) -> None:
    """Compare the tokens that a model generates with sparse and with dense attention."""
    ways = choose_ways(only or [])
    if output:
        make_folder(output)
    place = choose_device(device)
    check_document(document, length)
    thresholds = threshold or (0.0, S2OConfig().threshold)
    configs = [read_config(value, None, option or []) for value in thresholds]
    loaded, tokenizer = load_model(model, place, choose_dtype(dtype, place))
    check_length(loaded, model_name(loaded, model), length + new)
    note = ""
    if configs[0].min_length is None and why_prefill_is_dense(loaded, length, place, configs[0]):
        configs = [dataclasses.replace(config, min_length=1) for config in configs]
        note = f"min_length=1: by default prompts of {length:,} tokens run dense."
    texts = read_prompts(tokenizer, document, length, range(first, first + prompts))
    settings = {
        "model": model_name(loaded, model), "dtype": dtype, "length": length, "prompts": prompts, "new": new,
        "note": note, "s2o": [config.to_dict() for config in configs],
    }  # fmt: skip
    rows: list[Row] = []
    with progress_bars() as progress, torch.no_grad():
        task = progress.add_task("", total=len(ways) * (1 + len(configs)) * prompts)
        for way in ways:
            progress.update(task, description=way.name)
            rows += measure(loaded, texts, way, configs, new, lambda: progress.advance(task))
            if output:
                save(as_dict(rows, settings, place), output / "generation.json")
    if as_json:
        print(as_text(as_dict(rows, settings, place)))
    else:
        Console().print(table(rows, new, note))


if __name__ == "__main__":
    run(main)
