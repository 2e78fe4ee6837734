"""Plans: the bits of launches one by one, for other tensors too, and never a kernel that was compiled for others."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton import knobs
from triton.runtime.jit import JITFunction

from s2o_compile.ops import AttentionResult, Ranking, S2OConfig
from s2o_compile.ops.kernels import compile, pipeline, plan
from s2o_compile.ops.kernels.dense import attend_densely, dense_kernel
from s2o_compile.ops.kernels.launch import launch
from s2o_compile.ops.kernels.plan import ALIGNMENT, Launch, Plan, Zeroing, plan_of, planned
from s2o_compile.ops.memory import limited_workspace
from s2o_compile.ops.visibility import Visibility

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
LENGTH = 90
RANKINGS = {
    "defaults": Ranking(channels=16, merge_length=0),
    "every query": Ranking(channels=16),
    "no tail": Ranking(channels=16, rule="dropped"),
    "lists per head": Ranking(lists="head", channels=None),
    "packed": Ranking(pool=8, guides="kv_head", channels=None, rule="dropped", combine="mean"),
    "output": Ranking(channels=16, measure="output"),
}
TERMS = ["causal", "both directions", "padding", "window", "documents", "mask", "last queries alone"]


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    """No plans of other tests, nor any for others."""
    plan_of.cache_clear()
    yield
    plan_of.cache_clear()


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AttentionResult]:
    """The pipeline without plans."""

    def call(*arguments: Any) -> AttentionResult:
        with monkeypatch.context() as patch:
            patch.setattr(plan, "plan_of", lambda *key: None)
            return pipeline.sparse_attention(*arguments)

    return call


def draw(seed: int, length: int = LENGTH, dtype: torch.dtype = torch.float16, channels: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [
        torch.randn(2, heads, length, channels, generator=generator, device=DEVICE, dtype=dtype) for heads in (2, 1, 1)
    ]


def visibility(name: str, seed: int, length: int = LENGTH) -> Visibility:
    place = torch.arange(length, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    documents = (place // 35).expand(2, -1)
    return {
        "causal": Visibility(True),
        "both directions": Visibility(),
        "padding": Visibility(True, key_padding=torch.rand(2, length, generator=generator, device=DEVICE) > 0.2),
        "window": Visibility(True, window=66),
        "documents": Visibility(True, query_documents=documents, key_documents=documents),
        "mask": Visibility(mask=(torch.rand(length, length, generator=generator, device=DEVICE) > 0.2)[None, None]),
        "last queries alone": Visibility(True),
    }[name]


def assert_equal(got: AttentionResult, want: AttentionResult) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_as_one_by_one(
    one_by_one: Callable[..., AttentionResult], config: S2OConfig, term: str, calls: int = 2
) -> None:
    for seed in range(calls):
        arguments = *draw(seed), visibility(term, seed), 0.2, 0.0, config
        assert_equal(pipeline.sparse_attention(*arguments), one_by_one(*arguments))
    made = plan_of.cache_info()
    assert (made.misses, made.hits) == (1, calls - 1)


@pytest.mark.parametrize("name", RANKINGS)
def test_a_plan_gives_the_bits_of_launches_one_by_one(name: str, one_by_one: Callable[..., AttentionResult]) -> None:
    with limited_workspace(2**14):
        assert_as_one_by_one(one_by_one, S2OConfig(threshold=0.02, ranking=RANKINGS[name]), "causal")


@pytest.mark.parametrize("term", TERMS)
def test_a_plan_gives_them_with_terms(term: str, one_by_one: Callable[..., AttentionResult]) -> None:
    last = 2**40 if term == "last queries alone" else 0
    assert_as_one_by_one(one_by_one, S2OConfig(threshold=0.02, last_queries=last, ranking=Ranking(channels=16)), term)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Plan | None]:
    """The plans that calls from now on find, in order."""
    found: list[Plan | None] = []

    def finding(*key: Any) -> Plan | None:
        found.append(plan_of(*key))
        return found[-1]

    monkeypatch.setattr(plan, "plan_of", finding)
    return found


def call(tensors: list[torch.Tensor], **changes: Any) -> AttentionResult:
    arguments = {"terms": Visibility(True), "scale": 0.2, "softcap": 0.0, "ranking": Ranking(channels=16)} | changes
    config = S2OConfig(threshold=arguments.pop("threshold", 0.02), ranking=arguments.pop("ranking"))
    return pipeline.sparse_attention(*tensors, arguments["terms"], arguments["scale"], arguments["softcap"], config)


def sliced(x: torch.Tensor, start: int) -> torch.Tensor:
    """The same numbers, `start` elements into a storage of their own."""
    storage = x.new_empty(x.numel() + start)
    return storage[start:].view(x.shape).copy_(x)


CHANGES: dict[str, Callable[[list[torch.Tensor]], tuple[list[torch.Tensor], dict[str, Any]]]] = {
    "alignment": lambda tensors: ([sliced(tensors[0], 1), *tensors[1:]], {}),
    "alignment of values": lambda tensors: ([*tensors[:2], sliced(tensors[2], 3)], {}),
    "strides": lambda tensors: ([tensors[0].transpose(1, 2).contiguous().transpose(1, 2), *tensors[1:]], {}),
    "shape": lambda tensors: ([x[:, :, :70] for x in tensors], {}),
    "dtype": lambda tensors: ([x.float() for x in tensors], {}),
    "scale": lambda tensors: (tensors, {"scale": 0.3}),
    "soft cap": lambda tensors: (tensors, {"softcap": 5.0}),
    "threshold": lambda tensors: (tensors, {"threshold": 0.03}),
    "offset": lambda tensors: (tensors, {"terms": Visibility(True, 3)}),
    "window": lambda tensors: (tensors, {"terms": Visibility(True, window=64)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_kernel_depends_on_finds_another_plan(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, tensors = watch(monkeypatch), draw(0)
    call(tensors)
    changed, arguments = CHANGES[change](tensors)
    call(changed, **arguments)
    call(draw(1))
    assert found[0] is not None and found[1] is not None
    assert found[0] is not found[1]
    assert found[2] is found[0]


def test_operands_that_take_no_kernels_are_computed_each_time(
    monkeypatch: pytest.MonkeyPatch, one_by_one: Callable[..., AttentionResult]
) -> None:
    found, arguments = watch(monkeypatch), (Visibility(True), 0.2, 0.0, S2OConfig(ranking=Ranking(channels=8)))
    got = pipeline.sparse_attention(*draw(0), *arguments)
    assert found == [None]
    assert_equal(got, one_by_one(*draw(0), *arguments))


class Kernel:
    """A kernel of two tensors and a number that notes what it is launched on, and is compiled to another like it."""

    arg_names = ("x", "y", "n")
    function, packed_metadata = 1, (4,)

    def __init__(self, compiles: bool) -> None:
        self.compiles = compiles
        self.launched: list[tuple[Any, ...]] = []
        self.run_by: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            self.launched.append((grid, *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)))
            return self if self.compiles else None

        return run

    def run(self, *arguments: Any) -> None:
        self.run_by.append(arguments)


class Pair:
    """Two launches of a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __call__(self, tensors: Any, device: torch.device) -> None:
        (x,) = tensors
        between = torch.empty(5, dtype=torch.float16, device=x.device)
        launch(self.kernel, (3,), x[1:], between[2:], n=7, num_warps=4)
        launch(self.kernel, (2, 5), y=between, x=x, n=1, num_warps=4)


def test_a_kernel_that_is_kept_gets_what_the_first_launch_got(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses as far past the tensor and the workspace, the same grid and numbers, on the current stream."""
    kernel, x = Kernel(compiles=True), torch.zeros(10)
    monkeypatch.setattr(plan, "_stream", lambda device: 99)
    compute = Pair(kernel)
    for _ in range(2):
        planned(compute, (x,), torch.device("cpu"))
    assert [(grid, one - x.data_ptr(), n) for grid, one, _, n in kernel.launched] == [
        ((3, 1, 1), 4, 7),
        ((2, 5, 1), 0, 1),
    ]
    rest = (99, 1, (4,), None, None, None)
    for first, (*grid, stream, function, metadata, launched, enter, leave, one, _, n) in zip(
        kernel.launched, kernel.run_by, strict=True
    ):
        assert (tuple(grid), one, n) == (first[0], first[1], first[3])
        assert (stream, function, metadata, launched, enter, leave) == rest
    for between, start in ((launches[0][-2], launches[1][-2]) for launches in (kernel.launched, kernel.run_by)):
        assert between - start == 4 and start % ALIGNMENT == 0


def test_a_plan_keeps_what_its_kernels_were_compiled_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton unloads a kernel that nothing keeps, as where its caches are cleared."""
    made: list[weakref.ref[Kernel]] = []

    class Forgetful(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Kernel:
                compiled = Kernel(compiles=True)
                made.append(weakref.ref(compiled))
                return compiled

            return run

    monkeypatch.setattr(plan, "_stream", lambda device: 99)
    compute = Pair(Forgetful(compiles=True))
    for _ in range(2):
        planned(compute, (torch.zeros(10),), torch.device("cpu"))
    gc.collect()
    assert [len(compiled.run_by) for compiled in (one() for one in made) if compiled is not None] == [1, 1]


def test_where_no_kernel_is_kept_it_is_looked_for_each_time() -> None:
    kernel = Kernel(compiles=True)
    compute = Pair(kernel)
    for _ in range(3):
        planned(compute, (torch.zeros(10),), torch.device("cpu"))
    assert len(kernel.launched) == 6
    assert not kernel.run_by


def test_kernels_of_launches_that_hooks_watch_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of profilers that instrument kernels cannot be launched once the profiler has gone."""
    kernel = Kernel(compiles=True)
    compute = Pair(kernel)
    for stream in (None, 99, None, 99):
        monkeypatch.setattr(plan, "_stream", lambda device, stream=stream: stream)
        planned(compute, (torch.zeros(10),), torch.device("cpu"))
    assert len(kernel.launched) == 6
    assert len(kernel.run_by) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_a_plan_is_compiled_once_before_it_runs(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On what it is launched on; and it is launched even if that fails."""
    kernel, compiled = Kernel(compiles=True), []

    def run(*arguments: Any, **named: Any) -> None:
        if not named:
            return
        assert not kernel.launched
        compiled.append((named, *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)))
        if fails:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(kernel, "run", run)
    monkeypatch.setattr(plan, "_stream", lambda device: 99)
    compute, x = Pair(kernel), torch.zeros(10)
    for _ in range(2):
        planned(compute, (x,), torch.device("cpu"))
    assert len(kernel.launched) == 2
    triton = {"num_warps": 4, "enable_fp_fusion": True}
    options = [{"grid": grid, "warmup": True, **triton} for grid, *_ in kernel.launched]
    want = [(option, *arguments) for option, (_, *arguments) in zip(options, kernel.launched, strict=True)]
    assert compiled == (want[:1] if fails else want)


@given(st.lists(st.tuples(st.integers(1, 700), st.booleans()), min_size=1, max_size=12))
def test_allocations_in_use_do_not_overlap_and_the_others_are_used_again(sizes: list[tuple[int, bool]]) -> None:
    kernel = Mock(arg_names=("x",))

    def compute(tensors: Any, device: torch.device) -> None:
        kept: list[torch.Tensor] = []
        for size, keeps in sizes:
            x = torch.empty(size, dtype=torch.uint8, device="meta")
            launch(kernel, (1,), x)
            kept += [x] * keeps
            del x
            for place in range(len(kept)):
                launch(kernel, (1,), kept[place])

    made = plan_of(compute, (), torch.device("cpu"), ())
    assert made is not None
    starts = iter(step.operands[0][1].offset for step in made.steps if isinstance(step, Launch))
    kept: list[range] = []
    largest = 0
    for size, keeps in sizes:
        place = range(start := next(starts), start + size)
        assert not any(place.start < other.stop and other.start < place.stop for other in kept)
        largest = max(largest, sum(-(-len(other) // ALIGNMENT) * ALIGNMENT for other in [*kept, place]))
        kept += [place] * keeps
        for other in kept:
            assert next(starts) == other.start
    assert made.size >= max(other.stop for other in kept) if kept else made.size
    if not any(keeps for _, keeps in sizes) or all(keeps for _, keeps in sizes):
        assert made.size == largest


def test_what_is_set_to_zero_is_zero() -> None:
    workspace = torch.ones(1024, dtype=torch.uint8)
    Zeroing(256, 10).run((workspace,), (None,))
    assert workspace.sum() == 1024 - 10 and not workspace[256:266].any()


# On a GPU


@pytest.fixture
def only_kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """From its call on, kernels that are not kept are an error."""

    def start() -> None:
        monkeypatch.setattr(JITFunction, "run", Mock(side_effect=AssertionError("a kernel was looked for")))

    return start


GPU_RANKINGS = RANKINGS | {"defaults": Ranking(merge_length=0)}
LENGTHS = [1008, 1009, 1024, 33]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", GPU_RANKINGS)
def test_the_second_call_runs_kept_kernels_alone(name: str, dtype: torch.dtype, only_kept: Any) -> None:
    ranking = GPU_RANKINGS[name]
    # Twice the channels that keys are ranked in: with more there is no plan.
    first, other = (draw(seed, 1000, dtype, 128 if name == "defaults" else 32) for seed in range(2))
    want, others = call(first, ranking=ranking), call(other, ranking=ranking)
    assert not torch.equal(want.output, others.output)
    only_kept()
    assert_equal(call(first, ranking=ranking), want)
    assert_equal(call(other, ranking=ranking), others)


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[tuple[str, bool]]]:
    """The kernels that a call has Triton compile, and whether ahead of their launch."""

    def look(call: Callable[[], object]) -> list[tuple[str, bool]]:
        compiled: list[tuple[str, bool]] = []

        def hook(*, fn: Any, is_manual_warmup: bool, **_: Any) -> None:
            compiled.append((fn.name.rpartition(".")[2], is_manual_warmup))

        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, "jit_cache_hook", hook)
            call()
        return compiled

    return look


def forget(kernels: set[Any]) -> None:
    """Have Triton look for their binaries anew."""
    for kernel in kernels:
        kernel.device_caches.clear()
    plan_of.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("name", GPU_RANKINGS)
def test_launches_find_what_was_compiled_ahead(
    name: str, start: int, lookups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of aligned tensors and of others; and calls of other lengths compile nothing."""
    channels, ranking = 128 if name == "defaults" else 32, GPU_RANKINGS[name]
    first, other = ([sliced(x, start) for x in draw(9, n, torch.bfloat16, channels)] for n in (9008, 9999))
    found = watch(monkeypatch)
    want = call(first, ranking=ranking)
    assert found[0] is not None
    kernels = {step.kernel for step in found[0].steps if isinstance(step, Launch)}
    forget(kernels)
    compiled = lookups(lambda: assert_equal(call(first, ranking=ranking), want))
    assert {kernel for kernel, _ in compiled} == {kernel.__name__ for kernel in kernels}
    assert all(ahead for _, ahead in compiled)
    assert not lookups(lambda: call(other, ranking=ranking))


@pytest.mark.gpu
def test_dense_launches_find_what_was_compiled_ahead(lookups: Any) -> None:
    tensors, other = draw(9, 1008, torch.bfloat16, 128), draw(9, 999, torch.bfloat16, 128)
    forget({dense_kernel})
    assert lookups(lambda: attend_densely(*tensors, Visibility(True), 0.2, 0.0)) == [("dense_kernel", True)]
    assert not lookups(lambda: attend_densely(*other, Visibility(True), 0.2, 0.0))


@pytest.mark.gpu
def test_what_fails_to_compile_ahead_is_compiled_by_its_launch(monkeypatch: pytest.MonkeyPatch, lookups: Any) -> None:
    tensors = draw(9, 1008, torch.bfloat16, 128)
    want = attend_densely(*tensors, Visibility(True), 0.2, 0.0)
    forget({dense_kernel})
    monkeypatch.setattr(compile, "_with_launcher", Mock(side_effect=RuntimeError("no compiler")))
    compiled = lookups(lambda: torch.testing.assert_close(attend_densely(*tensors, Visibility(True), 0.2, 0.0), want))
    assert compiled == [("dense_kernel", True), ("dense_kernel", False)]


@pytest.mark.gpu
@pytest.mark.parametrize("first", CHANGES)
@pytest.mark.parametrize("second", CHANGES)
def test_kernels_of_one_layout_never_run_on_another(
    first: str, second: str, one_by_one: Callable[..., AttentionResult]
) -> None:
    """Among them those whose pointers, sizes or strides Triton compiles other kernels for."""
    for change in (first, second, first, second):
        tensors, arguments = CHANGES[change](draw(2, 1000, torch.bfloat16, 128))
        ranking = Ranking()
        config = S2OConfig(threshold=arguments.pop("threshold", 0.02), ranking=ranking)
        rest = {"terms": Visibility(True), "scale": 0.2, "softcap": 0.0} | arguments
        assert_equal(
            pipeline.sparse_attention(*tensors, *rest.values(), config), one_by_one(*tensors, *rest.values(), config)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (2, 1), (16, 16), (6, 2)])
def test_sizes_that_triton_compiles_for(heads: int, kv_heads: int, one_by_one: Callable[..., AttentionResult]) -> None:
    """Ones, multiples of 16 and others, in turn, twice; strides with them."""
    for length in (*LENGTHS, *LENGTHS):
        generator = torch.Generator(DEVICE).manual_seed(length)
        query, key, value = (
            torch.randn(1, n, length, 64, generator=generator, device=DEVICE, dtype=torch.bfloat16)
            for n in (heads, kv_heads, kv_heads)
        )
        arguments = query, key, value, Visibility(True), 0.2, 0.0, S2OConfig(threshold=0.02)
        assert_equal(pipeline.sparse_attention(*arguments), one_by_one(*arguments))


@pytest.mark.gpu
def test_inputs_that_share_their_storage() -> None:
    """Query, key and value of one product, then each by itself with the same strides."""
    packed = torch.randn(1, 500, 3 * 4, 64, device=DEVICE, dtype=torch.bfloat16)
    shared = list(packed.transpose(1, 2).split(4, 1))
    want = call(shared)
    apart = [packed.clone().transpose(1, 2).split(4, 1)[place] for place in range(3)]
    assert_equal(call(apart), want)
    assert plan_of.cache_info().misses == 1


@pytest.mark.gpu
def test_calls_on_another_stream_run_there(only_kept: Any) -> None:
    tensors = draw(3, 2000, torch.bfloat16, 32)
    want = call(tensors)
    only_kept()
    side = torch.cuda.Stream()
    place = [torch.zeros_like(x) for x in tensors]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(place, tensors, strict=True):
            x.copy_(y)
        got = call(place)
    side.synchronize()
    assert_equal(got, want)


@pytest.mark.gpu
def test_two_devices() -> None:
    """With either of them as the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    on_first = draw(4, 1000, torch.bfloat16, 128)
    on_second = [x.to("cuda:1") for x in on_first]
    want = call(on_first)
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            for tensors in (on_first, on_second, on_second):
                got = call(tensors)
                assert torch.cuda.current_device() == current
                assert_equal(AttentionResult(*(x.to("cuda:0") for x in got)), want)


@pytest.mark.gpu
def test_triton_hooks_see_every_launch() -> None:
    tensors, seen = draw(5, 500, torch.bfloat16, 64), []
    call(tensors)

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        call(tensors)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert "attend_kernel" in seen
    watched = len(seen)
    call(tensors)
    assert len(seen) == watched


@pytest.mark.gpu
def test_threads_share_plans(one_by_one: Callable[..., AttentionResult]) -> None:
    inputs = [draw(seed, 1000, torch.bfloat16, 128) for seed in range(4)]
    config = S2OConfig(threshold=0.02)
    wanted = [one_by_one(*tensors, Visibility(True), 0.2, 0.0, config) for tensors in inputs]
    torch.cuda.synchronize()
    found: dict[int, AttentionResult] = {}

    def work(place: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found[place] = call(inputs[place], ranking=Ranking())
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, want in enumerate(wanted):
        assert_equal(found[place], want)


@pytest.mark.gpu
@pytest.mark.parametrize("aligned", [True, False])
def test_captured_calls_repeat_for_other_inputs(aligned: bool, only_kept: Any) -> None:
    """Of kept kernels, in tensors that are aligned or not."""
    places = [x if aligned else sliced(x, 1) for x in draw(6, 1500, torch.bfloat16, 128)]
    inputs = [draw(seed, 1500, torch.bfloat16, 128) for seed in (7, 8)]
    wanted = [call(tensors, ranking=Ranking()) for tensors in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(places, ranking=Ranking())
    torch.cuda.current_stream().wait_stream(side)
    only_kept()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(places, ranking=Ranking())
    for tensors, want in zip(inputs, wanted, strict=True):
        for place, x in zip(places, tensors, strict=True):
            place.copy_(x)
        graph.replay()
        assert_equal(got, want)
