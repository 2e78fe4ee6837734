"""Whether this machine can run sparse attention, and if not, why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .ops import S2OConfig
from .ops.break_even import BreakEven, break_even
from .version import VERSION

LEAST_CAPABILITY = (8, 0)
"""The oldest GPUs that the kernels are compiled for in the tests."""
TOLERANCE = 1e-2
_PACKAGES = ("triton", "transformers")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        found: What was found.
        passed: Whether sparse attention can run as far as this goes.
        advice: What to do, or what follows; '' for nothing.
    """

    name: str
    found: str
    passed: bool = True
    advice: str = ""


def examine() -> list[Check]:
    """Look at versions, devices and the backend, and run the operator on each device."""
    versions = {"python": platform.python_version(), "s2o-compile": VERSION, "torch": torch.__version__}
    checks = [Check(name, found) for name, found in versions.items()]
    checks += [*map(_version, _PACKAGES), _backend(), _compiler()]
    if not torch.cuda.is_available():
        checks.append(Check("cuda", "none", advice="all runs on the CPU"))
    return checks + [check for device in _devices() for check in _device(device)]


def _version(package: str) -> Check:
    try:
        return Check(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Check(package, "not installed", package == "transformers", f"pip install {package}")


def _backend() -> Check:
    found = "s2o" in torch._dynamo.list_backends(exclude_tags=())
    advice = "" if found else "report this"
    return Check('torch.compile(backend="s2o")', "registered" if found else "unknown", found, advice)


def _compiler() -> Check:
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    advice = "" if compiler else "Inductor compiles for a CPU with a C++ compiler: install one"
    return Check("C++ compiler", compiler or "none", compiler is not None, advice)


def _devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        yield torch.device("cuda", index)


def _device(device: torch.device) -> Iterator[Check]:
    name = str(device)
    if device.type == "cuda":
        yield _gpu(device)
    else:
        threads = torch.get_num_threads()
        yield Check(name, f"{platform.machine()}, {threads} thread{'s' * (threads != 1)}")
    yield from _limits(device)
    yield _self_test(device)


def _limits(device: torch.device) -> Iterator[Check]:
    """From which work on calls run sparse: once, or once a dtype where that decides."""
    single, half = (break_even(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    if single == half:
        yield _break_even(str(device), single)
    else:
        yield _break_even(f"{device}, float32", single)
        yield _break_even(f"{device}, half precision", half)


def _break_even(calls: str, found: BreakEven) -> Check:
    """From which work on such calls run sparse, and who says so."""
    name, otherwise = f"{calls}, sparse from", "calls below run dense unless min_length says otherwise"
    tune = "s2o tune measures it here" if found.is_shipped else "delete this file for the limits as shipped"
    if found.is_never:
        advice = f"dense attention was faster at all lengths; min_length=0 overrides that; {tune}"
        return Check(name, f"no length on ({found.source})", advice=advice)
    least = f"{found.keys:,.0f} keys a query and {found.work:.1e} multiply-adds a call"
    causal = f"a causal prefill of {2 * found.keys:,.0f} tokens has as many keys a query; {otherwise}"
    return Check(name, f"{least} ({found.source})", advice=f"{causal}; {tune}")


def _gpu(device: torch.device) -> Check:
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability[0]}.{capability[1]}"
    recent = capability >= LEAST_CAPABILITY
    return Check(str(device), found, recent, "" if recent else "the kernels need capability 8.0 or later")


def _self_test(device: torch.device) -> Check:
    """Run the operator at threshold 0 on random numbers and compare it with SDPA."""
    name = f"{device}, self-test"
    query, key, value = torch.randn(3, 1, 2, 256, 64, device=device)
    fields = S2OConfig(threshold=0, min_length=0).arguments()
    try:
        output = torch.ops.s2o.attention(query, key, value, is_causal=True, **fields)
    except Exception as error:  # Whatever a driver or a compiler may raise is the finding.
        return Check(name, f"{type(error).__name__}: {str(error).splitlines()[0]}", False, "report this")
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    difference = (output - want).abs().max().item()
    passed = difference < TOLERANCE
    return Check(name, f"differs from SDPA by {difference:.1e}", passed, "" if passed else "report this")
