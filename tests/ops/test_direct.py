"""Launches without the Python of Triton's launchers: C gets what it gets from them, or they are called themselves."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.driver import DriverConfig

from s2o_compile.ops import S2OConfig
from s2o_compile.ops.kernels import direct, pipeline
from s2o_compile.ops.kernels.direct import DirectLaunch, Place
from s2o_compile.ops.kernels.plan import plan_of
from s2o_compile.ops.visibility import Visibility

ATTRIBUTES: dict[str, Any] = {
    "num_ctas": 1,
    "global_scratch_size": 0,
    "global_scratch_align": 1,
    "profile_scratch_size": 0,
    "profile_scratch_align": 1,
    "launch_cooperative_grid": False,
    "launch_pdl": True,
}
NESTED: dict[str, Any] = {"arg_annotations": ["x"], "kernel_signature": b"y", "gsan_enabled": False}
HEAD = 9
"""What launchers take before the arguments of a kernel: a grid of three, and six more."""


class Flat:
    """A launcher that hands on its arguments side by side, as Triton's do up to 3.6."""

    launch: Any
    launch_pdl: Any
    launch_cooperative_grid: Any

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
        self.launch(x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, None, None, *rest)


class Nested(Flat):
    """A launcher that hands on the arguments of the kernel as a tuple, as Triton's do from 3.7 on."""

    arg_annotations: Any
    kernel_signature: Any

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
        flags, annotated = (self.launch_cooperative_grid, self.launch_pdl), (self.arg_annotations,)
        arguments = *annotated, self.kernel_signature, rest[4:]
        self.launch(x, y, z, stream, function, *flags, *rest[:4], None, None, *arguments)


@pytest.fixture(autouse=True, scope="module")
def some_driver() -> Iterator[None]:
    """A driver that launchers can ask for, also without a GPU."""
    with nullcontext() if torch.cuda.is_available() else patch.object(DriverConfig, "active", Mock()):
        yield


def launcher(kind: type, module: str = direct.MODULE, **attributes: Any) -> Any:
    """A launcher that was not made for any kernel, whose function in C notes what it is called with."""
    known = kind if kind is CudaLauncher else type(kind.__name__, (kind,), {"__module__": module})
    made = known.__new__(known)
    made.__dict__.update(ATTRIBUTES | (NESTED if kind is not Flat else {}) | {"launch": Mock()} | attributes)
    return made


def filled(arguments: list[Any], values: tuple[Any, ...]) -> list[Any]:
    return [values[x.index] if isinstance(x, Place) else x for x in arguments]


KINDS = [Flat, Nested, CudaLauncher]
kernel_arguments = st.lists(st.one_of(st.integers(0, 5).map(Place), st.integers(), st.floats(), st.text()), max_size=9)


@pytest.mark.parametrize("kind", KINDS)
@given(rest=kernel_arguments, data=st.data())
def test_c_gets_what_the_launcher_gives_it(kind: type, rest: list[Any], data: st.DataObject) -> None:
    arguments = [2, 3, 4, Place(0), 5, (4, 1, 0), None, None, None, *rest]
    made = launcher(kind)
    direct_launch = DirectLaunch.of(made, arguments, 6)
    assert direct_launch.launch is made.launch
    for _ in range(2):
        values = tuple(data.draw(st.lists(st.integers(), min_size=6, max_size=6)))
        made.launch.reset_mock()
        direct_launch.launch(*direct_launch.pick(values + direct_launch.constants))
        made(*filled(arguments, values))
        assert made.launch.call_count == 2
        got, want = (call.args for call in made.launch.call_args_list)
        assert repr(got) == repr(want)  # NaN equals itself there.


def test_the_installed_launcher_has_the_attributes_that_are_known() -> None:
    """Where Triton gives its launchers others they still work, but each launch takes longer: see `direct`."""
    source = ast.parse(textwrap.dedent(inspect.getsource(CudaLauncher.__init__)))
    stored = {x.attr for x in ast.walk(source) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)}
    assert direct._SCRATCH | {"launch"} <= stored <= direct._KNOWN
    assert CudaLauncher.__module__ == direct.MODULE


class Dropping(Flat):
    """A launcher that does not hand on what it is given."""

    def __call__(self, *arguments: Any) -> None:
        self.launch(*arguments[:-1])


class Computing(Flat):
    """A launcher that computes with what it is given."""

    def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        self.launch(x, y, z, stream + 1, *rest)


class Repeating(Flat):
    """A launcher that hands on something twice."""

    def __call__(self, *arguments: Any) -> None:
        self.launch(*arguments, arguments[-1])


OTHERS: dict[str, Callable[[], Any]] = {
    "another module": lambda: launcher(Flat, "triton.backends.amd.driver"),
    "global scratch": lambda: launcher(Flat, global_scratch_size=16),
    "profile scratch": lambda: launcher(Nested, profile_scratch_size=16),
    "a sanitizer": lambda: launcher(Nested, gsan_enabled=True),
    "an attribute that is not known": lambda: launcher(Nested, queue=[]),
    "arguments dropped": lambda: launcher(Dropping),
    "arguments computed with": lambda: launcher(Computing),
    "arguments repeated": lambda: launcher(Repeating),
    "a function": lambda: Mock(spec_set=lambda *_: None),
    "a bound method": lambda: launcher(Flat).__call__,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_launchers_are_called_themselves(name: str) -> None:
    made, arguments = OTHERS[name](), [2, 3, 4, Place(1), 5, (4, 1, 0), None, None, None, 6, Place(0)]
    direct_launch = DirectLaunch.of(made, arguments, 2)
    assert direct_launch.launch is made
    assert direct_launch.pick((7, 8, *direct_launch.constants)) == (2, 3, 4, 8, 5, (4, 1, 0), None, None, None, 6, 7)


@pytest.mark.gpu
def test_plans_launch_without_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(1, heads, 1000, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (2, 1, 1)
    ]
    plan_of.cache_clear()
    arguments = *inputs, Visibility(True), 0.1, 0.0, S2OConfig()
    want = pipeline.sparse_attention(*arguments)
    monkeypatch.setattr(CudaLauncher, "__call__", Mock(side_effect=AssertionError("a launcher was called")))
    got = pipeline.sparse_attention(*arguments)
    assert all(map(torch.equal, got, want))


@pytest.mark.gpu
def test_c_gets_what_a_real_launcher_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each launch of a plan; compared are the arguments, and nothing is launched."""
    made: list[Any] = []

    class Noting(DirectLaunch):
        @classmethod
        def of(cls, launcher: Any, arguments: Any, values: int) -> DirectLaunch:
            handed: list[tuple[Any, ...]] = []
            given = tuple(range(1, values + 1))
            result = super().of(launcher, arguments, values)
            with patch.object(launcher, "launch", lambda *x: handed.append(x)):
                launcher(*filled(arguments, given))
            assert [result.pick(given + result.constants)] == handed
            made.append(launcher)
            return result

    monkeypatch.setattr("s2o_compile.ops.kernels.plan.DirectLaunch", Noting)
    plan_of.cache_clear()
    inputs = [torch.randn(1, heads, 1000, 128, device="cuda", dtype=torch.bfloat16) for heads in (2, 1, 1)]
    pipeline.sparse_attention(*inputs, Visibility(True), 0.1, 0.0, S2OConfig())
    assert made
