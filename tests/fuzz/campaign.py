"""A long run: seeds are tried in processes of their own, counted, and what fails is shrunk."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from s2o_compile.writing import write_text

CHUNK = 100
"""Seeds tried in one process."""
ALIKE = 3
"""Faults of a kind that are shrunk, other than wrong numbers."""


@dataclass
class Tried:
    """What became of one seed.

    Attributes:
        seed: What it was drawn from.
        kind: "same", or what is wrong.
        is_fault: Whether it is the project's fault.
        message: Details.
        counts: What is counted, by name.
        features: What it has that a plain one has not; of a fault, after shrinking.
        script: Of a fault, a script that shows it.
    """

    seed: int
    kind: str
    is_fault: bool = False
    message: str = ""
    counts: list[str] = field(default_factory=list)
    features: list[str] = field(default_factory=list)
    script: str = ""


Known = list[tuple[str, frozenset[str]]]
"""The kinds and features of faults that were found already, and are not shrunk again."""
Try = Callable[[int, Known], Tried]


@dataclass
class Result:
    """Counts and faults of all seeds from `first` to before `next`."""

    first: int
    next: int
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[Tried] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Result:
        """A result that was saved."""
        saved = json.loads(path.read_text())
        return cls(**saved | {"counts": Counter(saved["counts"]), "faults": [Tried(**x) for x in saved["faults"]]})

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        text = json.dumps(asdict(self) | {"counts": dict(self.counts.most_common())}, indent=1)
        write_text(path, text)

    @property
    def known(self) -> Known:
        """The faults so far."""
        return [(fault.kind, frozenset(fault.features)) for fault in self.faults]

    def add(self, tried: Tried) -> None:
        """Count one seed."""
        self.counts.update(["tried", f"result: {tried.kind}", *tried.counts])
        if tried.is_fault:
            self.counts["faulty"] += 1
            if tried.script:
                self.faults.append(tried)
        self.next = tried.seed + 1


def is_known(kind: str, features: frozenset[str], known: Known) -> bool:
    """Whether a fault has all that one has that is known, or enough of its kind are."""
    alike = [least for other, least in known if kind == other]
    enough = len(alike) >= ALIKE and not kind.endswith(": values")
    return enough or any(least <= features for least in alike)


def _work(attempt: Try, seeds: range, known: Known, pipe: Connection) -> None:
    for seed in seeds:
        tried = attempt(seed, known)
        if tried.script:
            known.append((tried.kind, frozenset(tried.features)))
        pipe.send(tried)


def _chunk(attempt: Try, seeds: range, known: Known, patience: float) -> Iterator[Tried]:
    """Try seeds in a process of their own; one that dies or hangs is a fault."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(attempt, seeds, known, there), daemon=True)
    process.start()
    there.close()
    try:
        for seed in seeds:
            if not here.poll(patience):
                yield Tried(seed, "hangs", True, f"no answer in {patience:g} s", script=f"seed {seed}")
                return
            try:
                tried = here.recv()
            except EOFError:
                process.join()
                yield Tried(seed, "dies", True, f"exit code {process.exitcode}", script=f"seed {seed}")
                return
            yield tried
    finally:  # Also where nobody asks for the rest.
        process.kill()
        process.join()


def run(attempt: Try, result: Result, seconds: float, path: Path | None, patience: float = 300) -> Result:
    """Try seeds from where a result ends, for so many seconds.

    Args:
        attempt: Tries one seed.
        result: Is continued.
        seconds: When to stop.
        path: Where the result is written, after each process and each fault.
        patience: Seconds after which a seed hangs.
    """
    start = before = time.monotonic()
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=None)
        while time.monotonic() < start + seconds:
            for tried in _chunk(attempt, range(result.next, result.next + CHUNK), result.known, patience):
                result.add(tried)
                if tried.script:
                    if path:
                        result.save(path)
                    progress.console.print(f"seed {tried.seed}: {tried.kind}", markup=False, soft_wrap=True)
                rate = result.counts["tried"] / (result.seconds + time.monotonic() - before)
                faults = f"{result.counts['faulty']} faulty, {len(result.faults)} faults"
                progress.update(task, completed=result.counts["tried"], description=f"{faults}, {rate:.1f}/s")
                if time.monotonic() > start + seconds:
                    break
            result.seconds, before = result.seconds + time.monotonic() - before, time.monotonic()
            if path:
                result.save(path)
    return result
