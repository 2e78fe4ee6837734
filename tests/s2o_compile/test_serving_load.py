"""Mixed traffic through transformers' engine, cancelled and preempted at random: no wrong token, no leak, no stall."""

from __future__ import annotations

import gc
import random
import time
from typing import Any, NamedTuple

import pytest
import torch

import s2o_compile

from . import test_continuous_batching as batching

STALL = 120
"""Seconds without any answer after which an engine hangs."""
NEAR = 1e-3
"""Logits this far below the largest are as large, to rounding."""


class Traffic(NamedTuple):
    """How many requests of which lengths, and the engine's budget and cache; `at_once` of them are in it together."""

    requests: int
    shortest: int
    longest: int
    budget: int
    blocks: int
    at_once: int = 24


FEW = Traffic(24, 20, 400, 128, 40)
MANY = Traffic(200, 100, 8000, 1024, 700)


class Answers:
    """What came of the requests of a run."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()


def lengths_of(traffic: Traffic, chance: random.Random) -> list[int]:
    """Lengths of prompts, as many short ones as long ones by order of magnitude."""
    ratio = traffic.longest / traffic.shortest
    return [int(traffic.shortest * ratio ** chance.random()) for _ in range(traffic.requests)]


def prompts_of(traffic: Traffic, chance: random.Random) -> dict[str, list[int]]:
    """Prompts by name, of which every third starts as the others of these do."""
    common = [chance.randrange(1, batching.VOCABULARY) for _ in range(traffic.longest)]
    prompts = {}
    for number, length in enumerate(lengths_of(traffic, chance)):
        own = [chance.randrange(1, batching.VOCABULARY) for _ in range(length)]
        prompts[f"request {number}"] = (common[: length // 2] + own)[:length] if number % 3 == 0 else own
    return prompts


def replay(manager: Any, prompts: dict[str, list[int]], traffic: Traffic, chance: random.Random) -> Answers:
    """Send prompts in bursts, cancel some, and wait for what the others get."""
    answers, waiting, active = Answers(), list(prompts), set()
    last = time.monotonic()
    while waiting or active:
        for _ in range(chance.randrange(4)):
            if waiting and len(active) < traffic.at_once:
                name = waiting.pop()
                manager.add_request(prompts[name], request_id=name, max_new_tokens=chance.randrange(20, 100))
                active.add(name)
        if active and (not answers.cancelled or chance.random() < 0.05):
            name = chance.choice(sorted(active))
            manager.cancel_request(name)
            answers.cancelled.add(name)
            active.discard(name)
        result = manager.get_result(timeout=0.1)
        if result is not None:
            assert result.error is None, result.error
            last = time.monotonic()
            answers.tokens[result.request_id] = result.generated_tokens
            active.discard(result.request_id)
        assert manager.is_running(), "the engine died"
        assert time.monotonic() - last < STALL, f"nothing for {STALL} s, while {sorted(active)} wait"
    while manager.batch_processor.has_pending_requests():
        time.sleep(0.05)
        assert time.monotonic() - last < STALL, "cancelled requests stay in the engine"
    return answers


def assert_right(dense: Any, prompt: list[int], generated: list[int]) -> None:
    """Check that each token has the largest logit of dense attention, given those before it."""
    with torch.no_grad():
        logits = dense(torch.tensor([prompt + generated]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(generated)[:, None])[:, 0]
    assert (chosen >= logits.amax(1) - NEAR).all()


def tensors() -> int:
    """How many tensors are alive."""
    gc.collect()
    return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize(
    "traffic", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=["few", "many"]
)
def test_traffic(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = batching.transformers
    chance = random.Random(0)
    monkeypatch.setitem(batching.COMMON, "max_position_embeddings", 2 * traffic.longest)
    dense, sparse = batching.pair("llama")
    dense.set_attn_implementation("sdpa")
    evictions = batching.watch_evictions(monkeypatch)
    settings = transformers.ContinuousBatchingConfig(
        page_size=16, num_blocks=traffic.blocks, max_batch_tokens=traffic.budget, safety_margin=0.0
    )
    greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = prompts_of(traffic, chance)
    before = tensors()
    with (
        s2o_compile.profile(error_rows=0) as profile,
        sparse.continuous_batching_context_manager(greedy, continuous_batching_config=settings) as manager,
    ):
        answers = replay(manager, prompts, traffic, chance)
        cache = manager.batch_processor.cache
        cache.evict_cached_blocks()  # Prefixes that are kept for later.
        assert cache.compute_free_capacity() == 1.0, "pages are lost"
    del manager, cache
    assert batching.sparse_calls(profile) > 0
    assert evictions and answers.cancelled
    assert set(prompts) - answers.cancelled <= set(answers.tokens)
    del profile
    assert tensors() <= before, "tensors are lost"
    for name in answers.tokens:
        if name not in answers.cancelled:
            assert_right(dense, prompts[name], answers.tokens[name])
