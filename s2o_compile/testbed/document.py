"""A long document with values hidden in it, and questions for them in its middle and at its end."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._console import UsageError

WORDS = (
    "apple", "river", "stone", "cloud", "tiger", "piano", "lemon", "chair", "maple", "ocean", "robot",
    "castle", "garden", "silver", "window", "pencil", "rocket", "candle", "forest", "butter", "ladder",
    "mirror", "anchor", "basket", "violin", "marble", "desert", "falcon", "helmet", "island", "jacket",
    "kettle",
)  # fmt: skip
MODULES = (
    "argparse.py", "inspect.py", "tarfile.py", "pathlib.py", "zipfile.py", "typing.py", "doctest.py",
    "socket.py", "pickle.py", "subprocess.py", "threading.py",
)  # fmt: skip
LEAST_LENGTH = 1024
SCORED_TOKENS = 1024
DIGITS = 7
MIDDLE = 0.6
"""Share of the text before the questions in the middle."""
RECAP = "\n\n# Recap\n"
CHARACTERS_AT_ONCE = 1 << 16

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Document:
    """A tokenised document with the positions to look at.

    Attributes:
        tokens: Token ids.
        middle: Positions of the tokens of each value asked for in the middle, with text going on behind.
        end: The same for each value asked for at the end.
        scored: Positions of the last stretch of text, for perplexity and agreement.
    """

    tokens: list[int]
    middle: list[range]
    end: list[range]
    scored: range

    @property
    def positions(self) -> list[int]:
        """All positions whose prediction is looked at, ascending."""
        return sorted({i for span in [*self.middle, *self.end, self.scored] for i in span})


@dataclass(frozen=True)
class Passage:
    """Tokens of a piece of text, and where in them the values lie that it gives."""

    tokens: list[int]
    values: list[range]


def build_document(tokenizer: Any, texts: Iterable[str], length: int, seed: int = 0) -> Document:
    """Build a document of exactly `length` tokens.

    Lines such as "The special magic number for apple is: 4821567." are spread through the first part of the
    text. Half of the values are asked for at 60% of the text and half at its end, by repeating the lines.

    Args:
        tokenizer: A fast transformers tokenizer.
        texts: Pieces of text, read until there is enough.
        length: Tokens wanted, at least `LEAST_LENGTH`.
        seed: Chooses names, values and the order of the questions.

    Raises:
        UsageError: `length` is too small, the text is too short or the tokenizer gives no offsets.
    """
    check_document(None, length)
    rng = random.Random(seed)
    count = min(len(WORDS), length // 256)
    lines = [_encode_line(tokenizer, name, random_value(rng)) for name in rng.sample(WORDS, count)]
    recap = encode(tokenizer, RECAP)
    first = first_tokens(tokenizer)
    asked = sum(len(line.tokens) for line in lines) + 2 * len(recap)
    hidden = sum(len(line.tokens) for line in lines)
    text = take_tokens(tokenizer, texts, length - len(first) - asked - hidden, length)
    split = int(len(text) * MIDDLE)

    depths = [(number + 0.5) / len(lines) for number in range(len(lines))]
    tokens = first + hide(text[:split], lines, depths)
    middle = _ask(tokens, recap, rng.sample(lines[::2], len(lines[::2])))
    tokens += text[split:]
    scored = range(len(tokens) - min(SCORED_TOKENS, len(text) - split), len(tokens))
    end = _ask(tokens, recap, rng.sample(lines[1::2], len(lines[1::2])))
    return Document(tokens, middle, end, scored)


def check_document(path: Path | None, length: int) -> None:
    """Refuse what no document can be built from, before a model is loaded for it.

    Raises:
        UsageError: `length` is too small, or the file cannot be read as UTF-8 text.
    """
    if length < LEAST_LENGTH:
        raise UsageError(f"--length must be at least {LEAST_LENGTH:,} tokens, not {length:,}.")
    if path is not None:
        next(read_texts(path), None)


def read_texts(path: Path | None) -> Iterator[str]:
    """Yield the text of a file in pieces, or the sources of Python's standard library when there is no path.

    Raises:
        UsageError: The file cannot be read as UTF-8 text.
    """
    if path is None:
        for source in _standard_library():
            yield source.read_text(encoding="utf-8", errors="replace")
        return
    try:
        with path.open(encoding="utf-8") as file:
            while lines := file.readlines(CHARACTERS_AT_ONCE):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise UsageError(f"The document {path} is not UTF-8 text.") from error
    except OSError as error:
        raise UsageError(f"The document {path} cannot be read: {error.strerror}.") from error


def _standard_library() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    first = [folder / name for name in MODULES if (folder / name).is_file()]
    return first + sorted(path for path in folder.glob("*.py") if path not in first)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def first_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer begins a text with: its first token, if it has one."""
    tokens = tokenizer("a")["input_ids"]
    return tokens[:1] if tokens[0] == tokenizer.bos_token_id else []


def random_value(rng: random.Random) -> str:
    """A number of `DIGITS` digits."""
    return str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _encode_line(tokenizer: Any, name: str, value: str) -> Passage:
    before = f"\n\nThe special magic number for {name} is: "
    return encode_passage(tokenizer, f"{before}{value}.\n\n", [range(len(before), len(before) + len(value))])


def encode_passage(tokenizer: Any, text: str, values: list[range]) -> Passage:
    """Encode a text that holds values.

    Args:
        tokenizer: A fast transformers tokenizer.
        text: The text.
        values: Where in it the values lie, in characters.

    Raises:
        UsageError: The tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        raise UsageError("The model's tokenizer does not say where its tokens lie in the text: try another.")
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for value in values:
        inside = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < value.stop and b > value.start]
        spans.append(range(inside[0], inside[-1] + 1))
    return Passage(coded["input_ids"], spans)


def take_tokens(tokenizer: Any, texts: Iterable[str], wanted: int, length: int) -> list[int]:
    """The first `wanted` tokens of texts, for a document of `length`.

    Raises:
        UsageError: There are fewer.
    """
    tokens: list[int] = []
    for text in texts:
        tokens += encode(tokenizer, text)
        if len(tokens) >= wanted:
            return tokens[:wanted]
    raise UsageError(
        f"There are only {len(tokens):,} tokens of text left and --length {length} needs {wanted:,}: "
        "give a longer document, a smaller length, or ask for fewer documents."
    )


def hide(text: list[int], lines: list[Passage], depths: list[float]) -> list[int]:
    """Put lines into a text, each behind a share of its tokens; `depths`, the shares, ascend."""
    tokens: list[int] = []
    done = 0
    for line, depth in zip(lines, depths, strict=True):
        until = int(depth * len(text))
        tokens += text[done:until] + line.tokens
        done = until
    return tokens + text[done:]


def _ask(tokens: list[int], recap: list[int], lines: list[Passage]) -> list[range]:
    """Append the questions with their answers to `tokens`; return where the values lie."""
    tokens += recap
    return [span for line in lines for span in append(tokens, line)]


def append(tokens: list[int], passage: Passage) -> list[range]:
    """Append a passage to `tokens`; return where its values lie in them."""
    start = len(tokens)
    tokens += passage.tokens
    return [range(start + span.start, start + span.stop) for span in passage.values]
