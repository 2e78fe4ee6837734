"""Tries programs by seed."""

from __future__ import annotations

import re
from dataclasses import replace

from .campaign import Known, Tried, is_known
from .check import Verdict, check
from .choices import Choices, shrink
from .drawing import draw_program
from .program import Program

SHRINKING = 30.0
"""Seconds for one failure."""


def draw(choices: Choices, level: str | None) -> Program:
    """A program, at another level if asked for."""
    program = draw_program(choices)
    if level is None:
        return program
    return replace(program, level=level, features=program.features | {f"level: {level}"})


def signature(verdict: Verdict) -> str:
    """What failures of one cause have in common."""
    words = re.sub(r"backend='\w+' raised:\s*", "", verdict.message).splitlines()[:1]
    text = re.sub(r"\d+|'[^']*'|0x[0-9a-f]+", "*", " ".join(words))
    return (
        verdict.kind if verdict.kind.startswith(("outputs", "inputs", "gradients")) else f"{verdict.kind}: {text[:80]}"
    )


def attempt(seed: int, known: Known, every: int = 0) -> Tried:
    """Check the program of a seed, and shrink it if it fails in a way that is not known; each so many by Inductor."""
    level = "inductor" if every and seed % every == 0 else None
    choices = Choices(seed)
    program = draw(choices, level)
    verdict = check(program)
    counts = [f"feature: {feature}" for feature in program.features]
    counts += [f"refused: {re.sub(r'[0-9]+', '*', reason)}" for reason in set(verdict.refused)]
    counts += ["has a site"] * bool(verdict.rewritten or verdict.refused) + ["rewritten"] * bool(verdict.rewritten)
    counts += [f"rewritten: {feature}" for feature in program.features if verdict.rewritten]
    counts.append(f"level: {program.level}")
    kind = signature(verdict) if verdict.is_fault else verdict.kind
    tried = Tried(seed, kind, verdict.is_fault, verdict.message[:500], counts)
    if not verdict.is_fault or is_known(kind, program.features, known):
        return tried
    made = shrink(choices.made, lambda given: signature(check(draw(given, level))) == kind, SHRINKING)
    least = draw(Choices(given=made), level)
    tried.features, tried.script = sorted(least.features), repr(least)
    return tried
