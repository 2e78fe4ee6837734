"""RULER's needles in a haystack (arXiv 2404.06654): sentences that give a value for a key."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from s2o_compile.testbed.document import MIDDLE, WORDS, random_value

from .plan import OPENING, VALUES, Fact, Plan, Question, enumerated, even_depths, shuffled


@dataclass(frozen=True)
class Kind:
    """What a needle's value is called, how a value is drawn, and how keys are, without end and each once."""

    noun: str
    value: Callable[[random.Random], str]
    keys: Callable[[random.Random], Iterator[str]]

    @property
    def opening(self) -> str:
        """Says what is hidden."""
        return OPENING.replace("number", self.noun)

    def needle(self, rng: random.Random, key: str, depth: float) -> Fact:
        """A needle at a depth."""
        value = self.value(rng)
        return Fact(f"\n{self.sentence(key, value)}\n", value, depth)

    def sentence(self, key: str, value: str) -> str:
        """A needle's text."""
        return f"One of the special magic {self.noun}s for {key} is: {value}."

    def ask(self, facts: Sequence[Fact], keys: Sequence[str]) -> Question:
        """The question for the values of needles, in their order."""
        values = tuple(fact.value for fact in facts)
        noun, verb, all_ = (f"{self.noun}s", "are", "all ") if len(values) > 1 else (self.noun, "is", "")
        about = f"special magic {noun} for {enumerated(keys)} mentioned in the provided text"
        return Question(f"\nWhat {verb} {all_}the {about}? The {about} {verb}", f" {enumerated(values)}.\n", values)


def two_words(rng: random.Random) -> Iterator[str]:
    """Keys of two words; fewer than a thousand."""
    pairs = [f"{first}-{second}" for first, second in itertools.permutations(WORDS, 2)]
    yield from rng.sample(pairs, len(pairs))


def three_words(rng: random.Random) -> Iterator[str]:
    """Keys of three words, for haystacks of needles; nearly 30,000."""
    triples = ["-".join(words) for words in itertools.permutations(WORDS, 3)]
    yield from rng.sample(triples, len(triples))


def random_uuid(rng: random.Random) -> str:
    """A UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def uuids(rng: random.Random) -> Iterator[str]:
    """Keys that are UUIDs."""
    while True:
        yield random_uuid(rng)


NUMBER = Kind("number", random_value, two_words)
NUMBER_AMONG_NEEDLES = Kind("number", random_value, three_words)
UUID = Kind("uuid", random_uuid, uuids)


def single(rng: random.Random, depth: float, length: int) -> Plan:
    """A single needle a place, at `depth` of the text before its question (RULER's niah_single)."""
    middle, end = itertools.islice(NUMBER.keys(rng), 2)
    facts = [NUMBER.needle(rng, middle, MIDDLE * depth), NUMBER.needle(rng, end, depth)]
    return Plan(facts, [NUMBER.ask(facts[:1], [middle])], [NUMBER.ask(facts[1:], [end])])


def multikey(rng: random.Random, depth: float, length: int) -> Plan:
    """Needles with different keys, asked one by one: those not asked about distract."""
    keys, facts = _spread(rng)
    questions = [NUMBER.ask([fact], [key]) for fact, key in zip(facts, keys, strict=True)]
    return Plan(facts, shuffled(rng, questions[:VALUES]), shuffled(rng, questions[VALUES:]))


def multivalue(rng: random.Random, depth: float, length: int) -> Plan:
    """Several needles with the same key, all asked for in one question, in the order of the text."""
    middle, end = itertools.islice(NUMBER.keys(rng), 2)
    keys = [middle] * VALUES + [end] * VALUES
    facts = [NUMBER.needle(rng, key, where) for key, where in zip(keys, even_depths(), strict=True)]
    return Plan(facts, [NUMBER.ask(facts[:VALUES], [middle])], [NUMBER.ask(facts[VALUES:], [end])])


def multiquery(rng: random.Random, depth: float, length: int) -> Plan:
    """Needles with different keys, several asked for in one question."""
    keys, facts = _spread(rng)
    return Plan(facts, [NUMBER.ask(facts[:VALUES], keys[:VALUES])], [NUMBER.ask(facts[VALUES:], keys[VALUES:])])


def numbers_among_needles(rng: random.Random, depth: float, length: int) -> Plan:
    """A single needle a place in a haystack of needles (RULER's niah_multikey_2)."""
    return _among_needles(NUMBER_AMONG_NEEDLES, rng, depth)


def uuids_among_needles(rng: random.Random, depth: float, length: int) -> Plan:
    """The same with keys and values that are UUIDs (RULER's niah_multikey_3)."""
    return _among_needles(UUID, rng, depth)


def _among_needles(kind: Kind, rng: random.Random, depth: float) -> Plan:
    keys = kind.keys(rng)
    middle, end = itertools.islice(keys, 2)
    facts = [kind.needle(rng, middle, MIDDLE * depth), kind.needle(rng, end, depth)]
    haystack = (kind.sentence(key, kind.value(rng)) + "\n" for key in keys)
    return Plan(facts, [kind.ask(facts[:1], [middle])], [kind.ask(facts[1:], [end])], kind.opening, (haystack,))


def _spread(rng: random.Random) -> tuple[list[str], list[Fact]]:
    """Keys and needles for both places, evenly up to the questions."""
    keys = list(itertools.islice(NUMBER.keys(rng), 2 * VALUES))
    return keys, [NUMBER.needle(rng, key, where) for key, where in zip(keys, even_depths(), strict=True)]
