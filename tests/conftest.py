"""What all tests share: hypothesis profiles, the `gpu` marker, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from .shortcuts import hasten_interpreter, leave_guards_unmeasured, round_to_float8_as_gpus_do

if not torch.cuda.is_available():
    # Before anything imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

# Inductor need not compile programs that find out whether a CPU's vector instructions work, once for each cache.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# What a pass cannot do is no warning in the tests; the processes that they start inherit it.
os.environ["S2O_RAISE_ERRORS"] = "1"

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


# What `s2o tune` measured on this machine changes no test.
os.environ["S2O_TUNED"] = "0"


@pytest.fixture(scope="session", autouse=True)
def fast_cpu() -> Iterator[None]:
    """Defaults are those of a CPU that ranks fast, on every machine; processes that tests start have their own."""
    from s2o_compile.ops import break_even, devices

    def kind_of(device: torch.device) -> str:
        return devices.AVX512 if device.type == "cpu" else devices.kind_of(device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(break_even, "kind_of", kind_of)
        yield


@pytest.fixture(scope="session", autouse=True)
def shortcuts() -> None:
    """What torch and Triton do besides their work is left out, and what the interpreter does wrong is mended."""
    leave_guards_unmeasured()
    if os.environ.get("TRITON_INTERPRET") == "1":
        hasten_interpreter()
        round_to_float8_as_gpus_do()


def pytest_collection_finish() -> None:
    """What is imported is left out of garbage collections, of which compilers cause many."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
