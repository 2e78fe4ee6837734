"""Lookups of values by exact keys, and chains of them."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

from s2o_compile.testbed.document import MIDDLE, random_value

from .plan import VALUES, Fact, Plan, Question, even_depths, shuffled

CONSTANTS = 16
CONSTANTS_END = 0.58
"""Lines of the task `constants`, and the share of the text that hides them."""
PAIRS_AT_ONCE = 64


def key_value(rng: random.Random, depth: float, length: int) -> Plan:
    """Lookups in a JSON object that fills the text (arXiv 2307.03172), asked one by one."""
    opening = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
    facts, questions = [], []
    for where in even_depths():
        key, value = _random_key(rng), random_value(rng)
        facts.append(Fact(_pair(key, value), value, where))
        questions.append(Question(f'\nKey: "{key}"\nCorresponding value:', f' "{value}"\n', (value,)))
    asked = shuffled(rng, questions[:VALUES]), shuffled(rng, questions[VALUES:])
    return Plan(facts, *asked, opening, (_pairs(rng),))


def constants(rng: random.Random, depth: float, length: int) -> Plan:
    """Lines `KEY_i_x = 7 digits`, half of them asked for again in the middle and half at the end."""
    facts, questions = [], []
    for index in range(CONSTANTS):
        name, value = f"KEY_{index}_{rng.choice('abcdefghij')}", random_value(rng)
        facts.append(Fact(f"\n{name} = {value}\n", value, (index + 0.5) / CONSTANTS * CONSTANTS_END))
        questions.append(Question(f"{name} = ", f"{value}\n", (value,)))
    recap = Question("\n\n# Recap of the constants defined above\n", "", ())
    middle, end = (shuffled(rng, questions[place::2]) for place in (0, 1))
    return Plan(facts, [recap, *middle], [recap, *end], opening="")


def variable_tracking(rng: random.Random, depth: float, length: int) -> Plan:
    """RULER's vt: chains of assignments, `VAR B = VAR A`; all variables that have a chain's value are asked for.

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


def _pair(key: str, value: str) -> str:
    """A line of the JSON object of `key_value`."""
    return f'\n "{key}": "{value}",'


def _random_key(rng: random.Random) -> str:
    """Of the JSON object of `key_value`: 8 hexadecimal digits."""
    return f"{rng.getrandbits(32):08x}"


def _pairs(rng: random.Random) -> Iterator[str]:
    """The rest of the JSON object of `key_value`, without end."""
    while True:
        yield "".join(_pair(_random_key(rng), random_value(rng)) for _ in range(PAIRS_AT_ONCE))


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
