"""The answers of a run in a file, a line each as soon as they are known, so that a run cut off can go on.

The first line is the configuration. Each reading of a document by a method has a line for what it answers in the
middle, one for the end, and a last one, whose place is "text", for its work and what it predicts of the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from s2o_compile._console import UsageError
from s2o_compile.writing import append_text, write_text

from ..compare import differences
from .cases import PLACES
from .run import Outcome

KEY = ("method", "task", "length", "sample")
BY_PLACE = ("found", "nats", "depths")
"""The fields of an outcome that tell it from others, and those that differ by place."""
TEXT = "text"


class Journal:
    """The outcomes of a run.

    Args:
        path: The file, which is continued where there is one; None to keep nothing.
        model: The model's name, which is written into every line.
        configuration: What all answers depend on beside their key, as JSON has it.

    Raises:
        UsageError: The file is none of a run, or of one with another configuration.
    """

    def __init__(self, path: Path | None, model: str, configuration: Mapping[str, Any]) -> None:
        self._path, self._model = path, model
        self._outcomes: dict[tuple[Any, ...], Outcome] = {}
        if path is None:
            return
        first = json.dumps({"configuration": configuration})
        if not path.exists():
            write_text(path, f"{first}\n")
            return
        head, *lines = _whole_lines(path)
        _check(path, head.get("configuration"), json.loads(first)["configuration"])
        self._outcomes = {outcome.key: outcome for outcome in _outcomes(path, lines)}

    @property
    def outcomes(self) -> list[Outcome]:
        """All of them, in the order in which they came."""
        return list(self._outcomes.values())

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._outcomes

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome that is not there yet."""
        if outcome.key in self:
            return
        self._outcomes[outcome.key] = outcome
        if self._path is not None:
            append_text(self._path, "".join(f"{json.dumps(line)}\n" for line in _lines(self._model, outcome)))


def check_configuration(path: Path, known: Mapping[str, Any]) -> None:
    """Refuse the file of a run whose configuration differs in what is known of this one's yet.

    Raises:
        UsageError: It does, or the file is none of a run.
    """
    if path.exists():
        there = _whole_lines(path)[0].get("configuration")
        if isinstance(there, dict):
            there = {name: there.get(name) for name in known}
        _check(path, there, json.loads(json.dumps(known)))


def _lines(model: str, outcome: Outcome) -> Iterator[dict[str, Any]]:
    fields = asdict(outcome)
    key = {"model": model} | {name: fields.pop(name) for name in KEY}
    by_place = {name: fields.pop(name) for name in BY_PLACE}
    for place in PLACES:
        yield key | {"place": place} | {name: values[place] for name, values in by_place.items()}
    yield key | {"place": TEXT} | fields


def _outcomes(path: Path, lines: list[dict[str, Any]]) -> Iterator[Outcome]:
    """The outcomes that are complete; of others the run was cut off."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    try:
        for line in lines:
            place = line.pop("place")
            del line["model"]
            found.setdefault(tuple(line[name] for name in KEY), {})[place] = line
        for places in found.values():
            if TEXT in places:
                by_place: dict[str, Any] = {name: {place: places[place][name] for place in PLACES} for name in BY_PLACE}
                yield Outcome(**places[TEXT], **by_place)
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} holds a line that is no answer: delete the file to start anew.") from error


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file, of which a last one that was cut off is removed."""
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines or not all(isinstance(line, dict) for line in lines):
            raise ValueError("no JSON objects")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{path} is no file of answers: delete it to start anew.") from error
    if whole != text:
        write_text(path, whole)
    return lines


def _check(path: Path, there: Any, here: Any) -> None:
    for name, (was, now) in differences("configuration", there, here):
        raise UsageError(
            f"{path} has answers of another run, where {name} was {was}, not {now}: choose another --output, or delete "
            "the file to start anew."
        )
