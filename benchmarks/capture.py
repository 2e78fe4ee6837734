"""Records what chosen layers of a language model attend while it prefills a document, one file a layer.

    python -m benchmarks.capture captures --layer 5 --layer 20 --length 8192

Query, key and value are those that SDPA is called with: after the rotary embedding, key and value of KV heads. Each
file holds the tokens too, and says which model and text it is from (`benchmarks.captured` describes the format).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from s2o_compile._console import UsageError
from s2o_compile.sdpa_intercept import SdpaInputs, SdpaIntercept
from s2o_compile.testbed.document import build_document, check_document, read_texts
from s2o_compile.testbed.model import choose_device, choose_dtype, load_model, model_name
from s2o_compile.testbed.options import Device, DType, make_folder
from s2o_compile.testbed.predict import prefill_inputs

from .captured import Layer, save_layer
from .command import progress_bars, run


def capture(model: Any, inputs: dict[str, Any], keep: Callable[[Layer], None], layers: set[int] | None = None) -> None:
    """Call a model once and hand over what its layers attend.

    Args:
        model: A transformers model whose attention is SDPA, for one sequence without padding.
        inputs: Its keyword arguments.
        keep: Called with each layer, named "layerNN", as it runs.
        layers: Which, counted by calls of attention; None for all.

    Raises:
        UsageError: Attention is not the plain causal kind of a prefill, or a layer does not call SDPA.
    """

    def handle(call: SdpaInputs) -> torch.Tensor:
        if layers is None or call.index in layers:
            keep(read_call(call))
        return call.dense()

    with torch.no_grad(), SdpaIntercept(handle) as calls:
        model(**inputs)
    if calls.count <= max(layers or {0}):
        raise UsageError(f"Layer {max(layers or {0})} cannot be captured: SDPA was called {calls.count} times.")


def read_call(call: SdpaInputs) -> Layer:
    """What one call of SDPA attends.

    Raises:
        UsageError: It is not the plain causal attention of one sequence.
    """
    if not (call.is_plain and call.is_causal and call.query.shape[0] == 1):
        raise UsageError(f"Layer {call.index} cannot be captured: its attention is not causal without other masks.")
    query, key, value = (x[0] for x in (call.query, call.key, call.value))
    facts = {"layer": str(call.index), "query_heads": str(len(query)), "key_heads": str(len(key))}
    return Layer(f"layer{call.index:02}", query, key, value, call.scale, facts)


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights, by name, in the dtype they are loaded in."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe(model: Any, name: str | None, text: str, tokens: list[int]) -> dict[str, str]:
    """The facts that hold for all layers of a capture."""
    return {
        "model": model_name(model, name),
        "revision": getattr(model.config, "_commit_hash", None) or "",
        "weights_sha256": fingerprint(model),
        "text": text,
        "tokens": " ".join(map(str, tokens)),
        "tokens_sha256": hashlib.sha256(torch.tensor(tokens, dtype=torch.int32).numpy().tobytes()).hexdigest(),
        "positions": str(len(tokens)),
        "versions": f"torch {torch.__version__}, transformers {version('transformers')}",
    }


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the files.")],
    layer: Annotated[list[int] | None, typer.Option(min=0, help="A layer; repeatable, all by default.")] = None,
    length: Annotated[int, typer.Option(help="Tokens to prefill.")] = 8192,
    model: Annotated[str | None, typer.Option(help="A transformers model; SmolLM2-135M by default.")] = None,
    document: Annotated[Path | None, typer.Option(help="A text file; Python's standard library by default.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Record the attention inputs of a model that prefills a document."""
    place = choose_device(device)
    check_document(document, length)
    make_folder(output)
    with progress_bars() as progress:
        task = progress.add_task("Loading the model", total=None)
        loaded, tokenizer = load_model(model, place, choose_dtype(dtype, place))
        count = loaded.config.get_text_config().num_hidden_layers
        wanted = set(range(count)) if layer is None else set(layer)
        if max(wanted) >= count:
            raise UsageError(f"--layer must be below {count}, the layers of this model, not {max(wanted)}.")
        text = build_document(tokenizer, read_texts(document), length)
        source = "Python's standard library" if document is None else document.name
        progress.update(task, description="Hashing the weights")
        facts = describe(loaded, model, source, text.tokens)
        progress.update(task, description="Prefill", total=len(wanted))

        def keep(found: Layer) -> None:
            save_layer(replace(found, facts=found.facts | facts), output / f"{found.name}.safetensors")
            progress.advance(task)

        capture(loaded, prefill_inputs(text, place), keep, wanted)
    print(f"Saved {len(wanted)} layers of {facts['model']}, {length:,} positions, in {output}.")


if __name__ == "__main__":
    run(main)
