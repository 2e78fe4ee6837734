"""The Sparse Frontier's stories (arXiv 2504.17768): a trader's chapters, with questions about what happened in them.

The sentences are this project's. Chapters are told apart by their places rather than by numbers, so that a story can be
cut to any length.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from s2o_compile.testbed.document import MIDDLE

from .plan import VALUES, Fact, Plan, Question, even_depths, shuffled

HERO = "Arion"
OPENING = (
    f"The following story tells, place by place, whom {HERO} met on a long journey and what was bought and sold. No "
    "two places, people or items are the same. Questions about it follow.\n"
)
ONSETS = ("b", "br", "d", "dr", "f", "g", "gl", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z")
VOWELS = ("a", "e", "i", "o", "u", "ae", "ia", "or", "el", "an", "in", "ur")
LOOKS = (
    "black", "blue", "bright", "carved", "green", "heavy", "narrow", "old", "painted", "pale", "plain", "red", "round",
    "small", "tall", "white",
)  # fmt: skip
MATERIALS = (
    "amber", "brass", "cedar", "clay", "copper", "crystal", "glass", "ivory", "jade", "leather", "linen", "oak",
    "pearl", "silver", "stone", "walnut",
)  # fmt: skip
THINGS = (
    "bowl", "box", "bracelet", "chess set", "clock", "comb", "compass", "cup", "drum", "flute", "lamp", "locket",
    "mask", "mirror", "ring", "spoon",
)  # fmt: skip
ARRIVALS = (
    "The road led {hero} to {place}. ",
    "After two days on the river {hero} came to {place}. ",
    "By evening the walls of {place} stood before {hero}. ",
    "Rain had fallen all night when {hero} reached {place}. ",
)
EVENTS = (
    "A fair filled the streets, and nobody had a room to let. ",
    "The well in the square had run dry, and people spoke of little else. ",
    "A ship that was long thought lost had come home that morning. ",
    "The harvest was late, and prices had doubled within a week. ",
    "Two families had ended an old quarrel, and the bells rang. ",
    "Masons were at work on the bridge, and carts stood waiting in long rows. ",
)
MEETINGS = (
    "At the inn {person} shared a table and a loaf of bread. ",
    "{person} was mending a cart in the shade and looked up. ",
    "{person} had heard of the journey and asked to hear more of it. ",
)
TALKS = (
    "They talked about the weather in the hills until the lamps were lit. ",
    "They compared maps, and neither trusted the other's. ",
    "They spoke of a road that no one had used in years. ",
    "They agreed that the winter would be a long one. ",
)
PURCHASE = "Before leaving {place}, {hero} bought the {item} from {person}. "
NO_PURCHASE = "{hero} looked at what {person} had to offer, and left {place} without buying anything. "


@dataclass(frozen=True)
class Chapter:
    """A stay at a place: whom the hero met there, and what was bought."""

    place: str
    person: str
    item: str

    def tell(self, rng: random.Random, buys: bool = True) -> str:
        """The chapter as text."""
        sentences = [*map(rng.choice, (ARRIVALS, EVENTS, MEETINGS, TALKS)), PURCHASE if buys else NO_PURCHASE]
        names = {"hero": HERO, "place": self.place, "person": self.person, "item": self.item}
        return "\n" + "".join(sentence.format(**names) for sentence in sentences).strip() + "\n"


def retrieval(rng: random.Random, depth: float, length: int) -> Plan:
    """What was bought at a place, where a person was met, and whom the hero met at a place; asked one by one."""
    chapters = _chapters(rng)
    facts, questions = [], []
    for number, (where, chapter) in enumerate(zip(even_depths(), chapters, strict=False)):
        place, person = chapter.place, chapter.person
        question = (
            _ask(f"Which item did {HERO} buy in {place}?", f"In {place} {HERO} bought the", chapter.item),
            _ask(f"Where did {HERO} meet {person}?", f"{HERO} met {person} in", place),
            _ask(f"Whom did {HERO} meet in {place}?", f"In {place} {HERO} met", person),
        )[number % 3]
        facts.append(Fact(chapter.tell(rng), question.values[0], where))
        questions.append(question)
    asked = shuffled(rng, questions[:VALUES]), shuffled(rng, questions[VALUES:])
    return Plan(facts, *asked, OPENING, (_story(rng, chapters),))


def multihop(rng: random.Random, depth: float, length: int) -> Plan:
    """Which item was bought just before another, at `depth` of the text before the question."""
    chapters = _chapters(rng)
    facts, questions = [], []
    for until in (MIDDLE, 1.0):
        before, after = itertools.islice(chapters, 2)
        facts.append(Fact(before.tell(rng) + after.tell(rng), before.item, until * depth))
        asked = f"Which was the last item that {HERO} bought before buying the {after.item}?"
        questions.append(_ask(asked, f"Before buying the {after.item}, {HERO} bought the", before.item))
    return Plan(facts, questions[:1], questions[1:], OPENING, (_story(rng, chapters),))


def filtering(rng: random.Random, depth: float, length: int) -> Plan:
    """The places where nothing was bought, in the order of the story; the end asks for those behind the middle."""
    stream = _chapters(rng)
    facts, questions = [], []
    for first, share, since in ((0.0, MIDDLE, ""), (MIDDLE, 1 - MIDDLE, " since the last question")):
        chapters = list(itertools.islice(stream, VALUES))
        facts += [
            Fact(chapter.tell(rng, buys=False), chapter.place, first + (index + 0.5) / VALUES * share)
            for index, chapter in enumerate(chapters)
        ]
        places = tuple(chapter.place for chapter in chapters)
        asked = f"In which {VALUES} places{since} did {HERO} not buy anything?"
        questions.append(Question(f"\nQuestion: {asked}\nAnswer:", f" {', '.join(places)}.\n", places))
    return Plan(facts, questions[:1], questions[1:], OPENING, (_story(rng, stream),))


def _ask(question: str, answer: str, value: str) -> Question:
    return Question(f"\nQuestion: {question}\nAnswer: {answer}", f" {value}.\n", (value,))


def _story(rng: random.Random, chapters: Iterator[Chapter]) -> Iterator[str]:
    return (chapter.tell(rng) for chapter in chapters)


def _chapters(rng: random.Random) -> Iterator[Chapter]:
    """Chapters of which no two share a name or an item; about 4,000, with some 80 tokens each."""
    syllables = ["".join(parts) for parts in itertools.product(ONSETS, VOWELS)]
    names = ("".join(parts).capitalize() for parts in rng.sample(list(itertools.permutations(syllables, 2)), 10_000))
    things = list(itertools.product(LOOKS, MATERIALS, THINGS))
    for item in rng.sample(things, len(things)):
        yield Chapter(next(names), next(names), " ".join(item))
