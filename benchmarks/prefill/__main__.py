"""Time to the first token of whole prefills: eager, compiled with Inductor alone, and with the backend s2o.

    python -m benchmarks.prefill llama-3.1-8b --layers 4 --length 32768 --density 0.05
    python -m benchmarks.prefill smollm2 --length 8192
    python -m benchmarks.prefill smollm2 --length 8192 --padded
    python -m benchmarks.prefill smollm2 --length 2048 --length 8192 --dynamic --only inductor --only s2o

The model is called as with ``model(**tokenizer(text))``, which gives it a mask of ones, and without that mask.

With random weights attention has no structure that could decide what to visit; there the threshold is chosen at each
length such that a given density is visited. Logits are of the last token alone; a cache is filled, as in serving.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from torch._inductor.utils import fresh_cache

from s2o_compile._console import UsageError
from s2o_compile.testbed.document import check_document
from s2o_compile.testbed.model import choose_device, choose_dtype
from s2o_compile.testbed.options import Device, DType, Json, make_folder, read_config

from ..command import announce, by_device, progress_bars, run, wide_console
from ..density import check_density
from ..quality.yarn import stretch
from ..results import as_text, save
from .backends import BACKENDS, CUDNN_FIRST, ONE_LENGTH, UNCOMPILED, Contenders, choose_backends, preferring
from .calls import padded_calls, plain_calls
from .measure import Row, measure
from .models import RANDOM_LLAMA, SMOLLM2, load
from .report import as_dict, describe, table

LENGTHS = {"cpu": [2048, 8192], "cuda": [8192, 32768, 131_072]}
DENSITY = 0.1
"""Of random weights, where none is given."""


def main(
    model: Annotated[
        str, typer.Argument(help=f"{RANDOM_LLAMA} (random weights), {SMOLLM2}, or a transformers model.")
    ] = SMOLLM2,
    length: Annotated[list[int] | None, typer.Option(min=1, help=f"Tokens; {by_device(LENGTHS)}")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of a model of random weights.")] = 32,
    density: Annotated[
        float | None, typer.Option(help=f"Share to visit, by the threshold; {DENSITY} for random weights.")
    ] = None,
    s2o: Annotated[str, typer.Option(help="Fields of S2OConfig or Ranking, NAME=VALUE ...")] = "",
    document: Annotated[Path | None, typer.Option(help="A text file; Python's standard library by default.")] = None,
    mask: Annotated[
        bool | None, typer.Option("--mask/--no-mask", help="Only with the tokenizer's mask of ones, or only without.")
    ] = None,
    padded: Annotated[
        bool,
        typer.Option(
            "--padded",
            help="Four prompts, of the length and 7/8, 3/4 and 1/2 of it: as one batch, padded left, and one by one.",
        ),
    ] = False,
    cudnn: Annotated[
        bool, typer.Option("--cudnn", help="SDPA prefers cuDNN in all rows; by default PyTorch's order decides.")
    ] = False,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Compile once for all lengths; by default for each of them.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A row: {'; '.join(BACKENDS)}, which are the default; {ONE_LENGTH}, beside --dynamic; "
            f"{'; '.join(UNCOMPILED[1:])}. Repeatable."
        ),
    ] = None,
    yarn: Annotated[float | None, typer.Option(help="Factor of YaRN, for more positions than the model's.")] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Compile without what Inductor and Triton have cached on disk.")
    ] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed prefills of each.")] = 3,
    profiled: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Attention's share, by one prefill more; on a GPU.")
    ] = True,
    device: Device = "auto",
    dtype: DType = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for prefill.json.")] = None,
    as_json: Json = False,
) -> None:
    """Time whole prefills: eager, with Inductor, and with s2o, where all calls run dense and as set.

    Each is called with the tokenizer's mask of ones, and without it.
    """
    place = choose_device(device)
    config = read_config(None, None, s2o.split(), "--s2o")
    if density is None and model == RANDOM_LLAMA:
        density = DENSITY
    if padded and mask is False:
        raise UsageError("--padded needs masks: leave out --no-mask.")
    if density is not None:
        check_density(density)
    lengths = length or LENGTHS[place.type]
    if model != RANDOM_LLAMA:
        check_document(document, min(lengths))
    backends = choose_backends(only or [])
    if output:
        make_folder(output)
    rows: list[Row] = []
    with progress_bars() as progress, contextlib.ExitStack() as settings:
        settings.enter_context(preferring(CUDNN_FIRST if cudnn else []))
        if cold:
            settings.enter_context(fresh_cache())
        task = progress.add_task("Loading the model", total=len(lengths))
        subject = load(model, layers, place, choose_dtype(dtype, place))
        if yarn is not None:
            stretch(subject.model, yarn)
        note = describe(subject, density, cudnn, dynamic, yarn)
        contenders = Contenders(subject.model, backends, dynamic)
        for tokens in lengths:

            def show(step: str, tokens: int = tokens) -> None:
                announce(progress, task, f"{tokens:,} tokens: {step}")

            prompt = subject.tokens(tokens, document)
            calls = padded_calls(prompt) if padded else plain_calls(prompt, (True, False) if mask is None else (mask,))
            own = measure(contenders, prompt, calls, config, density, repetitions, profiled, show)
            if not as_json:
                wide_console().print(table(own, note, subject.positions))
            rows += own
            progress.advance(task)
            found = as_dict(subject, rows, note, repetitions)
            if output:
                save(found, output / "prefill.json")
    if as_json:
        print(as_text(found))


if __name__ == "__main__":
    run(main)
