"""Weights of 4 bits, two to a byte: where each half lies, and what cannot be packed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_qat import convert, prepare, verify
from lightning_qat.amct.record import parse_record
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann.int4_packing import can_pack, pack, unpack, unpacked
from tests.exporters.cann.amct_goldens import load_case, quantized_layers


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_two_neighbours_along_the_axis_share_a_byte_the_first_in_the_low_half(axis: int) -> None:
    integers = np.random.default_rng(0).integers(-8, 8, (4, 6, 2)).astype(np.int8)
    packed = pack(integers, axis)
    first, second = (np.take(integers, range(s, integers.shape[axis], 2), axis) for s in (0, 1))
    # 16 times the second plus the first without its sign: what the byte says as a number.
    np.testing.assert_array_equal(packed.astype(int), 16 * second.astype(int) + first % 16)
    np.testing.assert_array_equal(unpack(packed, axis), integers)


def test_a_weight_is_packed_when_it_has_half_the_channels() -> None:
    packed = np.array([[0x21, 0x43]], np.uint8).view(np.int8)
    assert unpacked(packed, 1, 4).tolist() == [[1, 2, 3, 4]]
    assert unpacked(packed, 1, 2) is packed


def test_groups_and_an_odd_number_of_channels_have_no_packed_form() -> None:
    assert [can_pack(*case) for case in ((4, 1), (3, 1), (4, 2))] == [True, False, False]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Conv2d(3, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.flat = nn.Linear(6, 4)
        self.eight = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.grouped(self.odd(x)))
        # Three dimensions make a MatMul of it.
        return self.eight(self.flat(x.flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("int4", [True, False])
def test_only_weights_of_4_bits_that_can_be_packed_are(tmp_path: Path, int4: bool) -> None:
    torch.manual_seed(0)
    net, x = Mixed(), torch.randn(2, 3, 8, 8)
    prepare(
        net,
        {
            "preset": "amct",
            "weight": {"bits": 4},
            "overrides": {
                "type:Linear": {"weight": {"granularity": "per_tensor"}},
                "eight": {"weight": {"bits": 8}},
            },
        },
    )
    net(x)
    model, exporter = convert(net, x), CannExporter(int4_weights=int4)
    artifact = exporter.export(model, tmp_path / "net")
    records = parse_record(artifact.files["record"].read_text())
    packed = {record.name for record in records if record.wts_type == "INT4"}
    assert packed == ({"up", "flat"} if int4 else set())
    agreement = verify(model, artifact, exporter=exporter)
    assert agreement.parameters_equal
    assert agreement.max_steps < 1


def test_the_comparison_sees_a_single_changed_half_byte() -> None:
    case = load_case("conv_a8w4")
    before = quantized_layers(case.deploy)
    weight = next(i for i in case.deploy.graph.initializer if i.name.startswith("conv2.sub_m"))
    raw = bytearray(weight.raw_data)
    raw[0] ^= 0x10
    weight.raw_data = bytes(raw)
    assert [a == b for a, b in zip(before, quantized_layers(case.deploy), strict=True)] == [
        True,
        False,
        True,
    ]
