"""What a run leaves for the report: few losses, whatever its length."""

from __future__ import annotations

from itertools import pairwise

import torch

from lightning_qat.report.run_record import MOST_LOSSES, RunRecord, run_facts
from tests.models import linear, trained


def test_a_long_run_keeps_losses_that_are_equally_far_apart() -> None:
    record = RunRecord()
    for step in range(10_000):
        record.add(step, {"loss": torch.tensor(float(step))})
    losses = record.to_dict()["loss"]
    assert MOST_LOSSES / 2 <= len(losses) <= MOST_LOSSES
    assert {b[0] - a[0] for a, b in pairwise(losses)} == {32}
    assert all(step == loss for step, loss in losses)
    assert losses[-1][0] > 10_000 - 2 * 32


def test_what_is_no_finite_loss_is_left_out() -> None:
    record = RunRecord()
    for outputs in (None, {}, {"loss": None}, torch.ones(3), {"loss": torch.tensor(float("nan"))}):
        record.add(0, outputs)
    record.add(1, torch.tensor([2.0], requires_grad=True))
    record.enter(0, "calibrate")
    assert record.to_dict() == {"loss": [[1, 2.0]], "phases": [[0, "calibrate"]]}


def test_the_noise_of_weights_is_that_of_their_rounding() -> None:
    net = trained(linear(), torch.randn(8, 6))
    weight = net.get_submodule("0").weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    noise = (weight / scale).round() * scale - weight
    expected = 10 * torch.log10((weight**2).sum() / (noise**2).sum())
    facts = run_facts(net, None, RunRecord())
    assert facts["weight_sqnr_db"].keys() == {"0.weight", "2.weight"}
    torch.testing.assert_close(
        facts["weight_sqnr_db"]["0.weight"], float(expected), rtol=0, atol=0.02
    )
    assert "left_float" not in facts
