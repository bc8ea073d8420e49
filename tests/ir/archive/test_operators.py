"""What a graph from elsewhere may call."""

import pytest
import torch

from lightning_qat.ir.archive.operators import is_operator
from lightning_qat.ir.operators import OPERATORS, Operator


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_every_operator_of_our_table_may_be_called(operator: Operator) -> None:
    for name in operator.aten:
        packet = getattr(torch.ops.aten, name)
        assert any(is_operator(f"torch.ops.aten.{name}.{o}") for o in packet.overloads()), name


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.save.default",  # writes a file
        "torch.ops.aten.from_file.default",  # reads one
        "torch.ops.aten._print.default",
        "torch.ops.aten.warn.default",
        "torch.ops.aten.set_.source_Storage",
        "torch.ops.aten.resize_.default",
        "torch.ops.aten.fbgemm_linear_int8_weight.default",  # takes bytes for a C++ object
        "torch.ops.aten.quantized_gru.input",
        "torch.ops.torchvision.read_file.default",
        "torch.ops.torchvision.write_file.default",
        "torch.ops.aten.add",  # any callable would be called
        "torch.ops.aten.__class__.mro",
        "torch.ops.aten.nothing.default",
        "torch.ops.image.read_file.default",
        "torch.ops.profiler._record_function_enter_new.default",
        "torch.ops.higher_order.call_torchbind",
        "torch.hub.load",
        "_operator.attrgetter",
        "#namespace:operator",
    ],
)
def test_what_reaches_beyond_numbers_may_not(target: str) -> None:
    assert not is_operator(target)
