"""RULER's aggregation (arXiv 2404.06654): which words are the most frequent in a list that is all of the text.

The middle asks about the list before it, and the end about a second list, which lies between the two. Lists come in
rounds of equal proportions, so that they can be cut anywhere.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable, Iterable, Iterator

from s2o_compile._console import UsageError
from s2o_compile.testbed.document import MIDDLE

from .filler import vocabulary
from .plan import Plan, Question

COMMON = 10
"""Words to name."""
TOKENS_A_WORD = 5
"""Of a numbered list, roughly."""
SHORT = 4096
"""Documents of fewer tokens have fewer repetitions, as in RULER."""
LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
MOST_COMMON = (
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
    "in the list are:"
)

CODED = 3
LETTERS = 6
FREQUENCIES = (60, 15, 6, 3, 2, 1, 1)
"""Coded words to name, letters of each, and how often a round has those of each rank: 100 / zeta(2) / rank**2. As in
RULER the first is dots, which do not count."""
RARE = 5
"""Coded words that a round has once, others each time."""
LEAST_CODED = 2048
"""Tokens of a document that hold enough rounds to tell the ranks apart."""
CODE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words.\n"
)
MOST_FREQUENT = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)


def common_words(rng: random.Random, depth: float, length: int) -> Plan:
    """RULER's cwe: ten words come 30 times each, others 3 times; 6 and 1 in short documents.

    Where the vocabulary is too small for so long a list, both come more often. The ten are to be named in the order in
    which they come up first; as in RULER, the opening solves a short example.
    """
    words = vocabulary(rng)
    known = iter(words)
    small, repeats, rounds = (20, 6, 1) if length < SHORT else (40, 30, 3)
    example, shown = _word_list(rng, known, small - COMMON, 3)
    example = itertools.islice(example, small - COMMON + 3 * COMMON)
    opening = f"{LIST}{''.join(_numbered(example))}{MOST_COMMON}{_reply(shown)}\n\n{LIST}"
    questions: list[Question] = []
    texts: list[Iterator[str]] = []
    for share in (MIDDLE, 1 - MIDDLE):
        wanted = (round(share * length / TOKENS_A_WORD) - COMMON * repeats) // rounds
        rare = min(max(COMMON, wanted), (len(words) - small) // 2 - COMMON)
        text, top = _word_list(rng, known, rare, repeats // rounds)
        questions.append(Question(MOST_COMMON, _reply(top), top))
        texts.append(_numbered(text))
    return _two_texts(opening, LIST, questions, texts)


def coded_words(rng: random.Random, depth: float, length: int) -> Plan:
    """RULER's fwe: words without meaning, whose frequencies fall with the square of their rank."""
    if length < LEAST_CODED:
        raise UsageError(f"--length must be at least {LEAST_CODED:,} for the task fwe, not {length:,}.")
    questions: list[Question] = []
    texts: list[Iterator[str]] = []
    for _ in range(2):
        ranked = ["...", *(_coded_word(rng) for _ in FREQUENCIES[1:])]
        top = tuple(ranked[1 : 1 + CODED])
        questions.append(Question(MOST_FREQUENT, f" {', '.join(top)}", top))
        texts.append(f"{word} " for word in _coded_text(rng, ranked))
    return _two_texts(CODE, CODE, questions, texts)


def _word_list(
    rng: random.Random, known: Iterator[str], rare: int, repeats: int
) -> tuple[Iterator[str], tuple[str, ...]]:
    """Words without end, of which a round has `COMMON` some times and `rare` others once; and the common ones."""
    common, others = (list(itertools.islice(known, count)) for count in (COMMON, rare))

    def draw() -> list[str]:
        return rng.sample(round_ := common * repeats + others, len(round_))

    first = draw()
    return _endless(first, draw), tuple(sorted(common, key=first.index))


def _coded_text(rng: random.Random, ranked: list[str]) -> Iterator[str]:
    """Coded words without end, in rounds of `FREQUENCIES` and `RARE` others."""

    def draw() -> list[str]:
        words = [word for word, times in zip(ranked, FREQUENCIES, strict=True) for _ in range(times)]
        words += [_coded_word(rng) for _ in range(RARE)]
        return rng.sample(words, len(words))

    return _endless(draw(), draw)


def _endless(first: list[str], draw: Callable[[], list[str]]) -> Iterator[str]:
    """The words of a first round and of all that are drawn after it."""
    yield from first
    while True:
        yield from draw()


def _coded_word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=LETTERS))


def _numbered(words: Iterable[str]) -> Iterator[str]:
    return (f"{number}. {word} " for number, word in enumerate(words, 1))


def _reply(words: Iterable[str]) -> str:
    return f" {''.join(_numbered(words))}".rstrip()


def _two_texts(opening: str, introduction: str, questions: list[Question], texts: list[Iterator[str]]) -> Plan:
    """A plan of two texts, the second of which is introduced behind the reply to the question about the first."""
    middle, end = (
        [Question(one.prompt, f"{one.reply}{behind}", one.values)]
        for one, behind in zip(questions, (f"\n\n{introduction}", "\n"), strict=True)
    )
    return Plan([], middle, end, opening, tuple(texts))
