"""A long prompt in transformers' continuous batching beside requests that decode, and by the model alone."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import s2o_compile
from s2o_compile.timing import attempt, median_and_spread, settled, wall_seconds, warm_up

from ..prefill.budget import with_density
from ..prefill.calls import prefill_inputs
from ..prefill.models import Subject
from .row import ALONE, ENGINE, S2O, STOCK, Case, Row, sparse_calls

Show = Callable[[str], None]

ROOM = 256
"""Tokens that neighbours may generate beyond those that are timed, for each long prompt."""
WAIT = 1.0
"""Seconds after which a client that waits for an answer looks whether the engine still runs."""


class Times(NamedTuple):
    """What an engine took.

    Attributes:
        first: Seconds from each timed prompt to its first token.
        steps: Seconds of each step in which all requests decode.
        sparse: Sparse calls of attention in one prompt.
        implementation: The attention that the engine chose.
    """

    first: list[float]
    steps: list[float]
    sparse: int
    implementation: str


@torch.no_grad()
def measure_model(subject: Subject, length: int, case: Case, document: Path | None, show: Show) -> list[Row]:
    """The rows of a prompt, by the model alone and in the engine."""
    model, prompt = subject.model, subject.tokens(length, document)
    model.set_attn_implementation("sdpa")
    show("threshold")
    if subject.is_random:
        config = with_density(model, prefill_inputs(prompt, None), case.config, case.density)
        case = replace(case, config=config)
    show(ALONE)
    rows = [_measure_alone(model, prompt, way, case) for way in (STOCK, S2O)]
    return [*rows, *(_measure_engine(model, prompt, way, case, show) for way in case.ways)]


def _measure_alone(model: Any, prompt: torch.Tensor, way: str, case: Case) -> Row:
    """The row of the model's prefill in one call."""
    inputs = prefill_inputs(prompt, None)

    def prefill() -> None:
        int(model(**inputs).logits[0, -1].argmax())

    row = _row(ALONE, prompt, way, case)
    _choose(model, way, case)
    row.keys = model.config._attn_implementation
    row.reason = warm_up(prefill)
    if not row.reason:
        row.sparse = sparse_calls(prefill)
        clock = wall_seconds if case.device.type == "cpu" else settled(wall_seconds)
        row.seconds, row.spread = median_and_spread([clock(prefill) for _ in range(case.repetitions)])
    return row


def _measure_engine(model: Any, prompt: torch.Tensor, way: str, case: Case, show: Show) -> Row:
    """The row of a prompt in the engine."""
    row = _row(ENGINE, prompt, way, case)
    _choose(model, way, case)
    times, row.reason = attempt(partial(serve, model, prompt[0].tolist(), case, lambda text: show(f"{way}, {text}")))
    if times is not None:
        row.keys, row.sparse = times.implementation, times.sparse
        row.seconds, row.spread = median_and_spread(times.first)
        lower, row.step, upper = statistics.quantiles(times.steps, n=4)
        row.step_spread = (upper - lower) / row.step
    return row


def _row(subject: str, prompt: torch.Tensor, way: str, case: Case) -> Row:
    return Row(subject, prompt.shape[1], way, setting=case.config.threshold if way == S2O else None)


def _choose(model: Any, way: str, case: Case) -> None:
    """Let a model attend in one of `WAYS`."""
    model.set_attn_implementation("sdpa" if way == STOCK else "s2o")
    if way != STOCK:
        s2o_compile.configure(model, case.config if way == S2O else case.dense_config)


def serve(model: Any, prompt: list[int], case: Case, show: Show) -> Times:
    """Send a prompt again and again, one at a time, to an engine in which other requests decode.

    The first prompt is not timed, nor what comes before it. Prefixes are not shared, so that each is as new.

    Args:
        model: A causal language model of transformers.
        prompt: Tokens of the prompt; the others begin as it does.
        case: How many neighbours there are, and the engine's settings.
        show: Called before each prompt.

    Raises:
        RuntimeError: A request failed.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    parts = -(-len(prompt) // (case.budget - case.neighbours))
    new = (case.repetitions + 1) * (case.steps + parts + ROOM)
    context = prompt[: case.context]
    pages = _pages(len(prompt) + 1, case) + case.neighbours * _pages(len(context) + new, case)
    settings = ContinuousBatchingConfig(
        page_size=case.page, num_blocks=pages, max_batch_tokens=case.budget, safety_margin=0.0,
        allow_block_sharing=False,
    )  # fmt: skip
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    names = [f"neighbour {number}" for number in range(case.neighbours)]
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=settings) as manager:
        # The last of them is also the last that begins to decode.
        client, implementation = _Client(manager, names[-1]), model.config._attn_implementation
        try:
            for name in names:
                is_watched = name == names[-1]
                manager.add_request(context, request_id=name, streaming=is_watched, record_timestamps=is_watched)
            client.wait_for_steps(case.steps)
            show("first prompt")
            sparse = sparse_calls(partial(client.send, prompt))
            for number in range(case.repetitions):
                client.wait_for_steps(case.steps)
                show(f"prompt {number + 1}")
                client.send(prompt)
            client.wait_for_steps(case.steps)
        finally:
            for name in names:
                manager.cancel_request(name)
    first = [end - start for start, end in client.prompts[1:]]
    return Times(first, list(client.decoding()), sparse, implementation)


def _pages(tokens: int, case: Case) -> int:
    """Pages for the tokens of a request, and one more."""
    return -(-tokens // case.page) + 1


class _Client:
    """What sends prompts to an engine, and watches one request there that streams its tokens.

    Attributes:
        times: When the watched request had each of its tokens.
        prompts: When each prompt was sent, and when its first token was there.
    """

    def __init__(self, manager: Any, watched: str) -> None:
        self._manager, self._watched = manager, watched
        self.times: list[float] = []
        self.prompts: list[tuple[float, float]] = []

    def wait_for_steps(self, steps: int) -> None:
        """Wait until the watched request has so many tokens more."""
        wanted = len(self.times) + steps
        while len(self.times) < wanted:
            self._next()

    def send(self, prompt: list[int]) -> None:
        """Send a prompt, and wait for its first token."""
        name = f"prompt {len(self.prompts)}"
        self._manager.add_request(prompt, request_id=name, max_new_tokens=1, record_timestamps=True)
        while (answer := self._next()).request_id != name:
            pass
        self.prompts.append((answer.created_time, answer.timestamps[0]))

    def decoding(self) -> Iterator[float]:
        """Seconds between tokens of the watched request, after the first prompt, where no prompt was in the engine."""
        for start, end in itertools.pairwise(self.times):
            if start >= self.prompts[0][1] and not any(start < last and first < end for first, last in self.prompts):
                yield end - start

    def _next(self) -> Any:
        """The next answer of the engine."""
        while (answer := self._manager.get_result(timeout=WAIT)) is None:
            if not self._manager.is_running():
                raise RuntimeError("the engine stopped")
        if answer.error:
            raise RuntimeError(answer.error)
        if answer.request_id == self._watched:
            self.times = answer.timestamps
        if answer.request_id == self._watched and answer.is_finished():
            raise RuntimeError("requests that decode were done before all prompts were")
        return answer
