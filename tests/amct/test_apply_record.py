"""``apply_record`` on models that it does not take."""

import pytest
import torch
from torch import nn

from lightning_qat.amct.apply_record import apply_record
from lightning_qat.amct.record import LayerRecord
from lightning_qat.prepare.prepare import prepare


def test_a_model_that_is_prepared_already_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    prepare(model)
    record = [LayerRecord("0", 0.1, 0, (0.1, 0.1))]
    with pytest.raises(ValueError, match=r"takes a float model.*'0' is quantized already"):
        apply_record(model, record, torch.zeros(1, 3))
    # The remedy works.
    apply_record(nn.Sequential(nn.Linear(3, 2)), record, torch.zeros(1, 3))
