"""Retrieval tasks as RULER defines them (arXiv 2404.06654): what a text hides, and what is asked about it.

Each text is asked twice, about different values: in its middle, with the text going on behind, and at its end.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from s2o_compile.testbed.document import MIDDLE, WORDS, random_value

OPENING = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n\n"
)
VALUES = 4
"""Values of a place in all tasks with several, and hops of a chain, as RULER has them."""
CONSTANTS = 16
CONSTANTS_END = 0.58
"""Lines of the task `constants`, and the share of the text that hides them."""


@dataclass(frozen=True)
class Fact:
    """A sentence of a text that gives a value, behind a share `depth` of the text."""

    sentence: str
    value: str
    depth: float


@dataclass(frozen=True)
class Question:
    """A question up to its reply, the reply, and the values in it, in order; each counts as one answer."""

    prompt: str
    reply: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a text hides, and what is asked about it; the opening stands before all of it."""

    facts: list[Fact]
    middle: list[Question]
    end: list[Question]
    opening: str = OPENING


@dataclass(frozen=True)
class Task:
    """A task: `plan` makes what one text hides, from a source of chance and the depth of single needles.

    Attributes:
        plan: Makes a plan.
        has_depth: Whether the depth matters to it.
        filler: The kind of text it needs; None for any.
    """

    plan: Callable[[random.Random, float], Plan]
    has_depth: bool = False
    filler: str | None = None


def niah(rng: random.Random, depth: float) -> Plan:
    """A single needle a place, at `depth` of the text before its question."""
    middle, end = _keys(rng, 2)
    facts = [_needle(rng, middle, MIDDLE * depth), _needle(rng, end, depth)]
    return Plan(facts, [_ask(facts[:1], [middle])], [_ask(facts[1:], [end])])


def multikey(rng: random.Random, depth: float) -> Plan:
    """Needles with different keys, asked one by one: those not asked about distract."""
    keys = _keys(rng, 2 * VALUES)
    facts = [_needle(rng, key, where) for key, where in zip(keys, _depths(), strict=True)]
    questions = [_ask([fact], [key]) for fact, key in zip(facts, keys, strict=True)]
    return Plan(facts, _shuffled(rng, questions[:VALUES]), _shuffled(rng, questions[VALUES:]))


def multivalue(rng: random.Random, depth: float) -> Plan:
    """Several needles with the same key, all asked for in one question, in the order of the text."""
    middle, end = _keys(rng, 2)
    keys = [middle] * VALUES + [end] * VALUES
    facts = [_needle(rng, key, where) for key, where in zip(keys, _depths(), strict=True)]
    return Plan(facts, [_ask(facts[:VALUES], [middle])], [_ask(facts[VALUES:], [end])])


def multiquery(rng: random.Random, depth: float) -> Plan:
    """Needles with different keys, several asked for in one question."""
    keys = _keys(rng, 2 * VALUES)
    facts = [_needle(rng, key, where) for key, where in zip(keys, _depths(), strict=True)]
    return Plan(facts, [_ask(facts[:VALUES], keys[:VALUES])], [_ask(facts[VALUES:], keys[VALUES:])])


def variable_tracking(rng: random.Random, depth: float) -> Plan:
    """Chains of assignments, `VAR B = VAR A`: every variable that has a chain's first value is asked for.

    One chain is asked about in the middle and one at the end; as in RULER, the opening solves a short example.
    """
    names = ["".join(rng.sample(string.ascii_uppercase, 5)) for _ in range(3 * (VALUES + 1))]
    numbers = rng.sample(range(10_000, 100_000), 3)
    example, middle, end = (
        _chain(names[place :: len(numbers)], number, until)
        for place, (number, until) in enumerate(zip(numbers, (1.0, MIDDLE, 1.0), strict=True))
    )
    shown = _ask_chain(example, numbers[0])
    lines = "".join(fact.sentence for fact in example)
    instruction = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    opening = f"{instruction}{lines}{shown.prompt}{shown.reply}\n{instruction}"
    return Plan([*middle, *end], [_ask_chain(middle, numbers[1])], [_ask_chain(end, numbers[2])], opening)


def key_value(rng: random.Random, depth: float) -> Plan:
    """Lookups in a JSON object that fills the text (arXiv 2307.03172), asked one by one."""
    opening = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
    facts, questions = [], []
    for where in _depths():
        key, value = random_key(rng), random_value(rng)
        facts.append(Fact(pair(key, value), value, where))
        questions.append(Question(f'\nKey: "{key}"\nCorresponding value:', f' "{value}"\n', (value,)))
    return Plan(facts, _shuffled(rng, questions[:VALUES]), _shuffled(rng, questions[VALUES:]), opening)


def constants(rng: random.Random, depth: float) -> Plan:
    """Lines `KEY_i_x = 7 digits`, half of them asked for again in the middle and half at the end."""
    facts, questions = [], []
    for index in range(CONSTANTS):
        name, value = f"KEY_{index}_{rng.choice('abcdefghij')}", random_value(rng)
        facts.append(Fact(f"\n{name} = {value}\n", value, (index + 0.5) / CONSTANTS * CONSTANTS_END))
        questions.append(Question(f"{name} = ", f"{value}\n", (value,)))
    recap = Question("\n\n# Recap of the constants defined above\n", "", ())
    middle, end = (_shuffled(rng, questions[place::2]) for place in (0, 1))
    return Plan(facts, [recap, *middle], [recap, *end], opening="")


def pair(key: str, value: str) -> str:
    """A line of the JSON object of `key_value`."""
    return f'\n "{key}": "{value}",'


def random_key(rng: random.Random) -> str:
    """Of the JSON object of `key_value`: 8 hexadecimal digits."""
    return f"{rng.getrandbits(32):08x}"


def pairs(rng: random.Random) -> Iterator[str]:
    """The rest of the JSON object of `key_value`, without end."""
    while True:
        yield pair(random_key(rng), random_value(rng))


TASKS: dict[str, Task] = {
    "niah": Task(niah, has_depth=True),
    "multikey": Task(multikey),
    "multivalue": Task(multivalue),
    "multiquery": Task(multiquery),
    "variables": Task(variable_tracking),
    "key-value": Task(key_value, filler="pairs"),
    "constants": Task(constants),
}
"""By name; all run by default."""


def _keys(rng: random.Random, count: int) -> list[str]:
    keys = [f"{first}-{second}" for first in WORDS for second in WORDS if first != second]
    return rng.sample(keys, count)


def _depths() -> list[float]:
    """Of `VALUES` facts asked for in the middle, then of as many asked for at the end: evenly up to the question."""
    return [(index + 0.5) / VALUES * until for until in (MIDDLE, 1.0) for index in range(VALUES)]


def _shuffled(rng: random.Random, questions: list[Question]) -> list[Question]:
    return rng.sample(questions, len(questions))


def _needle(rng: random.Random, key: str, depth: float) -> Fact:
    value = random_value(rng)
    return Fact(f"\nOne of the special magic numbers for {key} is: {value}.\n", value, depth)


def _ask(facts: list[Fact], keys: list[str]) -> Question:
    """The question for the values of needles, in their order."""
    values = tuple(fact.value for fact in facts)
    number, verb, all_ = ("numbers", "are", "all ") if len(values) > 1 else ("number", "is", "")
    about = f"special magic {number} for {_enumerated(keys)} mentioned in the provided text"
    return Question(
        f"\nWhat {verb} {all_}the {about}? The {about} {verb}",
        f" {_enumerated(values)}.\n",
        values,
    )


def _enumerated(items: list[str] | tuple[str, ...]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def _chain(names: list[str], number: int, until: float) -> list[Fact]:
    assigned = [str(number), *(f"VAR {name}" for name in names)]
    return [
        Fact(f"\nVAR {name} = {source}\n", name, (index + 0.5) / len(names) * until)
        for index, (name, source) in enumerate(zip(names, assigned, strict=False))
    ]


def _ask_chain(chain: list[Fact], number: int) -> Question:
    names = tuple(fact.value for fact in chain)
    return Question(
        f"\nQuestion: Find all variables that are assigned the value {number} in the text above. Answer: According to "
        f"the chain(s) of variable assignment in the text above, {len(names)} variables are assigned the value "
        f"{number}, they are:",
        f" {' '.join(names)}\n",
        names,
    )
