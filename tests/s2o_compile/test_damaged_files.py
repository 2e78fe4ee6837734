"""Calibration files that something else than `calibrate` wrote, or a process that did not end."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from s2o_compile import Calibration, CalibrationError, S2OConfig
from s2o_compile.calibration.file import Site
from s2o_compile.calibration.identity import Identity
from s2o_compile.calibration.settings import module_settings

MODEL = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4), "second": torch.nn.Linear(4, 4)})
SITES = {"first": Site(1e-3, 0.25, 1e-4), "second": Site(None, None, None, "no threshold kept the budget")}
VALUES = [
    None, True, 0, -1, 7, 0.5, 1e400, -1e400, float("nan"), 10**40, "", "x", [], [1], [None], {}, {"x": 1}, {"x": {}},
]  # fmt: skip


def calibration() -> Calibration:
    settings = {name: value for name, value in S2OConfig().to_dict().items() if name not in ("threshold", "min_length")}
    return Calibration(Identity.of(MODEL, SITES), 1e-3, [100], settings, "2.13.0", SITES)


def use(path: Path) -> None:
    """All that is done with a file; a CalibrationError is one sentence that names it."""
    try:
        found = Calibration.load(path)
        assert str(found) and found.density >= 0
        json.dumps(found.to_dict(), allow_nan=False)
        for config in module_settings(S2OConfig(calibration=path), MODEL).values():
            assert 0 <= config.threshold < 1
    except CalibrationError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def leaves(content: Any, *place: Any) -> Iterator[tuple[Any, ...]]:
    """The paths to everything that a JSON value holds."""
    yield place
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from leaves(value, *place, key)


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A JSON value with another in one place."""
    if not place:
        return value
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


def test_a_whole_file(tmp_path: Path) -> None:
    calibration().save(path := tmp_path / "calibration.json")
    assert Calibration.load(path) == calibration()
    assert module_settings(S2OConfig(calibration=path), MODEL)["first"].threshold == 1e-3


def test_a_file_of_an_earlier_release_names_what_changed(tmp_path: Path) -> None:
    content = calibration().to_dict() | {
        "format": "s2o calibration, version 1",
        "settings": {"segment": 32, "tile": 32},
    }
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(content))
    sentence = f"calibration {str(path)!r} must be made again: in it, segment is now a field of Ranking: "
    with pytest.raises(CalibrationError, match=f"^{re.escape(sentence)}"):
        Calibration.load(path)


def test_other_values_in_any_place(tmp_path: Path) -> None:
    content = calibration().to_dict()
    path = tmp_path / "calibration.json"
    for place in leaves(content):
        for value in VALUES:
            path.write_text(json.dumps(changed(content, place, value)))
            use(path)


def test_a_file_cut_short_at_any_place(tmp_path: Path) -> None:
    calibration().save(path := tmp_path / "calibration.json")
    text = path.read_text()
    for end in range(len(text.rstrip())):
        path.write_text(text[:end])
        with pytest.raises(CalibrationError, match="must be a file that"):
            Calibration.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' * 50_000, "1" * 10_000, "\0" * 100, "NaN"])
def test_other_texts(text: str, tmp_path: Path) -> None:
    (path := tmp_path / "calibration.json").write_text(text)
    with pytest.raises(CalibrationError, match="must be a file that"):
        Calibration.load(path)


def test_what_is_no_file_or_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read: Is a directory"):
        Calibration.load(tmp_path)
    calibration().save(path := tmp_path / "calibration.json")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read all files")
    with pytest.raises(CalibrationError, match="cannot be read: Permission denied"):
        Calibration.load(path)
