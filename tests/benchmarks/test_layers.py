"""The comparison of the operator with SDPA, call by call."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layers import compare
from s2o_compile._console import UsageError
from s2o_compile.ops import S2OConfig
from s2o_compile.sdpa_intercept import SdpaInputs, SdpaIntercept

from ..passes.models import padding, tiny, tokens


def test_calls_of_a_model_are_measured_and_left_as_they_are() -> None:
    model, ids, rows = tiny("llama"), tokens(200, batch=1), []

    def measure(call: SdpaInputs) -> torch.Tensor:
        dense, row = compare(call, S2OConfig(min_length=0, threshold=0), 1)
        rows.append(row)
        return dense

    with torch.no_grad():
        want = model(ids).logits
        with SdpaIntercept(measure):
            assert torch.equal(model(ids).logits, want)
    assert len(rows) == 2
    for row in rows:
        assert row.sdpa > 0 and row.s2o > 0
        assert row.error < 1e-9 and 0.9 < row.density < 1.2


def test_masks_are_not_compared() -> None:
    def measure(call: SdpaInputs) -> torch.Tensor:
        return compare(call, S2OConfig(min_length=0), 1)[0]

    with torch.no_grad(), SdpaIntercept(measure), pytest.raises(UsageError, match="mask or dropout is not compared"):
        tiny("llama")(tokens(40), attention_mask=padding(40, "left"))
