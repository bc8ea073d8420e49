"""Every function between layers is quantized, passed through, or named once per call."""

import pytest
import torch

from tests.function_cases import CASES, Case, One
from tests.joins.cases import calibrated, the_plan


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_function_is_quantized_passed_through_or_named(case: Case) -> None:
    x = torch.randn(2, 3, 6, 6)
    model = calibrated(One(case.call), x)
    plan = the_plan(model)
    assert bool(plan.left_float) == (case.becomes == "named")
    read = [t for t in plan.tensors if t.quantizer != "conv.input_quantizer"]
    if case.becomes == "passed":
        # The output is on the grid of the input: one quantizer for both.
        [shared] = read
        assert "output:0[0]" in shared.consumers
        grid = model.get_submodule(shared.quantizer)
        found = model(x).unique()
        assert torch.isin(found, grid(found)).all()
    if case.becomes == "quantized":
        inside = [t for t in read if not any("output" in c for c in t.consumers)]
        assert inside
        assert len(read) > len(inside)
